"""`sparsex bench`: measures what reuse costs and saves on the user's own model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import messages, output, print_json, progress, waiting
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import maps, quality, regimes, results
from sparsex_jax.eval.tasks import make_sample

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

    @property
    def store_tokens(self) -> int:
        """A store of this size holds the donors and prompts of a batch at the same time, and the text before donors."""
        bodies = 3 if "context" in self.regimes else 2
        return self.batch * (bodies * (self.length + self.length // 8 + _AROUND) + 64 * self.segments)


def run(model: str, dtype: str, settings: BenchSettings, *, out: Path | None, as_json: bool) -> None:
    """Measure, then print the results and write them to the folder `out`, if there is one."""
    methods = {name: parse_method(name) for name in settings.methods}
    engine = EngineChoice(model, dtype, settings.store_tokens, None, settings.batch, settings.batch).load()
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
        )
    summaries = quality.summarize(rows)
    content = results.file_content(
        "quality", model, dataclasses.asdict(settings) | {"dtype": engine.config.dtype}, summaries
    )
    if out:
        with waiting("Writing"):
            write(engine, settings, content, summaries, out)
    if as_json:
        print_json(content)
    else:
        output().print(results.markdown(content, summaries), soft_wrap=True)


def write(
    engine: Engine,
    settings: BenchSettings,
    content: Mapping[str, Any],
    summaries: Sequence[results.Summary],
    folder: Path,
) -> None:
    """Write the results and plots of them: the frontier, and heatmaps of one sample of each task and regime."""
    path = results.write(content, summaries, folder)
    try:
        from sparsex_jax.eval import plots
    except ImportError:
        messages().print("no plots were written: matplotlib is not installed; it comes with the extra `bench`")
        return
    title = f"{content['model']}, {settings.length} tokens, {settings.samples} samples a point"
    plots.frontier(summaries, path.with_suffix(".png"), title)
    for task in settings.tasks:
        for regime in settings.regimes:
            figure = path.with_name(f"{path.stem}-{task}-{regime}.png")
            plots.heatmaps(
                example_maps(engine, settings, task, regime), figure, f"{content['model']}: {task}, {regime}"
            )


def example_maps(engine: Engine, settings: BenchSettings, task: str, regime: str) -> maps.Maps:
    """The key mass and KV deviation of one sample of the task."""
    rng, namespace = np.random.default_rng(settings.seed), f"maps/{task}/{regime}"

    def count(text: str) -> int:
        return len(regimes.encode(engine.tokenizer, text))

    sample = make_sample(task, rng, settings.length, settings.segments, count=count)
    prepared = quality.prepare(engine, sample, regime, namespace, rng)
    return maps.make_maps(engine, prepared.prompt, namespace)
