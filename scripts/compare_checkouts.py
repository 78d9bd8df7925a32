"""Time to first token of two checkouts of this repository, turn and turn about in one process on one device.

    git worktree add ../before <commit>
    python scripts/compare_checkouts.py ../before . [--model llama-3.1-8b] [--lengths 4096 8192 16384 32768]

Two runs of a bench on two days, or in two processes, differ by a few percent on the same code. Here each prompt is
prefilled by one checkout and then by the other, so both see the same clocks, the same memory and the same host. Random
weights in bfloat16, held twice. Writes `checkouts-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

OURS = ("sparsex_jax", "sparsex_kernels", "bench_e2e")
RESULTS = Path(__file__).resolve().parent / "results"


class Checkout(NamedTuple):
    """One checkout's code, imported beside the other's, and an engine of it."""

    name: str
    bench: Any
    package: Any
    engine: Any
    commit: str


def load(name: str, tree: Path, model: str, lengths: list[int]) -> Checkout:
    """Import a checkout under the names that the other one has had, and make its engine."""
    for module in [module for module in sys.modules if module.partition(".")[0] in OURS]:
        del sys.modules[module]
    places = [str(tree), str(tree / "kernels"), str(tree / "scripts")]
    sys.path[:0] = places
    import bench_e2e

    import sparsex_jax

    shapes = dataclasses.replace(bench_e2e.named_config(model), max_position=max(lengths))
    # The pieces and the prefix of one length, and a prompt that runs; what is older is evicted.
    engine = sparsex_jax.Engine.from_config(shapes, dtype="bfloat16", store_tokens=3 * max(lengths) + 4096)
    del sys.path[: len(places)]
    if not Path(sparsex_jax.__file__).is_relative_to(tree):
        raise SystemExit(f"{tree} was to be imported, but {sparsex_jax.__file__} was")
    return Checkout(name, bench_e2e, sparsex_jax, engine, commit_of(tree))


def commit_of(tree: Path) -> str:
    done = subprocess.run(["git", "-C", tree, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def methods(reuse: Any) -> dict[str, Any]:
    """By a checkout's own `ReuseConfig`."""
    asked = {
        "full": reuse("full"),
        "naive": reuse("naive"),
        "sparsex l*=0, 5 %": reuse(boundary_layer=0, recompute_ratio=0.05),
        "sparsex l*=3, 15 %": reuse(boundary_layer=3, recompute_ratio=0.15),
        "focus, 5 %": reuse("focus", recompute_ratio=0.05),
        "prefix, 95 %": reuse("prefix"),
    }
    return {name: each.updated(only_if_faster=False) for name, each in asked.items()}


def compare(checkouts: list[Checkout], length: int, runs: int) -> Iterator[dict[str, Any]]:
    """A row a method: the median and the least of some runs, in milliseconds, after one that compiles."""
    prompts = {each.name: prompts_of(each, length) for each in checkouts}
    for case in methods(checkouts[0].package.ReuseConfig):
        taken: dict[str, list[float]] = {each.name: [] for each in checkouts}
        for _ in range(runs + 1):
            for each in checkouts:
                prompt, namespace = prompts[each.name][case == "prefix, 95 %"]
                reuse = methods(each.package.ReuseConfig)[case]
                out = each.engine.prefill(prompt, reuse=reuse, namespace=namespace, keep=False)
                taken[each.name].append(1e3 * out.report.ttft_s)
        row: dict[str, Any] = {"tokens": length, "method": case}
        for name, milliseconds in taken.items():
            row |= {f"{name}_ms": statistics.median(milliseconds[1:]), f"{name}_least_ms": min(milliseconds[1:])}
        yield row | {"ratio": row["after_ms"] / row["before_ms"]}


def prompts_of(checkout: Checkout, length: int) -> list[tuple[np.ndarray, str]]:
    """With their namespaces: 95 % of the tokens stored in 16 pieces, and 95 % of them stored as a prefix."""
    pieces = checkout.bench.make_prompt(checkout.engine, length, 16, 0.95, f"pieces {length}")
    cut = int(0.95 * length)
    prefixed = np.concatenate([pieces[:cut], np.arange(1, length - cut + 1)]).astype(np.int32)
    checkout.engine.remember(prefixed[:cut], namespace=f"prefix {length}")
    return [(pieces, f"pieces {length}"), (prefixed, f"prefix {length}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b", help="a named configuration")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    trees = {"before": options.before.resolve(), "after": options.after.resolve()}
    checkouts = [load(name, tree, options.model, options.lengths) for name, tree in trees.items()]
    device = jax.devices()[0].device_kind
    about = {
        "bench": "checkouts",
        "model": options.model,
        "command": " ".join(["python", "scripts/compare_checkouts.py", *sys.argv[1:]]),
        "device": device,
        "versions": {"jax": jax.__version__},
        "commits": {each.name: each.commit for each in checkouts},
    }
    rows = []
    for length in options.lengths:
        for row in compare(checkouts, length, options.runs):
            print(json.dumps(row), flush=True)
            rows.append(row)
            path = RESULTS / f"checkouts-{options.model}-{'-'.join(device.lower().split())}.json"
            path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
