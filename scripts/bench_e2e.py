"""How long the first token takes with and without reuse, and how fast decode is, at the size of a real model.

    python scripts/bench_e2e.py [--model llama-3.1-8b] [--lengths 8192 32768] [--segments 16] [--reused 0.95]

Random weights in bfloat16: the figures depend on shapes alone. A prompt is so many stored segments with fresh text
between and behind them. A figure is the median of some runs after one that compiles. Beside each stands what the work
predicts: the share of token-layers computed, of full recompute's time. Writes `e2e-<model>-<device>.json` to
`scripts/results`.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.eval.results import provenance, write_json

RESULTS = Path(__file__).resolve().parent / "results"
FULL = "full"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure, and what the work alone predicts."""

    work: str
    implementation: str
    figure: float
    unit: str
    predicted: float | None = None
    computed: float | None = None  # token-layers, of all

    def __str__(self) -> str:
        beside = f"predicted {self.predicted:9.1f}, work {self.computed:.3f}" if self.predicted else ""
        return f"{self.work:42}{self.implementation:28}{self.figure:10.1f} {self.unit:10}{beside}"


def methods(num_layers: int) -> dict[str, ReuseConfig]:
    """Full recompute first. Boundaries at 0, 10 % and 20 % of the layers, and a second one in the middle."""
    tenth = round(num_layers / 10)
    return {
        FULL: ReuseConfig(FULL),
        "naive": ReuseConfig("naive"),
        "sparsex l*=0, 5 %": ReuseConfig(boundary_layer=0, recompute_ratio=0.05),
        f"sparsex l*={tenth}, 15 %": ReuseConfig(boundary_layer=tenth),
        f"sparsex l*={2 * tenth}, 15 %": ReuseConfig(boundary_layer=2 * tenth),
        f"sparsex l*={tenth}, then {num_layers // 2}": ReuseConfig(
            boundary_layer=tenth, second_boundary=num_layers // 2
        ),
    }


def make_prompt(engine: Engine, length: int, segments: int, reused: float, rng: np.random.Generator) -> np.ndarray:
    """Stored segments with fresh tokens before and behind each; the namespace is the length's."""
    vocabulary = engine.model.vocab_size
    each = int(length * reused) // segments
    stored = [rng.integers(1, vocabulary, each) for _ in range(segments)]
    for segment in stored:
        engine.remember(segment, namespace=str(length))
    fresh = np.array_split(rng.integers(1, vocabulary, length - each * segments), segments + 1)
    pieces = [piece for pair in zip(fresh, stored, strict=False) for piece in pair]
    return np.concatenate([*pieces, fresh[-1]]).astype(np.int32)


def first_tokens(engine: Engine, length: int, options: argparse.Namespace) -> Iterator[Row]:
    prompt = make_prompt(engine, length, options.segments, options.reused, np.random.default_rng(length))
    work = f"{length} tokens, {options.reused:.0%} reused in {options.segments}"
    full = None
    for name, reuse in methods(engine.model.num_layers).items():
        reports = [
            engine.prefill(prompt, reuse=reuse, namespace=str(length), keep=False).report
            for _ in range(options.runs + 1)
        ][1:]
        milliseconds = 1e3 * statistics.median(report.ttft_s for report in reports)
        full = full or milliseconds
        computed = reports[0].computed_fraction
        yield Row(f"TTFT, {work}", name, milliseconds, "ms", full * computed, computed)


def decode(engine: Engine, context: int, requests: int, options: argparse.Namespace) -> Row:
    """Milliseconds of a step, from how much longer 128 more tokens take; no reuse, the prompts are prefixes."""
    rng = np.random.default_rng(context)
    prompts = [rng.integers(1, engine.model.vocab_size, context) for _ in range(requests)]
    for prompt in prompts:
        engine.remember(prompt, namespace="decode")
    taken = {}
    for new in (16, 144, 16, 144):
        begin = time.perf_counter()
        sampling = SamplingParams(new, ignore_eos=True)
        engine.generate_batch(prompts, sampling, reuse=ReuseConfig("prefix"), namespace="decode", keep=False)
        taken[new] = time.perf_counter() - begin
    return Row(f"decode, {requests} x {context}", "prefix", 1e3 * (taken[144] - taken[16]) / 128, "ms a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-3.1-8b", help="a named configuration")
    add("--dtype", default="bfloat16")
    add("--lengths", type=int, nargs="+", default=[8192, 32768])
    add("--segments", type=int, default=16)
    add("--reused", type=float, default=0.95, help="share of the prompt that is stored")
    add("--runs", type=int, default=3)
    add("--decode", type=int, nargs="*", default=[1, 8], help="requests decoded together")
    add("--context", type=int, default=8192, help="tokens before each decoded request")
    options = parser.parse_args()
    needed = max(3 * max(options.lengths), 2 * (options.context + 256) * max(options.decode, default=0))
    engine = Engine.from_config(
        options.model, dtype=options.dtype, store_tokens=needed, max_batch=max(options.decode, default=1)
    )
    rows = []
    for length in options.lengths:
        for row in first_tokens(engine, length, options):
            print(row, flush=True)
            rows.append(row)
    for requests in options.decode:
        rows.append(decode(engine, options.context, requests, options))
        print(rows[-1], flush=True)
    about = {"bench": "e2e", "model": options.model} | provenance()
    write_json(about | {"rows": [dataclasses.asdict(row) for row in rows]}, RESULTS)


if __name__ == "__main__":
    main()
