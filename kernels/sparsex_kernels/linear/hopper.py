"""Linear layers on stacked weights for Hopper GPUs, by Pallas' Mosaic GPU.

A tile of outputs belongs to one of the weights. One warpgroup fetches blocks of rows and weights by TMA, which takes
the layer as a coordinate; the others multiply. Tiles of rows that nobody wants cost nothing. Where rows are few the
time is that of reading the weights, and the sum over the inputs is split so that every multiprocessor reads its share;
XLA adds the parts. Where they are many, a program goes from tile to tile, and fetches for the next one while the
results of the last are on their way.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.layout import pad_rows
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS, kernel, tiled_smem

DEPTH = 64  # inputs a step: a swizzled line of 128 bytes
PIECE = 64  # columns that leave at a time
SMALLEST = 8  # rows that are stored, at least


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      warpgroups: that multiply, each with 64 rows.
      columns: of a tile; divides every weight's.
      splits: parts of the sum over the inputs.
      stages: blocks in flight.
      programs: at most so many; each goes from tile to tile.
    """

    warpgroups: int
    columns: int
    splits: int
    stages: int
    programs: int


class Shape(NamedTuple):
    """Static sizes of one call."""

    programs: int
    stored: int  # rows of a warpgroup's that are stored
    steps: int  # over the inputs
    starts: tuple[int, ...]  # first tile of columns of each weight, and their number
    dtype: Any
    out_dtype: Any


def linear(
    x: Float[Array, "rows inputs"],
    weights: tuple[Float[Array, "layers inputs _"], ...],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    rows, inputs = x.shape
    widths = tuple(weight.shape[2] for weight in weights)
    config = config or choose_config(rows, inputs, widths)
    _check(x, weights, config)
    tile = WGMMA_ROWS * config.warpgroups
    padded = pad_rows(x, tile)
    row_tiles = len(padded) // tile
    shape = _shape(x, widths, row_tiles, config)
    stored = row_tiles * config.warpgroups * shape.stored
    wanted = jnp.clip(-(-jnp.asarray(rows if count is None else count, jnp.int32) // tile), 0, row_tiles)
    run = kernel(
        functools.partial(_kernel, shape, config),
        out_type=jax.ShapeDtypeStruct((config.splits, stored, sum(widths)), shape.out_dtype),
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    parts = run(padded, *weights, jnp.stack([jnp.asarray(layer, jnp.int32), wanted]))
    out = parts[0] if config.splits == 1 else parts.sum(0).astype(x.dtype)
    return tuple(jnp.split(out[:rows], np.cumsum(widths)[:-1], axis=1))


def choose_config(rows: int, inputs: int, widths: tuple[int, ...]) -> Config:
    """Sizes for so many rows; a split has four steps or more."""
    few = rows <= WGMMA_ROWS
    columns = next((n for n in ((128, 64) if few else (256, 128, 64)) if not any(w % n for w in widths)), 0)
    if not columns:
        raise NotImplementedError(f"weights of {widths} columns; multiples of 64 can be")
    tiles = sum(widths) // columns * -(-rows // (WGMMA_ROWS if few else 2 * WGMMA_ROWS))
    wanted = 2 * MULTIPROCESSORS if few else MULTIPROCESSORS
    splits = max(min(round(wanted / tiles), inputs // (4 * DEPTH)), 1)
    if few:
        return Config(1, columns, splits, 3, tiles * splits)
    return Config(2, columns, splits, 4, MULTIPROCESSORS)


def _check(x: Array, weights: tuple[Array, ...], config: Config) -> None:
    """Raise `NotImplementedError` where this shape or type cannot be done."""
    if x.dtype not in (jnp.bfloat16, jnp.float16) or any(weight.dtype != x.dtype for weight in weights):
        raise NotImplementedError(
            f"rows of {x.dtype} on weights of {weights[0].dtype}; both bfloat16 or float16 can be"
        )
    if x.shape[1] % DEPTH or any(weight.shape[2] % config.columns for weight in weights):
        raise NotImplementedError(f"{x.shape[1]} inputs, {[weight.shape[2] for weight in weights]} outputs")


def _shape(x: Array, widths: tuple[int, ...], row_tiles: int, config: Config) -> Shape:
    starts = tuple(int(end) // config.columns for end in np.cumsum([0, *widths]))
    stored = min(len(x) + -len(x) % SMALLEST, WGMMA_ROWS)
    programs = min(config.programs, row_tiles * starts[-1] * config.splits)
    out_dtype = x.dtype if config.splits == 1 else jnp.float32
    return Shape(programs, stored, x.shape[1] // DEPTH, starts, x.dtype, out_dtype)


def _scratch(shape: Shape, config: Config) -> dict[str, Any]:
    pieces = 2 if shape.out_dtype != jnp.float32 else 1
    return {
        "x_smem": tiled_smem((config.stages, config.warpgroups * WGMMA_ROWS, DEPTH), shape.dtype),
        "w_smem": tiled_smem((config.stages, DEPTH, config.columns), shape.dtype),
        "out_smem": tiled_smem((config.warpgroups, pieces, WGMMA_ROWS, PIECE), shape.out_dtype),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        "used": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    }


def _kernel(shape: Shape, config: Config, x_ref: Any, *refs: Any, **scratch: Any) -> None:
    *weights, numbers, out_ref = refs
    layer, row_tiles, wg = numbers[0], numbers[1], lax.axis_index("wg")
    persistent = config.warpgroups == 2  # one program a multiprocessor, which has its registers for itself

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        if persistent:
            plgpu.set_max_registers(232, action="increase")
        _compute(shape, config, row_tiles, wg, out_ref, **scratch)

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        if persistent:
            plgpu.set_max_registers(40, action="decrease")
        _fetch(shape, config, row_tiles, x_ref, weights, layer, **scratch)


class Item(NamedTuple):
    """A tile of outputs, and the part of the sum: what is done at a time."""

    row: Array  # tile of rows
    column: Array  # tile of columns, over all weights
    split: Array
    begin: Array  # first step over the inputs
    end: Array


def _item(shape: Shape, config: Config, row_tiles: Array, number: Array) -> Item:
    """Tiles of the same columns are behind each other: their weights are read once, and found in the cache then."""
    column = lax.rem(lax.div(number, row_tiles), shape.starts[-1])
    split = lax.div(number, row_tiles * shape.starts[-1])
    begin, end = (lax.div(at * shape.steps, config.splits) for at in (split, split + 1))
    return Item(lax.rem(number, row_tiles), column, split, begin, end)


def _over_items(shape: Shape, config: Config, row_tiles: Array, body: Any) -> Array:
    """Fold `body(item, steps so far)` over the program's items; the number of steps in all."""
    items = row_tiles * shape.starts[-1] * config.splits
    program, programs = lax.axis_index("program"), shape.programs

    def step(i: Array, done: Array) -> Array:
        item = _item(shape, config, row_tiles, program + i * programs)
        body(item, done)
        return done + item.end - item.begin

    return lax.fori_loop(0, lax.div(items - program + programs - 1, programs), step, jnp.int32(0))


def _compute(
    shape: Shape,
    config: Config,
    row_tiles: Array,
    wg: Array,
    out_ref: Any,
    *,
    x_smem: Any,
    w_smem: Any,
    out_smem: Any,
    ready: Any,
    used: Any,
) -> None:
    rows = pl.ds(wg * WGMMA_ROWS, WGMMA_ROWS)

    def over_item(item: Item, done: Array) -> None:
        def product(acc: Any) -> Array:
            def step(k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                plgpu.barrier_wait(ready.at[slot])
                plgpu.wgmma(acc, x_smem.at[slot, rows], w_smem.at[slot])
                plgpu.wgmma_wait(1)  # the product before this one has read its blocks
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(used.at[lax.rem(done + k - 1, config.stages)]))

            lax.fori_loop(0, item.end - item.begin, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(used.at[lax.rem(done + item.end - item.begin - 1, config.stages)])
            return acc[...]

        acc = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, config.columns), jnp.float32))
        _store(shape, config, item, wg, acc, out_ref, out_smem)

    _over_items(shape, config, row_tiles, over_item)
    plgpu.wait_smem_to_gmem(0)


def _store(shape: Shape, config: Config, item: Item, wg: Array, acc: Array, out_ref: Any, out_smem: Any) -> None:
    pieces, stored = out_smem.shape[1], pl.ds(0, shape.stored)
    row = pl.ds((item.row * config.warpgroups + wg) * shape.stored, shape.stored)
    for n in range(config.columns // PIECE):
        smem = out_smem.at[wg, n % pieces]
        plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
        smem[...] = acc[:, n * PIECE : (n + 1) * PIECE].astype(shape.out_dtype)
        plgpu.commit_smem()
        columns = pl.ds(item.column * config.columns + n * PIECE, PIECE)
        plgpu.copy_smem_to_gmem(smem.at[stored], out_ref.at[item.split, row, columns])


def _fetch(
    shape: Shape,
    config: Config,
    row_tiles: Array,
    x_ref: Any,
    weights: Any,
    layer: Array,
    *,
    x_smem: Any,
    w_smem: Any,
    out_smem: Any,
    ready: Any,
    used: Any,
) -> None:
    tile = config.warpgroups * WGMMA_ROWS

    def over_item(item: Item, done: Array) -> None:
        def copy_from(weight: Any, first: int) -> None:
            def step(k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                pl.when(done + k >= config.stages)(lambda: plgpu.barrier_wait(used.at[slot]))
                inputs = pl.ds((item.begin + k) * DEPTH, DEPTH)
                columns = pl.ds((item.column - first) * config.columns, config.columns)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(item.row * tile, tile), inputs], x_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(weight.at[layer, inputs, columns], w_smem.at[slot], ready.at[slot])

            lax.fori_loop(0, item.end - item.begin, step, None)

        for begin, end, weight in zip(shape.starts[:-1], shape.starts[1:], weights, strict=True):
            mine = (item.column >= begin) & (item.column < end)
            pl.when(mine)(functools.partial(copy_from, weight, begin))

    steps = _over_items(shape, config, row_tiles, over_item)

    def drain(at: Array, _: None) -> None:  # so that every phase of a barrier is seen by who waits on it
        plgpu.barrier_wait(used.at[lax.rem(at, config.stages)])

    lax.fori_loop(jnp.maximum(steps - config.stages, 0), steps, drain, None)
