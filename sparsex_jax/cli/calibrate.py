"""`sparsex calibrate`: the cheapest reuse that keeps a stated quality on the user's own model, as a file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sparsex_jax.cli.bench import Workload
from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.cli.terminal import output, print_json, progress
from sparsex_jax.config import CALIBRATED
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import calibrate
from sparsex_jax.eval.calibrate import DISAGREEMENT, LOSS, MAX_LOSS, Calibration, Prompts, Target
from sparsex_jax.reuse.methods import SparseX


def target_of(max_loss: float | None, min_agreement: float | None, confident: bool) -> Target:
    """What was typed: one of the two, or neither for the default.

    Raises:
      InvalidRequestError: both, or one that is out of range.
    """
    if max_loss is not None and min_agreement is not None:
        raise InvalidRequestError("max_loss and min_agreement are both given; a calibration has one target")
    if min_agreement is not None:
        if not 0 < min_agreement <= 1:
            raise InvalidRequestError(f"min_agreement={min_agreement} must be in (0, 1]")
        return Target(DISAGREEMENT, round(1 - min_agreement, 9), confident)
    return Target(LOSS, MAX_LOSS if max_loss is None else max_loss, confident)


def run(model: str, dtype: str, workload: Workload, target: Target, *, out: Path | None, as_json: bool) -> None:
    prompts = Prompts(
        workload.tasks, workload.regimes, workload.length, workload.segments, workload.samples, workload.seed
    )
    calibrate.check_samples(target, prompts.total)
    path = check_writable(out or default_path(model))
    # A file of an earlier calibration says nothing here, and may be the very one to be replaced.
    engine = EngineChoice(model, dtype, workload.store_tokens, workload.batch, reuse=SparseX()).load()
    with progress() as bar:
        found = calibrate.calibrate(engine, prompts, target, track=functools.partial(_track, bar))
    content = calibrate.document(engine, model, prompts, found)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(content | {"file": str(path), "candidates": candidates_of(found)})
    else:
        show(found, path)


def default_path(model: str) -> Path:
    """`sparsex.json` in the model's directory, where the engine looks for it, or else in the current one."""
    folder = Path(model).expanduser()
    return folder / CALIBRATED if folder.is_dir() else Path(CALIBRATED)


def check_writable(path: Path) -> Path:
    """The path; raises InvalidRequestError if its folder is missing, before minutes of measuring."""
    if not path.parent.is_dir():
        raise InvalidRequestError(f"out={str(path)!r}: there is no directory {str(path.parent)!r}")
    return path


def _track(bar: Progress, items: Sequence[Any], what: str) -> Iterable[Any]:
    return bar.track(items, description=what)


def candidates_of(found: Calibration) -> list[dict[str, Any]]:
    return [each.reuse.to_dict() | each.to_dict(found.target.metric) for each in found.measured]


def show(found: Calibration, path: Path) -> None:
    print_line = functools.partial(output().print, soft_wrap=True)
    print_line(calibrate.table(found))
    print_line(f"Full recompute scores {found.full_score:.2f}. {calibrate.verdict(found)}")
    print_line(f"Written to {path}")
