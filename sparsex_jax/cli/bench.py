"""`sparsex bench`: measures what reuse costs and saves on the user's own model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import messages, output, print_json, progress, waiting
from sparsex_jax.config import EngineConfig
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import maps, quality, results
from sparsex_jax.eval.regimes import Regime
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.eval.summaries import summarize

_AROUND = 512  # more than the tokens of a prompt and its answer beside the body


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What a bench measures.

    Attributes:
      methods, tasks, regimes: by name, in the order of the result tables.
      length: tokens of each prompt's reused body, about.
      segments: segments of each body.
      samples: prompts for each task and regime.
      batch: prompts that run together.
      seed: of the prompts.
    """

    methods: Sequence[str]
    tasks: Sequence[str]
    regimes: Sequence[str]
    length: int
    segments: int
    samples: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("length", "segments", "samples", "batch"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("methods", "tasks", "regimes"):
            if not getattr(self, name):
                raise InvalidRequestError(f"{name} is empty; name at least one")

    def config(self, dtype: str, kv_dtype: str = "auto") -> EngineConfig:
        """That of an engine that runs a batch at once."""
        return EngineConfig(
            store_tokens=self.store_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_num_seqs=self.batch,
            max_prefill_seqs=self.batch,
        )

    @property
    def store_tokens(self) -> int:
        """A store of this size holds the donors and prompts of a batch at the same time, and the text before donors."""
        before = max(Regime.parse(name).num_examples(self.segments) for name in self.regimes)
        texts = 2 * self.segments + before + 1  # the donors, the prompt, the text before donors, one donor being made
        each = -(-self.length // self.segments)
        return self.batch * (texts * (each + each // 8 + 64) + 3 * _AROUND)

    @property
    def of_each_row(self) -> dict[str, Any]:
        """What makes a row another one, beside its own task, regime, sample and method."""
        return {name: getattr(self, name) for name in ("length", "segments", "seed")}


def run(
    model: str,
    dtype: str,
    settings: BenchSettings,
    *,
    out: Path | None,
    with_maps: bool,
    as_json: bool,
    kv_dtype: str = "auto",
    tensor_parallel: int = 1,
) -> None:
    """Measure, then print the results.

    Args:
      out: a folder. Rows are written to it as they come; a run that was stopped goes on with those that are missing.
        At the end, results are written to it.
      with_maps: draw key mass and deviation of a prompt of each task and regime too.
    """
    methods = {name: parse_method(name) for name in settings.methods}
    if out:
        make_folder(out)
    engine = EngineChoice(model, settings.config(dtype, kv_dtype), tensor_parallel).load()
    log = open_log(engine, model, settings, out) if out else None
    with progress() as bar:
        rows = quality.run(
            engine,
            methods,
            settings.tasks,
            settings.regimes,
            settings.length,
            settings.samples,
            settings.seed,
            num_segments=settings.segments,
            track=functools.partial(bar.track, description="Asking"),
            log=log,
        )
    found = summarize(rows)
    content = results.file_content(
        "quality", model, dataclasses.asdict(settings) | _dtype(engine), found, engine.mesh.size
    )
    if out:
        with waiting("Writing"):
            write(engine, settings, content, found, out, with_maps=with_maps)
    if as_json:
        print_json(content)
    else:
        output().print(results.markdown(content, found), soft_wrap=True)


def make_folder(out: Path) -> None:
    """Make it before minutes of measuring. Raises InvalidRequestError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"out={str(out)!r} cannot be made: {error.strerror}") from error


def open_log(engine: Engine, model: str, settings: BenchSettings, folder: Path) -> RowLog:
    """The file of rows in the folder, for this model and device.

    Raises:
      InvalidRequestError: it has rows that were made with other settings, another version or another commit.
    """
    head = made_with(engine, model, settings)
    stem = results.file_stem({"bench": "quality", "model": model, "device": head["device"]})
    return RowLog(folder / f"{stem}.rows.jsonl", head)


def made_with(engine: Engine, model: str, settings: BenchSettings) -> dict[str, Any]:
    """Whatever makes a row another one, but for its own task, regime, sample and method."""
    made = results.provenance(engine.mesh.size)
    about = {"model": Path(model).name} | {name: made[name] for name in ("device", "versions", "commit")}
    return about | _dtype(engine) | settings.of_each_row


def _dtype(engine: Engine) -> dict[str, str]:
    """What differs from the default only, so that rows from before there was a choice are the same ones."""
    config = engine.config
    quantization = {} if config.quantization == "none" else {"quantization": config.quantization}
    return {"dtype": config.dtype} | quantization | ({} if config.kv_dtype == "auto" else {"kv_dtype": config.kv_dtype})


def write(
    engine: Engine,
    settings: BenchSettings,
    content: Mapping[str, Any],
    summaries: Sequence[results.Summary],
    folder: Path,
    *,
    with_maps: bool,
) -> None:
    """Write the results and a plot of them: scores over times. With maps, also one of each task and regime."""
    path = results.write(content, summaries, folder)
    try:
        from sparsex_jax.eval import plots
    except ImportError:
        messages().print("no plots were written: matplotlib is not installed; it comes with the extra `bench`")
        return
    shape = f"{settings.segments} segments, {settings.length} tokens"
    plots.scores_over_time(
        summaries,
        path.with_suffix(".png"),
        f"{content['model']} on {content['device']}, {shape}, {settings.samples} prompts of each task",
    )
    for task, regime in itertools.product(settings.tasks, settings.regimes) if with_maps else ():
        figure = path.with_name(f"{path.stem}-{task}-{regime.replace(':', '-')}.png")
        plots.heatmaps(example_maps(engine, settings, task, regime), figure, f"{content['model']}: {task}, {regime}")


def example_maps(engine: Engine, settings: BenchSettings, task: str, regime: str) -> maps.Maps:
    """The key mass and KV deviation of the task's first sample."""
    cell = (task, regime, 0)
    (one,) = quality.prepare_batch(engine, [cell], settings.length, settings.seed, settings.segments)
    return maps.make_maps(engine, one.prompt, one.namespace)
