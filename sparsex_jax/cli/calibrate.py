"""`sparsex calibrate`: finds the cheapest reuse that keeps a stated quality on the user's model, and writes a file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sparsex_jax.cli.bench import BenchSettings
from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.cli.terminal import output, print_json, progress
from sparsex_jax.config import CALIBRATED
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import calibrate
from sparsex_jax.eval.calibrate import DISAGREEMENT, LOSS, MAX_LOSS, Calibration, PromptSet, Target
from sparsex_jax.reuse.methods import SparseX


def target_of(max_loss: float | None, min_agreement: float | None, confident: bool) -> Target:
    """The target that the options state. If neither limit is given, the mean loss is at most 0.02.

    Args:
      max_loss: the largest mean loss, a share from 0 to 1.
      min_agreement: the smallest mean agreement, a share from 0 to 1.
      confident: the whole 95 % interval must meet the limit.

    Raises:
      InvalidRequestError: both limits are given, or one is out of range.
    """
    if max_loss is not None and min_agreement is not None:
        raise InvalidRequestError("max_loss and min_agreement are both given; a calibration has one target")
    if min_agreement is not None:
        if not 0 < min_agreement <= 1:
            raise InvalidRequestError(f"min_agreement={min_agreement} must be in (0, 1]")
        return Target(DISAGREEMENT, round(1 - min_agreement, 9), confident)
    return Target(LOSS, MAX_LOSS if max_loss is None else max_loss, confident)


def run(model: str, dtype: str, settings: BenchSettings, target: Target, *, out: Path | None, as_json: bool) -> None:
    """Calibrate, write the file, and print the result.

    Args:
      out: the file to write. None: `default_path`.
    """
    prompts = PromptSet(
        settings.tasks, settings.regimes, settings.length, settings.segments, settings.samples, settings.seed
    )
    calibrate.check_samples(target, prompts.total)
    path = check_writable(out or default_path(model))
    # With the default reuse, so that the engine does not read the file of an earlier calibration.
    engine = EngineChoice(model, dtype, settings.store_tokens, SparseX(), settings.batch, settings.batch).load()
    with progress() as bar:
        found = calibrate.calibrate(engine, prompts, target, track=functools.partial(_track, bar))
    content = calibrate.file_content(engine, model, prompts, found)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(content | {"file": str(path), "candidates": candidates_of(found)})
    else:
        show(found, path)


def default_path(model: str) -> Path:
    """`sparsex.json` in the model's directory, where the engine reads it. In the current one if the model has none."""
    folder = Path(model).expanduser()
    return folder / CALIBRATED if folder.is_dir() else Path(CALIBRATED)


def check_writable(path: Path) -> Path:
    """The path. Raises InvalidRequestError if its folder is missing, so that this shows before minutes of measuring."""
    if not path.parent.is_dir():
        raise InvalidRequestError(f"out={str(path)!r}: there is no directory {str(path.parent)!r}")
    return path


def _track(bar: Progress, items: Sequence[Any], what: str) -> Iterable[Any]:
    return bar.track(items, description=what)


def candidates_of(found: Calibration) -> list[dict[str, Any]]:
    """The options and figures of every measured candidate, ready for JSON."""
    return [each.reuse.to_dict() | each.to_dict(found.target.metric) for each in found.measured]


def show(found: Calibration, path: Path) -> None:
    """Print the table of candidates and the result."""
    print_line = functools.partial(output().print, soft_wrap=True)
    print_line(calibrate.table(found))
    print_line(f"Full recompute scores {found.full_score:.2f}. {calibrate.verdict(found)}")
    print_line(f"Written to {path}")
