"""Times the kernels of a decode step on this device, with several settings each: what the defaults were chosen from.

    python scripts/tune_decode.py [--rows 8] [--context 8192] [--only SUBSTRING]

A layer of Llama 3.1 8B in bfloat16, one live row of `--rows`. Each figure is the time of one launch, or of the launches
of one operation, over 16 layers in one program, so that weights and keys come from memory, as in a decode step. Last is
the time of the bytes that must be read, at the rate that the memory has on paper (`--bandwidth`).
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench_e2e import median_milliseconds

import sparsex_kernels.api as kernels
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count
from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.backend import default_backend
from sparsex_kernels.linear import hopper as linear
from sparsex_kernels.paged_attention import hopper_decode
from sparsex_kernels.product_parts import ProductParts

LAYERS, CALLS = 16, 20
HIDDEN, WIDTH, Q_HEADS, KV_HEADS, DIM, PAGE = 4096, 14336, 32, 8, 128, 64
PRODUCTS = {"q, k, v": (HIDDEN, (4096, 1024, 1024)), "o": (4096, (HIDDEN,)), "down": (WIDTH, (HIDDEN,))}


class Case(NamedTuple):
    """What is timed: `step(layer, *data)`, called for each layer of one program."""

    name: str
    step: Callable[..., Any]
    data: tuple[Any, ...]
    bytes: float = 0.0


def seconds_a_layer(case: Case) -> float:
    """Median seconds of a step, of programs that have one for each layer."""
    run = jax.jit(lambda *data: [case.step(layer, *data) for layer in range(LAYERS)])
    return median_milliseconds(run, *case.data, runs=CALLS) / 1e3 / LAYERS


def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Random numbers, made on the device."""
    return jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=dtype))(jax.random.key(0))


def products(rows: int) -> Iterator[Case]:
    """The products of few rows, by splits of the sum and blocks in flight."""
    for name, (inputs, widths) in PRODUCTS.items():
        data = normal(rows, inputs), tuple(normal(LAYERS, inputs, width) for width in widths)
        default = linear.choose_config(rows, inputs, widths)
        for splits, stages in itertools.product((2, 4, 5, 6, 8), (3, 4, 8)):
            config = dataclasses.replace(default, splits=splits, stages=stages, programs=splits * sum(widths) // 128)

            def step(layer: int, x: Any, weights: Any, config: Any = config) -> Any:
                return linear.linear_parts(LinearArgs(x, weights, layer, None, default_backend()), config)

            mark = " (default)" if config == default else ""
            yield Case(f"{name}: {splits} splits, {stages} stages{mark}", step, data, 2.0 * inputs * sum(widths))


def attention(rows: int, context: int) -> Iterator[Case]:
    """Attention of one row and its merge, by how many programs are taken to run at a time."""
    pages = -(-context // PAGE) + 1
    store = normal(LAYERS, pages, 2, KV_HEADS, PAGE, DIM)
    positions = jnp.full(rows, -1).at[0].set(context)
    data = normal(rows, Q_HEADS, DIM), store, positions, jnp.arange(rows), jnp.tile(jnp.arange(pages), (rows, 1))
    default = hopper_decode.AT_ONCE[DIM]
    for at_once in (default, default // 2, 2 * default, 10**6):

        def step(layer: int, q: Any, store: Any, *rest: Any, at_once: int = at_once) -> Any:
            hopper_decode.AT_ONCE[DIM] = at_once
            return kernels.paged_attention(q, store, layer, *rest, implementation="hopper")

        yield Case(f"attention: {at_once} programs at a time", step, data, 4.0 * KV_HEADS * DIM * context)
    hopper_decode.AT_ONCE[DIM] = default


def between(rows: int, context: int) -> Iterator[Case]:
    """What stands between the products, in one launch and as XLA fuses it."""
    scales, residual = normal(LAYERS, HIDDEN), normal(rows, HIDDEN)
    addresses = (
        jnp.full(rows, -1).at[0].set(context),
        jnp.arange(rows),
        jnp.zeros((rows, context // PAGE + 1), jnp.int32),
    )
    inv_freq = 500000.0 ** -jnp.linspace(0, 1, DIM // 2)
    stores = [normal(1, 1, 2, KV_HEADS, PAGE, DIM) for _ in range(LAYERS)]  # of a page: each is copied before the write
    for implementation, parts in itertools.product(("hopper", "xla"), (1, 4, 8)):
        on = {"implementation": implementation}
        dtype = jnp.float32 if parts > 1 else jnp.bfloat16
        product = normal(LAYERS, parts, rows, HIDDEN, dtype=dtype)
        add = functools.partial(kernels.add_norm, eps=1e-5, **on)

        def summed(layer: int, product: Any, *rest: Any, add: Any = add) -> Any:
            return add(ProductParts(product[layer]), *rest, layer)

        yield Case(
            f"add_norm: {implementation}, {parts} parts",
            summed,
            (list(product), residual, scales),
        )
        product = normal(LAYERS, parts, rows, (Q_HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
        write = functools.partial(kernels.rotate_and_write, dtype=jnp.bfloat16, **on)

        def step(layer: int, product: Any, stores: Any, *rest: Any, write: Any = write) -> Any:
            return write(ProductParts(product[layer]), stores[layer], jnp.int32(0), *rest)

        data = (list(product), stores, *addresses, inv_freq)
        yield Case(f"rotate_and_write, and a copy of 256 KB: {implementation}, {parts} parts", step, data)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=count, default=8)
    parser.add_argument("--context", type=count, default=8192)
    parser.add_argument("--only", default="")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; 3.35e12 of an H100")
    options = parser.parse_args()
    rows, context = options.rows, options.context
    for case in itertools.chain(between(rows, context), attention(rows, context), products(rows)):
        if options.only in case.name:
            try:
                seconds = seconds_a_layer(case)
            except Exception as error:  # settings that do not fit into shared memory are passed over
                print(f"{case.name:64} {type(error).__name__}: {str(error)[:80]}", flush=True)
            else:
                print(f"{case.name:64} {1e6 * seconds:7.1f} us  at least {1e6 * case.bytes / options.bandwidth:5.1f}")


if __name__ == "__main__":
    run_script(main)
