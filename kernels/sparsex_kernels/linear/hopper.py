"""Linear layers on stacked weights for Hopper GPUs, by Pallas' Mosaic GPU.

A tile of outputs belongs to one of the weights. One warpgroup fetches blocks of rows and weights by TMA, which takes
the layer as a coordinate; the others multiply. Tiles that have none of the rows that are wanted are skipped. Where rows
are few, reading the weights takes all the time: the sum over the inputs is split so that every multiprocessor reads its
share, and XLA adds the parts. Where they are many, a program goes from tile to tile, and fetches for the next one while
the results of the last are being stored.

A gated product's tile has columns of the gate and the same columns of the matrix that it gates. TMA fills contiguous
blocks of shared memory, so each of the two has its own block, and its own product into one half of the accumulator.
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
from jaxtyping import Float

from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.gpu import LOG2_E
from sparsex_kernels.layout import pad_rows
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS, Ref, drain, kernel, tiled_smem

DEPTH = 64  # inputs a step: a swizzled line of 128 bytes
PIECE = 64  # columns that are stored at a time
SMALLEST = 8  # rows that are stored, at least


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      warpgroups: that multiply, each with 64 rows.
      columns: multiplied in a tile; divides every weight's. Half of them are the gate's in a gated product.
      splits: parts of the sum over the inputs.
      stages: blocks in flight.
      programs: the most programs; each goes from tile to tile.
    """

    warpgroups: int
    columns: int
    splits: int
    stages: int
    programs: int


class Shape(NamedTuple):
    """Static sizes of one call."""

    programs: int
    fetched: int  # rows of a tile that are copied to shared memory
    stored: int  # rows of a warpgroup's that are stored
    steps: int  # over the inputs
    matrices: int  # in a tile: one, or a gate's and what it gates
    columns: int  # of each matrix in a tile, and of results
    starts: tuple[int, ...]  # first tile of columns of each result, and their number
    dtype: Any
    out_dtype: Any


def linear(args: LinearArgs, config: Config | None = None) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    rows, inputs = args.inputs.shape
    out = _products(args, args.widths, config or choose_config(rows, inputs, args.widths))
    return tuple(jnp.split(out, np.cumsum(args.widths)[:-1], axis=1))


def gated_linear(args: LinearArgs, config: Config | None = None) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    if args.activation != "silu":
        raise NotImplementedError(f"activation={args.activation!r}; the kernel gates with silu")
    (rows, inputs), (width, _) = args.inputs.shape, args.widths
    config = config or choose_config(rows, inputs, (2 * width,))
    if config.splits > 1:  # the sum must be complete before it is gated
        gate, up = linear(args)
        return jax.nn.silu(gate) * up
    return _products(args, (width,), config)


def _products(args: LinearArgs, widths: tuple[int, ...], config: Config) -> Float[Array, "rows widths"]:
    """Results of these widths, side by side. With one width for two weights, the result is their gated product."""
    rows, tile = len(args.inputs), WGMMA_ROWS * config.warpgroups
    row_tiles = -(-rows // tile)
    shape = _shape(args, widths, row_tiles, config)
    _check(args, shape)
    count = jnp.asarray(rows if args.count is None else args.count, jnp.int32)
    wanted = jnp.clip(-(-count // tile), 0, row_tiles)
    out_shape = (config.splits, row_tiles * config.warpgroups * shape.stored, sum(widths))
    run = kernel(
        functools.partial(_kernel, shape, config),
        args.backend,
        out_type=jax.ShapeDtypeStruct(out_shape, shape.out_dtype),
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    numbers = jnp.stack([jnp.asarray(args.layer, jnp.int32), wanted])
    parts = run(pad_rows(args.inputs, shape.fetched), *args.weights, numbers)
    out = parts[0] if config.splits == 1 else parts.sum(0).astype(args.inputs.dtype)
    return out[:rows]


def choose_config(rows: int, inputs: int, widths: tuple[int, ...]) -> Config:
    """Sizes that suit this number of rows and inputs, and weights of these widths; a split has four steps or more."""
    few = rows <= WGMMA_ROWS
    columns = next((n for n in ((128, 64) if few else (256, 128, 64)) if not any(w % n for w in widths)), 0)
    if not columns:
        raise NotImplementedError(f"weights of {widths} columns; the kernel takes multiples of 64")
    tiles = sum(widths) // columns * -(-rows // (WGMMA_ROWS if few else 2 * WGMMA_ROWS))
    wanted = 2 * MULTIPROCESSORS if few else MULTIPROCESSORS
    splits = max(min(round(wanted / tiles), inputs // (4 * DEPTH)), 1)
    if few:
        return Config(1, columns, splits, 3, tiles * splits)
    return Config(2, columns, splits, 4, MULTIPROCESSORS)


def _check(args: LinearArgs, shape: Shape) -> None:
    """Raise `NotImplementedError` where this shape or dtype cannot be done."""
    x, weights = args.inputs, args.weights
    if x.dtype not in (jnp.bfloat16, jnp.float16) or any(weight.dtype != x.dtype for weight in weights):
        raise NotImplementedError(
            f"rows of {x.dtype} on weights of {weights[0].dtype}; the kernel takes bfloat16 or float16 for both"
        )
    if x.shape[1] % DEPTH or shape.columns % PIECE or any(width % shape.columns for width in args.widths):
        raise NotImplementedError(f"{x.shape[1]} inputs, {list(args.widths)} outputs in tiles of {shape.columns}")


def _shape(args: LinearArgs, widths: tuple[int, ...], row_tiles: int, config: Config) -> Shape:
    (rows, inputs), dtype = args.inputs.shape, args.inputs.dtype
    matrices = len(args.weights) // len(widths)
    columns = config.columns // matrices
    # Weights of 128 and 64 columns in tiles of 64: the first has tiles 0 and 1, the second tile 2; starts are 0, 2, 3.
    starts = tuple(int(end) // columns for end in np.cumsum([0, *widths]))
    stored = min(rows + -rows % SMALLEST, WGMMA_ROWS)
    return Shape(
        programs=min(config.programs, row_tiles * starts[-1] * config.splits),
        fetched=stored if config.warpgroups == 1 else config.warpgroups * WGMMA_ROWS,
        stored=stored,
        steps=inputs // DEPTH,
        matrices=matrices,
        columns=columns,
        starts=starts,
        dtype=dtype,
        out_dtype=dtype if config.splits == 1 else jnp.float32,
    )


def _scratch(shape: Shape, config: Config) -> dict[str, Any]:
    pieces = 2 if shape.out_dtype != jnp.float32 else 1
    return {
        "x_smem": tiled_smem((config.stages, config.warpgroups * WGMMA_ROWS, DEPTH), shape.dtype),
        "w_smem": tiled_smem((config.stages, shape.matrices, DEPTH, shape.columns), shape.dtype),
        "out_smem": tiled_smem((config.warpgroups, pieces, WGMMA_ROWS, PIECE), shape.out_dtype),
        "ready": plgpu.Barrier(num_arrivals=1 + shape.matrices, num_barriers=config.stages),
        "used": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    }


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    x_smem: Ref  # [stages, rows, DEPTH]
    w_smem: Ref  # [stages, matrices, DEPTH, columns]
    out_smem: Ref  # [warpgroups, pieces, WGMMA_ROWS, PIECE]
    ready: Ref  # of each stage: its rows and weights have arrived
    used: Ref  # of each stage: all warpgroups have multiplied them


def _kernel(shape: Shape, config: Config, x_ref: Ref, *refs: Ref, **scratch: Ref) -> None:
    *weights, numbers, out_ref = refs
    tiled = [weights[n : n + shape.matrices] for n in range(0, len(weights), shape.matrices)]
    layer, row_tiles, wg = numbers[0], numbers[1], lax.axis_index("wg")
    persistent = config.warpgroups == 2  # one program a multiprocessor, which has its registers for itself

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        if persistent:
            plgpu.set_max_registers(232, action="increase")
        _compute(shape, config, row_tiles, wg, out_ref, Scratch(**scratch))

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        if persistent:
            plgpu.set_max_registers(40, action="decrease")
        _fetch(shape, config, row_tiles, x_ref, tiled, layer, Scratch(**scratch))


class Item(NamedTuple):
    """What a program does at a time: a tile of outputs, and a part of the sum over the inputs."""

    row: Array  # tile of rows
    column: Array  # tile of columns, over all results
    split: Array
    begin: Array  # first step over the inputs
    end: Array


def _item(shape: Shape, config: Config, row_tiles: Array, number: Array) -> Item:
    """The item of this number. Tiles of the same columns follow each other, so that their weights, once read, are found
    in the cache. With 2 tiles of rows, 3 of columns and 1 split, items 0..5 are (row, column) 00 10 01 11 02 12."""
    column = lax.rem(lax.div(number, row_tiles), shape.starts[-1])
    split = lax.div(number, row_tiles * shape.starts[-1])
    begin, end = (lax.div(at * shape.steps, config.splits) for at in (split, split + 1))
    return Item(lax.rem(number, row_tiles), column, split, begin, end)


def _over_items(shape: Shape, config: Config, row_tiles: Array, body: Any) -> Array:
    """Call `body(item, steps before it)` for each of the program's items; returns the number of steps in all."""
    items = row_tiles * shape.starts[-1] * config.splits
    program, programs = lax.axis_index("program"), shape.programs

    def step(i: Array, done: Array) -> Array:
        item = _item(shape, config, row_tiles, program + i * programs)
        body(item, done)
        return done + item.end - item.begin

    return lax.fori_loop(0, lax.div(items - program + programs - 1, programs), step, jnp.int32(0))


def _compute(shape: Shape, config: Config, row_tiles: Array, wg: Array, out_ref: Ref, scratch: Scratch) -> None:
    x_smem, w_smem, out_smem, ready, used = scratch
    rows = pl.ds(wg * WGMMA_ROWS, WGMMA_ROWS)

    def over_item(item: Item, done: Array) -> None:
        def product(acc: Any) -> Array:
            def step(k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                plgpu.barrier_wait(ready.at[slot])
                for n in range(shape.matrices):
                    columns = pl.ds(n * shape.columns, shape.columns)
                    plgpu.wgmma(acc.at[:, columns], x_smem.at[slot, rows], w_smem.at[slot, n])
                plgpu.wgmma_wait(shape.matrices)  # the products before these have read their blocks
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(used.at[lax.rem(done + k - 1, config.stages)]))

            lax.fori_loop(0, item.end - item.begin, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(used.at[lax.rem(done + item.end - item.begin - 1, config.stages)])
            return acc[...]

        acc = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, config.columns), jnp.float32))
        _store(shape, config, item, wg, acc, out_ref, out_smem)

    _over_items(shape, config, row_tiles, over_item)
    plgpu.wait_smem_to_gmem(0)


def _store(shape: Shape, config: Config, item: Item, wg: Array, acc: Array, out_ref: Ref, out_smem: Ref) -> None:
    pieces, stored = out_smem.shape[1], pl.ds(0, shape.stored)
    row = pl.ds((item.row * config.warpgroups + wg) * shape.stored, shape.stored)
    for n in range(shape.columns // PIECE):
        smem = out_smem.at[wg, n % pieces]
        plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
        smem[...] = _results(shape, acc, n * PIECE).astype(shape.out_dtype)
        plgpu.commit_smem()
        columns = pl.ds(item.column * shape.columns + n * PIECE, PIECE)
        plgpu.copy_smem_to_gmem(smem.at[stored], out_ref.at[item.split, row, columns])


def _results(shape: Shape, acc: Array, begin: int) -> Array:
    """A piece of a tile's results, from the column `begin` on, in float32."""
    first = acc[:, begin : begin + PIECE]
    if shape.matrices == 1:
        return first
    second = acc[:, shape.columns + begin : shape.columns + begin + PIECE]
    return first / (1 + jnp.exp2(first * -LOG2_E)) * second  # SiLU in operations that Mosaic lowers


def _fetch(
    shape: Shape,
    config: Config,
    row_tiles: Array,
    x_ref: Ref,
    weights: list[list[Ref]],
    layer: Array,
    scratch: Scratch,
) -> None:
    x_smem, w_smem, _, ready, used = scratch
    # Of few rows, only the first rows of a block are filled. The others keep what they held; nothing of them is stored.
    filled = pl.ds(0, shape.fetched)

    def over_item(item: Item, done: Array) -> None:
        def copy_from(matrices: list[Ref], first: int) -> None:
            def step(k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                pl.when(done + k >= config.stages)(lambda: plgpu.barrier_wait(used.at[slot]))
                rows = pl.ds(item.row * shape.fetched, shape.fetched)
                inputs = pl.ds((item.begin + k) * DEPTH, DEPTH)
                columns = pl.ds((item.column - first) * shape.columns, shape.columns)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, inputs], x_smem.at[slot, filled], ready.at[slot])
                for n, matrix in enumerate(matrices):
                    plgpu.copy_gmem_to_smem(matrix.at[layer, inputs, columns], w_smem.at[slot, n], ready.at[slot])

            lax.fori_loop(0, item.end - item.begin, step, None)

        for begin, end, matrices in zip(shape.starts[:-1], shape.starts[1:], weights, strict=True):
            mine = (item.column >= begin) & (item.column < end)
            pl.when(mine)(functools.partial(copy_from, matrices, begin))

    steps = _over_items(shape, config, row_tiles, over_item)
    drain((used,), 0, steps, config.stages)
