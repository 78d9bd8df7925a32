"""`sparsex bench`: what reuse costs and saves on the user's own model."""

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

_AROUND = 512  # tokens of a prompt and its answer beside the body, generously


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the methods are asked: tasks, regimes and methods by name, each in the order of the tables."""

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
        """Enough for the donors and prompts of a batch at the same time, and for what stood before donors."""
        bodies = 3 if "context" in self.regimes else 2
        return self.batch * (bodies * (self.length + self.length // 8 + _AROUND) + 64 * self.segments)


def run(model: str, dtype: str, workload: Workload, *, out: Path | None, as_json: bool) -> None:
    methods = {name: parse_method(name) for name in workload.methods}
    engine = EngineChoice(model, dtype, workload.store_tokens, workload.batch).load()
    with progress() as bar:
        rows = quality.run(
            engine,
            methods,
            workload.tasks,
            workload.regimes,
            workload.length,
            workload.samples,
            workload.seed,
            num_segments=workload.segments,
            track=functools.partial(bar.track, description="Asking"),
        )
    summaries = quality.summarize(rows)
    content = results.document("quality", model, dataclasses.asdict(workload) | {"dtype": dtype}, summaries)
    if out:
        with waiting("Writing"):
            write(engine, workload, content, summaries, out)
    if as_json:
        print_json(content)
    else:
        output().print(results.markdown(content, summaries), soft_wrap=True)


def write(
    engine: Engine, workload: Workload, content: Mapping[str, Any], summaries: Sequence[quality.Row], folder: Path
) -> None:
    """The results, and plots of them: the frontier, and a heatmap of each task and regime's first sample."""
    path = results.write(content, summaries, folder)
    try:
        from sparsex_jax.eval import plots
    except ImportError:
        messages().print("no plots: matplotlib is not installed; it comes with the extra `bench`")
        return
    title = f"{content['model']}, {workload.length} tokens, {workload.samples} samples a point"
    plots.frontier(summaries, path.with_suffix(".png"), title)
    for task in workload.tasks:
        for regime in workload.regimes:
            figure = path.with_name(f"{path.stem}-{task}-{regime}.png")
            plots.heatmaps(
                example_maps(engine, workload, task, regime), figure, f"{content['model']}: {task}, {regime}"
            )


def example_maps(engine: Engine, workload: Workload, task: str, regime: str) -> maps.Maps:
    """What reuse does inside the model on one sample of the task."""
    rng, namespace = np.random.default_rng(workload.seed), f"maps/{task}/{regime}"

    def count(text: str) -> int:
        return len(regimes.encode(engine.tokenizer, text))

    sample = make_sample(task, rng, workload.length, workload.segments, count=count)
    asked = quality.prepare(engine, sample, regime, namespace, rng)
    return maps.make_maps(engine, asked.prompt, namespace)
