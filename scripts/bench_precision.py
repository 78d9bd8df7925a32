"""Measures memory and speed by the precision of weights and KV: bfloat16, fp8, int8 and GGUF's blocks, in one run.

    python scripts/bench_precision.py [--model llama-3.1-8b] [--only fp8/bfloat16 fp8/fp8] [--parts memory decode]
    python scripts/bench_precision.py --model FILE.gguf --only bfloat16/bfloat16 stored/bfloat16

A case is WEIGHTS/KV. One of them is on the device at a time. The weights of a named configuration are random, since the
figures depend on shapes alone; embeddings and the head stay in bfloat16. Those of a file are the file's: `stored` keeps
its blocks, and the other kinds round them.

* memory: the bytes of all weights, of the store, and of a token in it. `in use` is what the device says of its memory.
* decode: milliseconds of a step, the additional time of 128 tokens, beside the time that its bytes take at the
  bandwidth of a copy (`bound`).
* prefill: the median time to the first token of a prompt. Products of many rows are of floats, whatever weights are.

Prints a line for each figure and writes `precision-<model>-<device>.json` to --output, after each case.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from bench_e2e import Row, copy_rate, decode

from sparsex_jax import Engine, EngineConfig, ReuseConfig
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.matrices import random_quantised
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params

RESULTS = Path(__file__).resolve().parent / "results"
FLOATS, STORED = "bfloat16", "stored"
WEIGHTS = (FLOATS, "fp8", "int8", "q8_0", "q4_k", STORED)
KV = (FLOATS, "fp8")
PARTS = ("memory", "decode", "prefill")
BESIDE = 512  # tokens of the store for each context: new tokens, and what does not fill a page


class Case(NamedTuple):
    """The precision of weights and of KV."""

    weights: str
    kv: str

    @classmethod
    def of(cls, text: str) -> "Case":
        weights, _, kv = text.partition("/")
        if weights not in WEIGHTS or kv not in KV:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be one of {', '.join(WEIGHTS)}, a slash, and {' or '.join(KV)}"
            )
        return cls(weights, kv)

    def __str__(self) -> str:
        return "/".join(self)


CASES = [Case.of(each) for each in ("bfloat16/bfloat16", "fp8/bfloat16", "int8/bfloat16", "q4_k/bfloat16")]
CASES += [Case.of(each) for each in ("bfloat16/fp8", "fp8/fp8")]


def engine_options(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """A store for the requests that decode together, and for one prompt beside them."""
    tokens = (max(options.requests) + 1) * (options.context + BESIDE)
    about = {"store_tokens": tokens, "max_num_seqs": max(options.requests), "max_prefill_seqs": 1}
    return about | {"dtype": FLOATS, "kv_dtype": "auto" if case.kv == FLOATS else case.kv, "choose": "always"}


def load(options: argparse.Namespace, case: Case) -> Engine:
    about, mesh = engine_options(options, case), make_mesh(options.tensor_parallel)
    if options.model.endswith(".gguf"):
        quantization = "none" if case.weights == FLOATS else case.weights
        return Engine.from_pretrained(options.model, mesh=mesh, quantization=quantization, **about)
    model = named_config(options.model)
    shapes = model, FLOATS, mesh
    params = random_params(*shapes) if case.weights == FLOATS else random_quantised(*shapes, case.weights)
    return Engine(model, params, config=EngineConfig(**about), mesh=mesh)


def memory(engine: Engine, case: Case) -> Iterator[Row]:
    weights, store = engine.runner.params, engine.runner.store
    figures = {"weights": nbytes(weights) / 1e9, "store": nbytes(store) / 1e9}
    in_use = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    if in_use is not None:
        figures["in use"] = in_use / 1e9
    for work, gigabytes in figures.items():
        yield Row(work, str(case), gigabytes, "GB")
    yield Row("KV of a token", str(case), nbytes(store) / engine.config.store_tokens / 2**10, "KiB")


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def prefill(engine: Engine, case: Case, context: int, runs: int) -> Row:
    """The median of some runs behind the one that compiles."""
    prompt = np.random.default_rng(0).integers(1, engine.model.vocab_size, context)
    full = ReuseConfig("full")
    reports = [engine.prefill(prompt, reuse=full, keep=False).report for _ in range(runs + 1)][1:]
    return Row(f"prefill, {context}", str(case), 1e3 * statistics.median(report.ttft_s for report in reports), "ms")


def measure(options: argparse.Namespace, case: Case, rate: float) -> Iterator[Row]:
    """One case's figures."""
    engine = load(options, case)
    if "memory" in options.parts:
        yield from memory(engine, case)
    for requests in options.requests if "decode" in options.parts else []:
        row = decode(engine, options.context, requests, rate)
        yield Row(row.work, str(case), row.figure, row.unit, row.bound)
    if "prefill" in options.parts:
        yield prefill(engine, case, options.context, options.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a named configuration, or a GGUF file")
    parser.add_argument("--context", type=count, default=8192)
    parser.add_argument("--requests", type=count, nargs="+", default=[1, 8], help="decoded together")
    parser.add_argument("--runs", type=count, default=3, help="of the prefill")
    parser.add_argument("--only", type=Case.of, nargs="+", default=CASES, metavar="WEIGHTS/KV")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_tensor_parallel(parser)
    options = parser.parse_args()
    about = {"bench": "precision", "model": Path(options.model).name} | provenance(options.tensor_parallel)
    settings = {"context": options.context, "runs": options.runs}
    rate, rows = copy_rate() * options.tensor_parallel, []
    for case in options.only:
        for row in measure(options, case, rate):
            print(row, flush=True)
            rows.append({"work": row.work, "implementation": row.implementation, "figure": row.figure})
            rows[-1] |= {"unit": row.unit, "bound": row.bound}
        path = write_json(about | {"settings": settings, "copy_gb_per_s": rate / 1e9, "rows": rows}, options.output)
    print(path)


if __name__ == "__main__":
    run_script(main)
