"""Measures one layer of a mixture of experts on this device: many rows against a dense product, few against bytes.

    python scripts/bench_experts.py [--model NAME] [--rows 8192] [--sequences 8] [--only SUBSTRING]

By default a layer of Qwen3-30B-A3B: 128 experts of width 768, 8 for each row, hidden size 2048, in bfloat16. Prints a
table while it runs, and writes `scripts/results/experts-<device>.json`. A figure is the median of five calls, each of
which repeats the work many times on the device, one repetition after the other.

`share` is a figure beside its floor: of many rows, the rate beside that of an MLP with as many operations; of few, the
bytes of the experts that were chosen in a second, beside those that a copy moves. Rows are routed at random, and what
is measured includes the router, laying the rows out in tiles, and adding up the results.
"""

import argparse
import dataclasses
import functools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import Row, after, median_seconds

from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import ModelConfig, named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.model.experts import ExpertStacks, Routing, route, run_experts
from sparsex_kernels.backend import Backend, prefer
from sparsex_kernels.grouped_linear import IMPLEMENTATIONS

RESULTS = Path(__file__).resolve().parent / "results"
FLOORS = ("dense", "copy")
LAYERS = 2  # of the stacks, of which one is used


class Layer(NamedTuple):
    """The weights of one layer's experts, among those of others."""

    router: jax.Array
    stacks: ExpertStacks


def make_layer(model: ModelConfig) -> Layer:
    hidden, width, experts = model.hidden_size, model.intermediate_size, model.num_experts
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    stacks = [
        jax.random.normal(key, (LAYERS, experts, *shape), jnp.bfloat16) * shape[0] ** -0.5
        for key, shape in zip(keys, shapes, strict=False)
    ]
    router = jax.random.normal(keys[3], (hidden, experts), jnp.bfloat16) * hidden**-0.5
    return Layer(router, ExpertStacks(*stacks))


def inputs(model: ModelConfig, rows: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, model.hidden_size), jnp.bfloat16)


def chosen_bytes(model: ModelConfig, routing: Routing) -> int:
    """Of the weights of the experts that any row has chosen."""
    return len(np.unique(routing.experts)) * 3 * model.hidden_size * model.intermediate_size * 2


def dense(model: ModelConfig, rows: int) -> Row:
    """The same number of operations as one MLP: gate, up and down of the width of a row's experts together."""
    x, width = inputs(model, rows), model.mlp_width
    up = jax.random.normal(jax.random.key(2), (model.hidden_size, 2 * width), jnp.bfloat16)
    down = jax.random.normal(jax.random.key(3), (width, model.hidden_size), jnp.bfloat16)

    def step(x: jax.Array, weights: Any) -> jax.Array:
        gate, up = jnp.split(x @ weights[0], 2, axis=1)
        return after(x, (jax.nn.silu(gate) * up) @ weights[1])

    return Row("dense", "xla", median_seconds(step, x, (up, down)), operations(model, rows))


def operations(model: ModelConfig, rows: int) -> float:
    return 2.0 * 3 * rows * model.hidden_size * model.mlp_width


def copy() -> Row:
    x = jax.random.normal(jax.random.key(0), (1 << 28,), jnp.bfloat16)
    return Row("copy", "xla", median_seconds(lambda x, scale: x * scale, x, jnp.bfloat16(1.01)), 0, 4 * x.size)


def experts(model: ModelConfig, layer: Layer, work: str, rows: int, implementation: str) -> Row:
    """The router, the experts and the sum of their results, for these rows."""
    x = inputs(model, rows)
    with prefer(implementation):
        backend = Backend.of(jax.devices()[0])

    def step(x: jax.Array, layer: Layer) -> jax.Array:
        routing = route(x, layer.router, model)
        return after(x, run_experts(x, routing, layer.stacks, 1, jnp.int32(rows), **whole(model), backend=backend))

    read = chosen_bytes(model, route(x, layer.router, model))
    return Row(work, implementation, median_seconds(step, x, layer), operations(model, rows), read)


def whole(model: ModelConfig) -> dict[str, int]:
    assert model.num_experts is not None
    return {"first": 0, "num_experts": model.num_experts}


def benches(model: ModelConfig, rows: int, sequences: int, names: list[str]) -> Iterator[tuple[str, Any]]:
    """The name and function of every row; the floors come first."""
    layer = make_layer(model)
    yield "dense", functools.partial(dense, model, rows)
    yield "copy", copy
    for name in names:
        yield f"{rows} rows", functools.partial(experts, model, layer, f"{rows} rows", rows, name)
        decode = f"decode of {sequences}"
        yield decode, functools.partial(experts, model, layer, decode, sequences, name)


def share_of(row: Row, floors: dict[str, Row]) -> float | None:
    """The row's rate as a share of its floor's: of bytes for decode, else of operations."""
    of_bytes = row.work.startswith("decode")
    floor = floors.get("copy" if of_bytes else "dense")
    return None if floor is None or row.work in FLOORS else row.rates[of_bytes] / floor.rates[of_bytes]


def show(row: Row, share: float | None) -> str:
    flops, moved = row.rates
    shown = "" if share is None else f"{share:8.0%}"
    name = f"{row.work:20}{row.implementation:10}{row.seconds * 1e3:10.3f} ms"
    return f"{name} {flops / 1e12:8.1f} TFLOP/s {moved / 1e12:8.3f} TB/s {shown}"


def implementations() -> list[str]:
    """Those that are made for this device, and XLA's. The reference copies a matrix for every tile."""
    return [*(name for name in Backend.of(jax.devices()[0]).kernels if name in IMPLEMENTATIONS), "xla"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a configuration by name, with experts")
    parser.add_argument("--experts", type=int, help="the number of experts, for a quick look at a smaller layer")
    parser.add_argument("--rows", type=count, default=8192)
    parser.add_argument("--sequences", type=count, default=8)
    parser.add_argument("--implementations", nargs="*", help="for instance: hopper xla ragged")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = named_config(options.model)
    if model.num_experts is None:
        parser.error(f"--model={options.model} has no experts")
    if options.experts is not None:
        model = dataclasses.replace(model, num_experts=options.experts)
    about = {"bench": "experts", "model": options.model} | provenance()
    about |= {"experts": model.num_experts, "sequences": options.sequences}
    print(write_rows(about, all_rows(model, options), options.output))


def all_rows(model: ModelConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    floors: dict[str, Row] = {}
    names = options.implementations or implementations()
    for work, bench in benches(model, options.rows, options.sequences, names):
        if options.only in work or work in FLOORS:
            try:
                row = bench()
                share = share_of(row, floors)
                if work in FLOORS:
                    floors[work] = row
                print(show(row, share), flush=True)
            except Exception:  # if one fails, the others run all the same
                print(f"{work} failed\n{traceback.format_exc(limit=-3)}", flush=True)
            else:
                yield row.to_dict() | {"share": share}


if __name__ == "__main__":
    run_script(main)
