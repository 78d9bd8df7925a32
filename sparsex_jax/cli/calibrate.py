"""`sparsex calibrate`: finds the cheapest reuse that keeps a stated quality on the user's model, and writes a file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sparsex_jax.cli.bench import BenchSettings, made_with
from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import output, print_json, progress
from sparsex_jax.config import CALIBRATED, ReuseConfig, architecture
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import calibration
from sparsex_jax.eval.calibration import DISAGREEMENT, LOSS, MAX_LOSS, Calibration, PromptSet, Target
from sparsex_jax.eval.calibration.report import figures
from sparsex_jax.eval.calibration.search import check_use
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.reuse.methods import Full


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
    if max_loss is not None and not 0 <= max_loss < 1:
        raise InvalidRequestError(f"max_loss={max_loss} must be at least 0 and less than 1")
    return Target(LOSS, MAX_LOSS if max_loss is None else max_loss, confident)


def among_of(methods: Sequence[str]) -> list[str | ReuseConfig]:
    """The candidates that the option names: methods, or methods with options, which are candidates themselves."""
    return [parse_method(each) if ":" in each else each for each in methods]


def run(
    model: str,
    dtype: str,
    settings: BenchSettings,
    target: Target,
    *,
    use: str | None,
    out: Path | None,
    as_json: bool,
    tensor_parallel: int = 1,
) -> None:
    """Calibrate, write the file, and print the result.

    Args:
      use: the regime whose selection the file names. None: what holds in all of them.
      out: the file to write. None: `default_path`. Rows are written beside it as they come, so that the same command
        goes on where it was stopped.
    """
    prompts = PromptSet(
        settings.tasks, settings.regimes, settings.length, settings.segments, settings.samples, settings.seed
    )
    calibration.check_samples(target, prompts.total)
    check_use(use, prompts.regimes)
    among = among_of(settings.methods)
    path = check_writable(out or default_path(model))
    # With a method of its own, so that the engine does not read the file of an earlier calibration.
    engine = EngineChoice(model, settings.config(dtype), tensor_parallel, Full()).load()
    log = open_log(engine, model, settings, path)
    with progress() as bar:
        track = functools.partial(_track, bar)
        found = calibration.calibrate(engine, prompts, target, among=among, use=use, log=log, track=track)
    content = calibration.file_content(engine, model, prompts, found)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(content | {"file": str(path), "candidates": candidates_of(found)})
    else:
        show(found, path)


def open_log(engine: Engine, model: str, settings: BenchSettings, path: Path) -> RowLog:
    """The rows beside the result at `path`: `sparsex.rows.jsonl` beside `sparsex.json`.

    Raises:
      InvalidRequestError: they are of another model, or were made with other settings, another version or commit.
    """
    made = made_with(engine, model, settings) | {"architecture": architecture(engine.model)}
    return RowLog(path.with_suffix(".rows.jsonl"), made)


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


def candidates_of(found: Calibration) -> dict[str, list[dict[str, Any]]]:
    """The options and figures of every candidate that was measured, by regime, ready for JSON."""
    metric = found.target.metric
    return {
        regime: [each.reuse.to_dict() | figures(each, metric)[regime] for each in selection.attempts]
        for regime, selection in found.by_regime.items()
    }


def show(found: Calibration, path: Path) -> None:
    """Print the tables of candidates and the result."""
    print_line = functools.partial(output().print, soft_wrap=True)
    print_line(calibration.table(found))
    print_line(calibration.verdict(found))
    print_line(f"Written to {path}")
