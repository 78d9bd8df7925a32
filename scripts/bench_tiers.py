"""Measures what a tier below the store is worth: sessions that come back after others had the store.

    python scripts/bench_tiers.py [--model llama-3.1-8b] [--sessions 16] [--length 16384] [--room 8] [--tiers 0 1.25]

The weights are random, since the figures depend on shapes alone. Sessions come in turn with a prompt each, and the
store has room for some of them only. Then they all come back with a few tokens more, in the same order, so that each
finds that the others have had its pages. A tier is given as a share of what all sessions have; 0 is none. For each one:
the median time to the first token of those who come, and of those who come back, in milliseconds, and how many tokens
were loaded for them. Prints a line for each and writes `scripts/results/tiers-<model>-<device>.json`.
"""

import argparse
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.model.sharding import make_mesh

RESULTS = Path(__file__).resolve().parent / "results"
NEW = 64  # tokens that a session comes back with
SAMPLING = SamplingParams(max_new_tokens=4)


def measure(args: argparse.Namespace, share: float) -> Iterator[dict[str, object]]:
    """The rows of one tier."""
    model, mesh = named_config(args.model), make_mesh(args.tensor_parallel)
    page = 64
    store = args.room * -(-(args.length + NEW + 2 * page) // page) * page
    probe = Engine.from_config(model, mesh=mesh, store_tokens=page, choose="always").runner.store
    needed = args.sessions * args.length * probe.nbytes // page
    del probe
    host = int(share * needed)
    engine = Engine.from_config(model, mesh=mesh, store_tokens=store, host_store_bytes=host, choose="always")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, model.vocab_size, args.length).astype(np.int32) for _ in range(args.sessions)]
    reuse = ReuseConfig("prefix")
    if engine.admission.tiers is not None:
        engine.admission.tiers.warm_up()
    warm_up(engine, args, rng)
    for when in ("first", "back"):
        reports = []
        for prompt in prompts:
            own = prompt if when == "first" else np.append(prompt, rng.integers(1, 99, NEW)).astype(np.int32)
            reports.append(engine.generate(own, SAMPLING, reuse=reuse).report)
        row = {"work": f"{when}, tier {share:g}", "implementation": "engine", "unit": "ms"}
        seconds = [report.ttft_s for report in reports]
        loaded = round(statistics.mean(report.restored_tokens for report in reports))
        yield row | {"figure": 1e3 * statistics.median(seconds), "worst": 1e3 * max(seconds), "loaded_tokens": loaded}
    engine.close()


def warm_up(engine: Engine, args: argparse.Namespace, rng: np.random.Generator) -> None:
    """Compile: a session that comes, and comes back after its pages were evicted."""
    for _ in range(2):
        for seed in range(args.room + 1):
            prompt = np.random.default_rng([7, seed]).integers(1, 99, args.length).astype(np.int32)
            engine.generate(np.append(prompt, rng.integers(1, 99, NEW)), SAMPLING, reuse=ReuseConfig("prefix"))


def main() -> None:
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m" if small else "llama-3.1-8b")
    parser.add_argument("--sessions", type=count, default=6 if small else 16)
    parser.add_argument("--length", type=count, default=512 if small else 16384)
    parser.add_argument("--room", type=count, default=3 if small else 8, help="sessions that the store has room for")
    parser.add_argument(
        "--tiers", type=float, nargs="+", default=[0, 0.25, 1.5], help="shares of what all sessions have"
    )
    add_tensor_parallel(parser)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "model"}
    about = {"bench": "tiers", "model": args.model} | provenance(args.tensor_parallel)
    print(write_rows(about | {"settings": options}, all_rows(args), RESULTS))


def all_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    for share in args.tiers:
        for row in measure(args, share):
            told = f"{row['work']:24}{row['figure']:10.1f} ms, worst {row['worst']:.1f}, loaded {row['loaded_tokens']}"
            print(told, flush=True)
            yield row
        gc.collect()


if __name__ == "__main__":
    run_script(main)
