"""Products of tiles of rows with matrices of stacks, for Hopper GPUs, by Pallas' Mosaic GPU.

`linear` and `grouped_linear` are both of these: in one all tiles of rows are multiplied with the same matrix, in the
other each with its own.

A tile of outputs belongs to one of the weights. One warpgroup fetches blocks of rows and weights by TMA, which takes
the matrix as a coordinate; the others multiply. Tiles that have none of the rows that are wanted are skipped. Where
rows are few, reading the weights takes all the time: the sum over the inputs may be split so that every multiprocessor
reads its share, and what comes next adds the parts. Where they are many, a program goes from tile to tile, and fetches
for the next one while the results of the last are being stored. Of many rows few may be wanted: into how many parts a
sum is then split is data, and parts that are not used are not written. With 16 tiles of columns, 132 programs and 8
parts at most:

    tiles of rows   1    2    3    4    5 .. 8
    parts used      8    4    2    2    1
    items         128  128   96  128   80 .. 128

A gated product's tile has columns of the gate and the same columns of the matrix that it gates. TMA fills contiguous
blocks of shared memory, so each of the two has its own block, and its own product into one half of the accumulator.

Something of low rank may be added: `x W + n B`, where n has few columns. The sum over the inputs then goes on over n's
columns and B's rows, through the same buffers and into the same accumulator. A gate and what it gates have an n each.
With 4096 inputs, and two n of 128 columns:

    step     0   1  ..  63 | 64  65 | 66  67
    rows    x0  x1  .. x63 | g0  g1 | u0  u1
    gate    W0  W1  .. W63 | B0  B1 |
    up      W0  W1  .. W63 |        | B0  B1
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.arguments import Added
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import LOG2_E
from sparsex_kernels.layout import pad_rows
from sparsex_kernels.mosaic import WGMMA_ROWS, Ref, drain, kernel, tiled_smem
from sparsex_kernels.product_parts import ProductParts

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
      fits: whether the number of parts that are used is data: the most with which the programs need one round, or one.
    """

    warpgroups: int
    columns: int
    splits: int
    stages: int
    programs: int
    fits: bool = False


class Shape(NamedTuple):
    """Static sizes of one call."""

    programs: int
    fetched: int  # rows of a tile that are copied to shared memory
    stored: int  # rows of a warpgroup's that are stored
    steps: int  # over the inputs
    matrices: int  # in a tile: one, or a gate's and what it gates
    columns: int  # of each matrix in a tile, and of results
    starts: tuple[int, ...]  # first tile of columns of each result, and their number
    together: bool  # see `RowTiles`
    dtype: Any
    out_dtype: Any
    added: tuple[tuple[range, ...], ...]  # of each result and each of its matrices: blocks of inputs that are added


class RowTiles(NamedTuple):
    """Tiles of rows, and the matrix that multiplies each.

    Attributes:
      rows: of a tile: 64 for each warpgroup, or of one warpgroup a smaller multiple of 8.
      wanted: how many tiles have rows that are wanted; they come first.
      matrices: which matrix of each stack.
      together: whether tiles of rows that take the same columns follow each other, and find the weights in the cache:
        good where all have the same matrix. Else a tile's columns follow each other, and find its rows there.
    """

    rows: int
    wanted: Array
    matrices: Int[Array, "tiles"]
    together: bool


def product_parts(
    inputs: Float[Array, "rows inputs"],
    weights: Sequence[Float[Array, "matrices inputs _"]],
    widths: tuple[int, ...],
    tiles: RowTiles,
    config: Config,
    backend: Backend,
    added: Sequence[Added | None] = (),
) -> ProductParts:
    """Results of these widths, side by side, in parts that remain to be added: one for each of the config's splits, of
    which those are used that fit.

    With one width for two weights, the result is their gated product.

    Args:
      inputs: the tiles one behind the other, the last of which may have fewer rows.
      added: to the product with each of the weights; None: nothing. Empty: nothing to any.

    Raises:
      NotImplementedError: this shape or dtype cannot be done.
    """
    added = tuple(added) or (None,) * len(weights)
    if config.warpgroups > 1:  # programs that stay, one on each multiprocessor
        config = dataclasses.replace(config, programs=config.programs - backend.spared)
    shape = _shape(inputs, added, widths, tiles, config)
    _check(inputs, weights, widths, shape)
    more = [part for each in added if each is not None for part in _checked(each, inputs, shape)]
    out_shape = (config.splits, len(tiles.matrices) * config.warpgroups * shape.stored, sum(widths))
    run = kernel(
        functools.partial(_kernel, shape, config),
        backend,
        out_type=jax.ShapeDtypeStruct(out_shape, shape.out_dtype),
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    # Apart, so that the matrices are no launch of their own where they are known as the program is compiled.
    which = tiles.wanted[None].astype(jnp.int32), tiles.matrices.astype(jnp.int32)
    parts = run(pad_rows(inputs, shape.fetched), *weights, *more, *which)[:, : len(inputs)]
    return ProductParts(parts, _fitting(shape, config, which[0][0]) if config.fits else None)


def _fitting(shape: Shape, config: Config, row_tiles: Array) -> Array:
    """How many parts of the sum are used, given the number of row tiles that are wanted."""
    each = jnp.maximum(row_tiles, 1) * shape.starts[-1]  # items of a part
    return jnp.clip(lax.div(config.programs, each), 1, config.splits)


def _check(inputs: Array, weights: Sequence[Array], widths: tuple[int, ...], shape: Shape) -> None:
    """Raise `NotImplementedError` where this shape or dtype cannot be done."""
    if inputs.dtype not in (jnp.bfloat16, jnp.float16) or any(weight.dtype != inputs.dtype for weight in weights):
        raise NotImplementedError(
            f"rows of {inputs.dtype} on weights of {weights[0].dtype}; the kernel takes bfloat16 or float16 for both"
        )
    if inputs.shape[1] % DEPTH or shape.columns % PIECE or any(width % shape.columns for width in widths):
        raise NotImplementedError(f"{inputs.shape[1]} inputs, {list(widths)} outputs in tiles of {shape.columns}")


def _checked(added: Added, inputs: Array, shape: Shape) -> tuple[Array, Array]:
    """Inputs, padded as the others are, and the stack of what is added; `NotImplementedError` where it cannot be."""
    if any(part.dtype != inputs.dtype for part in (added.inputs, added.stack)):
        raise NotImplementedError(
            f"{added.inputs.dtype} on {added.stack.dtype} is added to a product of {inputs.dtype}"
        )
    if added.ranks % DEPTH or added.begin % DEPTH:
        about = f"a product of {added.ranks} inputs from column {added.begin} on"
        raise NotImplementedError(f"{about} is added; the kernel takes multiples of 64")
    return pad_rows(added.inputs, shape.fetched), added.stack


def _shape(
    inputs: Array, added: Sequence[Added | None], widths: tuple[int, ...], tiles: RowTiles, config: Config
) -> Shape:
    matrices = len(added) // len(widths)
    columns = config.columns // matrices
    more = [range(0) if each is None else _blocks(each) for each in added]
    # Weights of 128 and 64 columns in tiles of 64: the first has tiles 0 and 1, the second tile 2; starts are 0, 2, 3.
    starts = tuple(int(end) // columns for end in np.cumsum([0, *widths]))
    return Shape(
        programs=min(config.programs, len(tiles.matrices) * starts[-1] * config.splits),
        fetched=tiles.rows,
        stored=min(tiles.rows, WGMMA_ROWS),
        steps=inputs.shape[1] // DEPTH,
        matrices=matrices,
        columns=columns,
        starts=starts,
        together=tiles.together,
        dtype=inputs.dtype,
        out_dtype=inputs.dtype if config.splits == 1 else jnp.float32,
        added=tuple(tuple(more[n : n + matrices]) for n in range(0, len(more), matrices)),
    )


def _blocks(added: Added) -> range:
    return range(added.begin // DEPTH, (added.begin + added.ranks) // DEPTH)


class Span(NamedTuple):
    """Steps of a sum in which the same rows are multiplied.

    Attributes:
      begin: the first of them.
      end: the first behind them; None where the sum ends.
      matrices: which of a tile's are multiplied.
      block: of the rows' inputs, at the first step.
    """

    begin: int
    end: int | None
    matrices: tuple[int, ...]
    block: int = 0

    def within(self, item: "Item") -> tuple[Array | int, Array]:
        """The first of these steps in an item, and the first behind them, counted from the item's first step."""
        first = jnp.maximum(self.begin - item.begin, 0) if self.begin else 0
        return first, (item.end if self.end is None else jnp.minimum(item.end, self.end)) - item.begin


def _spans(shape: Shape, result: int) -> list[Span]:
    """The spans of a result's sum: over the inputs, then over what is added to each of its matrices."""
    added = {(n,): blocks for n, blocks in enumerate(shape.added[result]) if blocks}
    ends = np.cumsum([0, shape.steps, *map(len, added.values())]).tolist()
    matrices, firsts = [tuple(range(shape.matrices)), *added], [0, *(blocks.start for blocks in added.values())]
    return [Span(*each) for each in zip(ends[:-1], [*ends[1:-1], None], matrices, firsts, strict=True)]


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


class Wanted(NamedTuple):
    """What is multiplied."""

    row_tiles: Array  # how many
    splits: Array | int  # parts of each sum
    matrices: Ref  # which of each stack, by tile of rows


def _kernel(shape: Shape, config: Config, x_ref: Ref, *refs: Ref, **scratch: Ref) -> None:
    *operands, wanted, which, out_ref = refs
    splits = _fitting(shape, config, wanted[0]) if config.fits else config.splits
    tiles, wg = Wanted(wanted[0], splits, which), lax.axis_index("wg")
    persistent = config.warpgroups == 2  # one program a multiprocessor, which has its registers for itself

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        if persistent:
            plgpu.set_max_registers(232, action="increase")
        _compute(shape, config, tiles, wg, out_ref, Scratch(**scratch))

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        if persistent:
            plgpu.set_max_registers(40, action="decrease")
        _fetch(shape, config, tiles, _sources(shape, x_ref, operands), Scratch(**scratch))


class Item(NamedTuple):
    """What a program does at a time: a tile of outputs, and a part of the sum over the inputs."""

    row: Array  # tile of rows
    column: Array  # tile of columns, over all results
    split: Array
    begin: Array  # first step of the sum
    end: Array


def _item(shape: Shape, tiles: Wanted, number: Array) -> Item:
    """The item of this number. With 2 tiles of rows, 3 of columns and 1 split, items 0..5 are (row, column)
    00 10 01 11 02 12 where tiles of rows are taken together, else 00 01 02 10 11 12."""
    row_tiles, columns = tiles.row_tiles, shape.starts[-1]
    split = lax.div(number, row_tiles * columns)
    if shape.together:
        row, column = lax.rem(number, row_tiles), lax.rem(lax.div(number, row_tiles), columns)
    else:
        row, column = lax.rem(lax.div(number, columns), row_tiles), lax.rem(number, columns)
    begin, end = (lax.div(at * _steps(shape, column), tiles.splits) for at in (split, split + 1))
    return Item(row, column, split, begin, end)


def _steps(shape: Shape, column: Array) -> Array | int:
    """Steps of the sum of a tile of columns, what is added among them."""
    steps = [shape.steps + sum(map(len, added)) for added in shape.added]
    if len(set(steps)) == 1:
        return steps[0]
    within = (lax.convert_element_type((column >= begin) & (column < end), jnp.int32) for begin, end in _columns(shape))
    return sum(each * mine for each, mine in zip(steps, within, strict=True))


def _columns(shape: Shape) -> Iterator[tuple[int, int]]:
    """The first tile of columns of each result, and the first behind those."""
    return zip(shape.starts[:-1], shape.starts[1:], strict=True)


def _over_items(shape: Shape, tiles: Wanted, body: Any) -> Array:
    """Call `body(item, steps before it)` for each of the program's items; returns the number of steps in all."""
    items = tiles.row_tiles * shape.starts[-1] * tiles.splits
    program, programs = lax.axis_index("program"), shape.programs

    def step(i: Array, done: Array) -> Array:
        item = _item(shape, tiles, program + i * programs)
        body(item, done)
        return done + item.end - item.begin

    return lax.fori_loop(0, lax.div(items - program + programs - 1, programs), step, jnp.int32(0))


def _compute(shape: Shape, config: Config, tiles: Wanted, wg: Array, out_ref: Ref, scratch: Scratch) -> None:
    x_smem, w_smem, out_smem, ready, used = scratch
    rows = pl.ds(wg * WGMMA_ROWS, WGMMA_ROWS)
    spans = _spans(shape, 0) if shape.matrices > 1 else [Span(0, None, (0,))]

    def over_item(item: Item, done: Array) -> None:
        def product(acc: Any) -> Array:
            def step(matrices: tuple[int, ...], k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                plgpu.barrier_wait(ready.at[slot])
                for n in matrices:
                    columns = pl.ds(n * shape.columns, shape.columns)
                    plgpu.wgmma(acc.at[:, columns], x_smem.at[slot, rows], w_smem.at[slot, n])
                plgpu.wgmma_wait(len(matrices))  # the products before these have read their blocks
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(used.at[lax.rem(done + k - 1, config.stages)]))

            for span in spans:
                lax.fori_loop(*span.within(item), functools.partial(step, span.matrices), None)
                plgpu.wgmma_wait(0)  # no product is under way from one loop to the next
            plgpu.barrier_arrive(used.at[lax.rem(done + item.end - item.begin - 1, config.stages)])
            return acc[...]

        acc = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, config.columns), jnp.float32))
        _store(shape, config, item, wg, acc, out_ref, out_smem)

    _over_items(shape, tiles, over_item)
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


class Source(NamedTuple):
    """What is multiplied in a span: rows, and the stack of each of its matrices."""

    span: Span
    rows: Ref
    stacks: list[Ref]


def _sources(shape: Shape, x_ref: Ref, operands: list[Ref]) -> list[list[Source]]:
    """The sources of each result. Operands are all weights, then rows and stack of each that is added."""
    results, matrices = len(shape.added), shape.matrices
    weights, more = operands[: results * matrices], iter(operands[results * matrices :])
    sources = []
    for result in range(results):
        first, *added = _spans(shape, result)
        whole = Source(first, x_ref, weights[result * matrices : (result + 1) * matrices])
        sources.append([whole, *(Source(span, next(more), [next(more)]) for span in added)])
    return sources


def _fetch(shape: Shape, config: Config, tiles: Wanted, results: list[list[Source]], scratch: Scratch) -> None:
    x_smem, w_smem, _, ready, used = scratch
    # Of few rows, only the first rows of a block are filled. The others keep what they held; nothing of them is stored.
    filled = pl.ds(0, shape.fetched)

    def over_item(item: Item, done: Array) -> None:
        which = tiles.matrices[item.row]

        def copy_from(sources: list[Source], first: int) -> None:
            def step(source: Source, k: Array, _: None) -> None:
                slot = lax.rem(done + k, config.stages)
                pl.when(done + k >= config.stages)(lambda: plgpu.barrier_wait(used.at[slot]))
                rows = pl.ds(item.row * shape.fetched, shape.fetched)
                block = item.begin + k - source.span.begin
                read = pl.ds((block + source.span.block) * DEPTH, DEPTH)
                inputs = pl.ds(block * DEPTH, DEPTH)
                columns = pl.ds((item.column - first) * shape.columns, shape.columns)
                plgpu.copy_gmem_to_smem(source.rows.at[rows, read], x_smem.at[slot, filled], ready.at[slot])
                for n, stack in zip(source.span.matrices, source.stacks, strict=True):
                    matrix, target = stack.at[which, inputs, columns], w_smem.at[slot, n]
                    for part in _parts(shape, source):
                        plgpu.copy_gmem_to_smem(matrix.at[part], target.at[part], ready.at[slot])

            for source in sources:
                lax.fori_loop(*source.span.within(item), functools.partial(step, source), None)

        for (begin, end), sources in zip(_columns(shape), results, strict=True):
            mine = (item.column >= begin) & (item.column < end)
            pl.when(mine)(functools.partial(copy_from, sources, begin))

    steps = _over_items(shape, tiles, over_item)
    drain((used,), 0, steps, config.stages)


def _parts(shape: Shape, source: Source) -> list[Any]:
    """The rows of a block of weights in the parts that bring it: the barrier counts as many copies in each step."""
    count = shape.matrices // len(source.stacks)
    return [pl.ds(n * DEPTH // count, DEPTH // count) for n in range(count)] if count > 1 else [slice(None)]
