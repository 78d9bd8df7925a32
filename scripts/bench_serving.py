"""Measures a server's latency and throughput by method: requests arrive at random at the serving loop.

    uv run python scripts/bench_serving.py [--workloads rag] [--load 0.7 | --rate 2.5] [--methods full prefix naive]

The workloads are those of `sparsex_jax.eval.workloads`, and the same for each method.
Requests are sent when they are due, whatever became of those before (an open loop, Poisson). The rate is given, or is
a share of what full recompute gets through when all requests are there at once. A method's figures are those of a
pass in a namespace of its own in which nothing was compiled. Prints a table for each workload, and writes
`serving-<model>-<device>.json` and, with matplotlib, a plot to `scripts/results`.

With --device-model NAME it measures servers with random weights over HTTP, ours and others': `bench_load.py` says how.

TTFT counts from the time a request was due. The tokens of one decode call arrive together, and the time since the last
tokens is divided among them. Goodput counts requests whose TTFT and mean time between tokens are within their limits.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparsex_jax import Engine, EngineConfig, ReuseConfig, SamplingParams
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.engines import add_tensor_parallel, load_engine, settled
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.eval.workloads import WORKLOADS, Workload, WorkloadSize, make_workload
from sparsex_jax.reuse.report import KINDS, Report, words_of
from sparsex_jax.scheduler.loop import Event

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("full", "prefix", "sparsex:boundary_layer=0:recompute_ratio=0.05", "sparsex")
PERCENTILES = (50, 95, 99)


# One request -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Timeline:
    """The times of one request, in seconds of the clock. It is a listener of the loop.

    Attributes:
      due: when the request had to be sent.
      came: for each event, when it came and with how many tokens.
    """

    due: float
    clock: Callable[[], float] = time.perf_counter
    came: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    report: Report | None = None
    error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if event.token_ids:
            self.came.append((self.clock(), len(event.token_ids)))
        self.report, self.error = event.report or self.report, event.error

    @property
    def ttft(self) -> float:
        return self.came[0][0] - self.due

    @property
    def gaps(self) -> list[float]:
        """The seconds between tokens."""
        pairs = itertools.pairwise(self.came)
        return [gap for (before, _), (now, new) in pairs for gap in [(now - before) / new] * new]

    def is_within(self, ttft: float, gap: float) -> bool:
        return self.ttft <= ttft and sum(self.gaps) <= gap * len(self.gaps)


def seconds_of(timelines: Sequence[Timeline]) -> float:
    """The seconds from the first due request to the last token."""
    return max(timeline.came[-1][0] for timeline in timelines) - min(timeline.due for timeline in timelines)


def figures(timelines: Sequence[Timeline], ttft_limit: float, gap_limit: float) -> dict[str, tuple[float, str]]:
    """The figures and their units, by name. The limits are in seconds."""
    reports = [timeline.report for timeline in timelines if timeline.report is not None]
    prompt_tokens = sum(report.prompt_tokens for report in reports)
    seconds = seconds_of(timelines)
    ttft = np.percentile([timeline.ttft for timeline in timelines], PERCENTILES)
    gaps = np.percentile([gap for timeline in timelines for gap in timeline.gaps], PERCENTILES)
    generated = sum(new for timeline in timelines for _, new in timeline.came)
    good = sum(timeline.is_within(ttft_limit, gap_limit) for timeline in timelines)

    def share(field: str) -> tuple[float, str]:
        return sum(getattr(report, field) for report in reports) / prompt_tokens, "of prompt tokens"

    work = sum(report.computed_fraction * report.prompt_tokens for report in reports) / prompt_tokens
    return {
        **{f"TTFT p{p}": (float(value), "s") for p, value in zip(PERCENTILES, ttft, strict=True)},
        **{f"ITL p{p}": (1e3 * float(value), "ms") for p, value in zip(PERCENTILES, gaps, strict=True)},
        "generated": (generated / seconds, "tokens/s"),
        "prompt": (prompt_tokens / seconds, "tokens/s"),
        "goodput": (good / seconds, "requests/s"),
        **{words_of(kind): share(f"{kind}_tokens") for kind in KINDS},
        "computed": (work, "of token-layers"),
    }


# The run ----------------------------------------------------------------------------------------------------


class Bench:
    """Passes of workloads over one engine, each in a namespace of its own."""

    def __init__(self, engine: Engine, new_tokens: int) -> None:
        self._engine = engine
        self._sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
        self._passes = itertools.count()

    def once(self, workload: Workload, reuse: ReuseConfig, due: np.ndarray) -> list[Timeline]:
        """Store the workload's texts, send each prompt when it is due (in seconds), and wait for all answers.

        Raises:
          RuntimeError: a request failed.
        """
        namespace = f"pass {next(self._passes)}"
        handles = {self._engine.remember(tokens, namespace=namespace, frozen=True) for tokens in workload.stored}
        timelines = self._serve(workload.prompts, reuse, namespace, due)
        for handle in handles:
            self._engine.forget(handle)
        for timeline in timelines:
            if timeline.error is not None:
                raise RuntimeError("a request failed") from timeline.error
        return timelines

    def _serve(
        self, prompts: Sequence[np.ndarray], reuse: ReuseConfig, namespace: str, due: np.ndarray
    ) -> list[Timeline]:
        loop = self._engine.loop
        timelines = [Timeline(at) for at in (time.perf_counter() + due).tolist()]
        coming = deque(zip(timelines, prompts, strict=True))
        busy = False
        while coming or busy:
            if coming and not busy:
                time.sleep(max(coming[0][0].due - time.perf_counter(), 0))
            while coming and coming[0][0].due <= time.perf_counter():
                timeline, prompt = coming.popleft()
                loop.submit(prompt, self._sampling, reuse=reuse, namespace=namespace, listener=timeline)
            busy = loop.step()
        return timelines


def compare(
    bench: Bench, workload: Workload, methods: dict[str, ReuseConfig], options: argparse.Namespace
) -> tuple[float, dict[str, list[Timeline]]]:
    """Choose the rate, and run a pass of each method with the same prompts at the same times."""
    number = len(workload.prompts)
    at_once = np.zeros(number)
    for reuse in methods.values():
        bench.once(workload, reuse, at_once)  # compiles most of the programs
    rate = options.rate
    if rate is None:
        timelines = settled(lambda: bench.once(workload, ReuseConfig("full"), at_once), "full")
        rate = options.load * number / seconds_of(timelines)
    due = np.random.default_rng(options.seed).exponential(1 / rate, number).cumsum()
    runs = {}
    for name, reuse in methods.items():
        runs[name] = settled(functools.partial(bench.once, workload, reuse, due), reuse.method)
        print(f"{rate:.3f}/s, {name}: TTFT p50 {np.median([t.ttft for t in runs[name]]):.2f} s", flush=True)
    return rate, runs


# The results -----------------------------------------------------------------------------------------------


def table(measured: dict[str, dict[str, tuple[float, str]]]) -> str:
    """A Markdown table with a line for each method."""
    heading = ["method", "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms", "generated, tokens/s"]
    heading += ["prompt, tokens/s", "goodput, 1/s", *map(words_of, KINDS), "computed"]
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)]]
    for method, found in measured.items():
        ttft = " / ".join(f"{found[f'TTFT p{p}'][0]:.2f}" for p in PERCENTILES)
        gaps = " / ".join(f"{found[f'ITL p{p}'][0]:.0f}" for p in PERCENTILES)
        rates = [f"{found[name][0]:.1f}" for name in ("generated", "prompt")]
        shares = [f"{found[name][0]:.0%}" for name in (*map(words_of, KINDS), "computed")]
        lines.append([method, ttft, gaps, *rates, f"{found['goodput'][0]:.2f}", *shares])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(runs: dict[str, dict[str, list[Timeline]]], path: Path, title: str) -> None:
    """Plot the cumulative distributions of TTFT and of the time between tokens, for each workload."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")  # draws to files, so it needs no screen
    size = (max(4 * len(runs), 7), 6)
    figure, axes = plt.subplots(2, len(runs), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for (name, by_method), (above, below) in zip(runs.items(), axes.T, strict=True):
        for method, timelines in by_method.items():
            above.ecdf([timeline.ttft for timeline in timelines], label=method)
            below.ecdf([1e3 * gap for timeline in timelines for gap in timeline.gaps], label=method)
        above.set(title=name, xlabel="TTFT, s", ylabel="requests")
        below.set(xlabel="time between tokens, ms", ylabel="tokens")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def save(options: argparse.Namespace, rates: dict[str, float], runs: dict[str, dict[str, list[Timeline]]]) -> None:
    """Print the tables; write the rows and the plot."""
    limits = options.ttft_limit, options.itl_limit
    about = {"bench": "serving", "model": options.model} | provenance(options.tensor_parallel)
    rows, tables = [], []
    for name, by_method in runs.items():
        measured = {method: figures(timelines, *limits) for method, timelines in by_method.items()}
        tables.append(f"\n## {name}, {rates[name]:.2f} requests a second\n\n{table(measured)}")
        rows += [
            {"work": f"{name}: {what}", "implementation": method, "figure": float(f"{figure:.5g}"), "unit": unit}
            for method, found in measured.items()
            for what, (figure, unit) in found.items()
        ]
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "note", "rate")}
    settings["workloads"] = list(runs)
    content = about | {"note": options.note, "settings": settings, "rates": rates, "rows": rows}
    title = f"{options.model}, {about['device']}: {options.requests} requests of {options.length} tokens"
    path = write_json(content, RESULTS)
    print("".join(tables))
    if importlib.util.find_spec("matplotlib"):
        plot(runs, path.with_suffix(".png"), title)


def main() -> None:
    if any(argument.partition("=")[0] == "--device-model" for argument in sys.argv[1:]):
        importlib.import_module("bench_load").main()  # over HTTP
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="a checkpoint, or a named configuration for random weights")
    add("--dtype", default="float32")
    add("--workloads", nargs="+", default=["chat", "rag", "agents"], choices=list(WORKLOADS))
    add("--methods", nargs="+", default=list(METHODS), help="NAME or NAME:FIELD=VALUE:...")
    add("--requests", type=count, default=16)
    add("--length", type=count, default=800, help="tokens of a prompt's body")
    add(
        "--pieces",
        type=count,
        default=4,
        help="documents of a question, agents of a group, turns of a chat, conversations at a time; 2 or more",
    )
    add("--new-tokens", type=count, default=16)
    add("--rate", type=positive, help="requests a second")
    add("--load", type=positive, default=0.7, help="without --rate: share of what full recompute sustains")
    add("--ttft-limit", type=positive, default=2.0, help="seconds, for goodput")
    add("--itl-limit", type=positive, default=0.1, help="seconds, for goodput")
    add("--store-tokens", type=count, default=32768)
    add("--max-num-seqs", type=count, default=8)
    add("--seed", type=int, default=0)
    add("--note", help="what a reader of the tables must know")
    add_tensor_parallel(parser)
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: one token has no time to the next")
    methods = {name: parse_method(name) for name in options.methods}
    sizes = {"dtype": options.dtype, "store_tokens": options.store_tokens, "max_num_seqs": options.max_num_seqs}
    sizes["frozen_limit"] = 0.9  # of what a workload stores
    sizes["max_waiting"] = max(options.requests, EngineConfig.max_waiting)
    engine, tokenizer = load_engine(options.model, tensor_parallel=options.tensor_parallel, **sizes)
    bench = Bench(engine, options.new_tokens)
    rates: dict[str, float] = {}
    runs: dict[str, dict[str, list[Timeline]]] = {}
    for name in options.workloads:
        workload = make_workload(
            name, tokenizer, WorkloadSize(options.requests, options.length, options.pieces), options.seed
        ).within(engine.model.vocab_size)
        rates[name], runs[name] = compare(bench, workload, methods, options)
        save(options, rates, runs)  # so that it is there if a later workload fails


if __name__ == "__main__":
    run_script(main)
