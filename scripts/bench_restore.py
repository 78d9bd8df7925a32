"""Measures how long a stored prefix takes to be back in the store: computed, loaded, and both at once.

    python scripts/bench_restore.py [--model llama-3.1-8b] [--lengths 8192 32768] [--rates 1.25 5 10]

The weights are random, since the figures depend on shapes alone. A prefix is computed once and spilled to host memory.
Then it is restored into other pages: all of it computed; all of it loaded; and as the engine does it, computed from the
front and loaded from the back. Each is the median of some runs, in milliseconds, until the store is ready; beside it
stands what was predicted when the last run began. A rate in GB/s throttles the link: what arrives earlier counts as
arriving later. The rate 0 is the link as it is; `equal`, the default on a CPU, one at which loading takes as long as
computing. Prints a line for each and writes `scripts/results/restore-<model>-<device>.json`.
"""

import argparse
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsex_jax import Engine
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.link import HostBlock, Link
from sparsex_jax.device.restoration import Chunk, Restoration, Step
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.reuse.pace import Pace
from sparsex_jax.reuse.staircase import Costs, Staircase
from sparsex_jax.tiers.blocks import BLOCK_PAGES

RESULTS = Path(__file__).resolve().parent / "results"
COMPUTED, LOADED, BOTH = "computed", "loaded", "both at once"


class Row(NamedTuple):
    """One figure, and what was predicted."""

    work: str
    implementation: str
    figure: float
    unit: str
    predicted: float | None = None

    def __str__(self) -> str:
        predicted = "" if self.predicted is None else f"  predicted {self.predicted:.1f}"
        return f"{self.work:44}{self.implementation:28}{self.figure:10.1f} {self.unit}{predicted}"


class LoadsOnly(Restorer):
    """Computes nothing that is stored."""

    def _plan(self, restoration: Restoration) -> None:
        costs = Costs(restoration.predicted, self._load_costs(restoration))
        nothing = Staircase.of([0] * len(costs.load), costs)
        restoration.height, restoration.expected_seconds = nothing.heights(costs.num_chunks), nothing.load_seconds

    def _late_step(self, restoration: Restoration) -> Step | None:
        return None


class Bench:
    """A prefix of random tokens whose KV is in host memory, and pages to restore it into.

    Attributes:
      blocks: of the prefix.
      nbytes: of them all.
    """

    def __init__(self, engine: Engine, length: int, groups: int) -> None:
        self.engine, self.runner, self.groups = engine, engine.runner, groups
        self.tokens = np.random.default_rng(length).integers(1, engine.model.vocab_size, length).astype(np.int32)
        self.pages = list(range(-(-length // engine.config.page_size)))
        self.pace(0.0)  # measures the speeds
        self.restore(Restorer, None, 0.0)
        link = self.link(0.0)
        runs = [self.pages[at : at + BLOCK_PAGES] for at in range(0, len(self.pages), BLOCK_PAGES)]
        self.blocks = [link.spill(self.runner.store, run) for run in runs]
        for block in self.blocks:
            block.wait()
        self.nbytes = sum(block.nbytes for block in self.blocks)

    def link(self, rate: float) -> Link:
        bytes_per_s = 1e9 * rate if rate else None
        return Link(
            self.engine.model, self.engine.config, self.engine.mesh, num_groups=self.groups, bytes_per_s=bytes_per_s
        )

    def pace(self, rate: float) -> Pace:
        """What is known of the speeds, and the link's as told; a guess where it is not throttled."""
        speeds = self.engine.admission.choice.speeds
        return Pace(speeds, 1e9 * (rate or 10.0), known=bool(rate))

    def chunks(self, blocks: Sequence[HostBlock] | None) -> list[Chunk]:
        size = BLOCK_PAGES * self.engine.config.page_size
        starts = range(0, len(self.tokens), size)
        stored = blocks or [None] * len(starts)
        return [
            Chunk(start, min(start + size, len(self.tokens)), block)
            for start, block in zip(starts, stored, strict=True)
        ]

    def restore(self, kind: type[Restorer], blocks: Sequence[HostBlock] | None, rate: float, runs: int = 1) -> Row:
        """Restore it once more than asked; the first time compiles and learns."""
        restorer = kind(self.runner, self.link(rate), self.pace(rate))
        taken = []
        for _ in range(runs + 1):
            jax.block_until_ready(self.runner.store)
            while restorer.traffic.flights:  # what was overtaken is still on the link
                restorer.traffic.take_arrived()
            began = time.perf_counter()
            restoration = restorer.begin(self.tokens, self.pages, self.chunks(blocks))
            while restorer.pump(wait=0.01):
                pass
            jax.block_until_ready(self.runner.store)
            taken.append(time.perf_counter() - began)
            if restoration.error is not None:
                raise restoration.error
        self.last = restoration
        work = f"{len(self.tokens)} tokens"
        return Row(work, "", 1e3 * statistics.median(taken[1:]), "ms", 1e3 * restoration.expected_seconds)


def rows_of(bench: Bench, rates: Sequence[str], runs: int) -> Iterator[Row]:
    computed = bench.restore(Restorer, None, 0.0, runs)
    yield computed._replace(implementation=COMPUTED)
    for rate in rates:
        number = bench.nbytes / computed.figure / 1e6 if rate == "equal" else float(rate)
        link = f"link throttled to {number:.3g} GB/s" if number else "link as it is"
        for name, kind in ((LOADED, LoadsOnly), (BOTH, Restorer)):
            row = bench.restore(kind, bench.blocks, number, runs)
            yield row._replace(work=f"{row.work}, {link}", implementation=name)
            if kind is Restorer:
                loaded = bench.last.counts.loaded_bytes / bench.nbytes
                yield Row(f"{row.work}, {link}", "share that was loaded", 100 * loaded, "%")


def rate_of(text: str) -> str:
    """A rate as it was given. Raises ArgumentTypeError if it is none."""
    if text != "equal" and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of GB/s, or `equal`")
    return text


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    on_cpu = jax.devices()[0].platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m" if on_cpu else "llama-3.1-8b", help="a named configuration")
    add("--dtype", default="float32" if on_cpu else "bfloat16")
    add("--lengths", type=count, nargs="+", default=[4096] if on_cpu else [8192, 32768])
    add("--rates", nargs="+", type=rate_of, default=["equal"] if on_cpu else ["1.25", "5", "10", "0"], help="in GB/s")
    add("--page-size", type=count, default=16 if on_cpu else 64)
    add("--groups", type=count, default=4, help="of layers that are loaded apart")
    add("--runs", type=count, default=3)
    add_tensor_parallel(parser)
    options = parser.parse_args(arguments)
    store = {"store_tokens": max(options.lengths) + options.page_size, "page_size": options.page_size}
    engine = make_engine(options.model, tensor_parallel=options.tensor_parallel, dtype=options.dtype, **store)
    about: dict[str, Any] = {"bench": "restore", "model": options.model} | provenance(options.tensor_parallel)
    print(write_rows(about | {"settings": vars(options)}, all_rows(engine, options), folder))


def all_rows(engine: Engine, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for length in options.lengths:
        for row in rows_of(Bench(engine, length, options.groups), options.rates, options.runs):
            print(row, flush=True)
            yield row._asdict()


if __name__ == "__main__":
    run_script(main)
