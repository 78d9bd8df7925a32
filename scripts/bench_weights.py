"""Measures decode with weights of each kind: bfloat16, fp8, int8, and the Q8_0 and Q4_K of GGUF files.

    python scripts/bench_weights.py [--model llama-3.1-8b] [--context 8192] [--requests 1] [--only bfloat16 fp8]

The weights are random, since the figures depend on shapes alone; embeddings and the head stay in bfloat16. A kind at a
time is on the device. The time of a step is the additional time of 128 tokens, beside the time that its bytes take at
the bandwidth of a copy; `gb_per_s` is the bytes of a step over its time. Beside them stand the bytes of all weights,
and a prefill of the context, which multiplies floats whatever the weights are kept in. Prints a line for each kind and
writes `weights-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_e2e import copy_rate, decode, decode_bytes

from sparsex_jax import Engine, EngineConfig, ReuseConfig
from sparsex_jax.config import named_config
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.matrices import random_quantised
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params

RESULTS = Path(__file__).resolve().parent / "results"
FLOATS = "bfloat16"
KINDS = (FLOATS, "fp8", "int8", "q8_0", "q4_k")


def load(args: argparse.Namespace, kind: str) -> Engine:
    """An engine with random weights of a kind, and a store for the requests."""
    model, mesh = named_config(args.model), make_mesh()
    tokens = args.requests * (args.context + 512)
    config = EngineConfig(
        dtype=FLOATS, choose="always", store_tokens=2 * tokens, max_num_seqs=args.requests, max_prefill_seqs=1
    )
    about = model, FLOATS, mesh
    params = random_params(*about) if kind == FLOATS else random_quantised(*about, kind)
    return Engine(model, params, config=config, mesh=mesh)


def prefill_milliseconds(engine: Engine, context: int, runs: int) -> float:
    """The median time to the first token of one prompt, without the run that compiles."""
    prompt = np.random.default_rng(0).integers(1, engine.model.vocab_size, context)
    full = ReuseConfig("full")
    reports = [engine.prefill(prompt, reuse=full, keep=False).report for _ in range(runs + 1)][1:]
    return 1e3 * statistics.median(report.ttft_s for report in reports)


def measure(args: argparse.Namespace, kind: str, rate: float) -> dict[str, Any]:
    """One kind's figures."""
    engine = load(args, kind)
    row = decode(engine, args.context, args.requests, rate)
    read = decode_bytes(engine, args.requests * (args.context + 80))
    return {
        "work": row.work,
        "implementation": kind,
        "figure": row.figure,
        "unit": row.unit,
        "bound": row.bound,
        "read_bytes": read,
        "gb_per_s": read / row.figure / 1e6,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.params)),
        "prefill_ms": prefill_milliseconds(engine, args.context, args.runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="of the prefill")
    parser.add_argument("--only", nargs="+", default=[*KINDS], choices=KINDS, help="which kinds")
    args = parser.parse_args()
    rate, rows = copy_rate(), []
    print(f"a copy reads and writes {rate / 1e9:.0f} GB/s", flush=True)
    for kind in args.only:
        row = measure(args, kind, rate)
        rows.append(row)
        row["speedup"] = rows[0]["figure"] / row["figure"]
        print(
            f"{kind:10}{row['figure']:8.3f} ms a step, bound {row['bound']:.3f}, {row['gb_per_s']:.0f} GB/s, "
            f"{row['speedup']:.2f} times {args.only[0]}; weights {row['weight_bytes'] / 1e9:.2f} GB, "
            f"prefill {row['prefill_ms']:.0f} ms",
            flush=True,
        )
    options = {name: value for name, value in vars(args).items() if name != "model"}
    about = {"bench": "weights", "model": Path(args.model).name} | provenance()
    print(write_json(about | {"settings": options, "copy_gb_per_s": rate / 1e9, "rows": rows}, RESULTS))


if __name__ == "__main__":
    main()
