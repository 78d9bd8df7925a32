"""Alignment for Hopper GPUs, all layers in one call, by Pallas' Mosaic GPU.

A program has a tile of tokens and goes through the layers, some layers in flight by TMA; the rotation stays in its
registers. A tile whose tokens are consecutive in one page, at the source and at the target, is a *run* and moves head
by head; any other moves token by token. K is `[head, token]` in shared memory for a run and `[token, head]` otherwise.
The rotations are laid out the same way, so the arithmetic is the same for both.

With spans, a program goes through those layers that any token of its tile moves, if there are any, and a run also has
the same layers throughout. Where patches and sources alternate in blocks, tiles within a block are runs, and those at
its borders move token by token: all eight are loaded and those of the block saved.

With heads of 128, the halves of K that rotate into each other are in separate buffers: Mosaic mixes up columns when it
loads the second 64 of 128 (seen with JAX 0.11.2 on an H100). With heads of 64 they share one, because TMA does not take
the address at which the second half would start.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_kernels.align_and_copy.runs import by_runs
from sparsex_kernels.align_and_copy.spans import within
from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import FLOAT8, Slots, Store, pad_rows
from sparsex_kernels.mosaic import Ref, check_copies, flat_store, kernel

STAGES = 3  # layers in flight
AS_IS = 2.0  # in place of a cosine: the key keeps its bits


class Shape(NamedTuple):
    """Static sizes of one call."""

    layers: int
    pages: int
    heads: int
    page_size: int
    head_dim: int
    tile: int  # tokens
    dtype: Any

    @property
    def rows(self) -> int:
        return self.tile * self.heads

    @property
    def k_parts(self) -> int:
        """Columns of 64 that lie apart in shared memory."""
        return self.head_dim // 64


class TileSpans(NamedTuple):
    """Which layers move, by tile and by token."""

    begin: Int[Array, "tiles"]  # the first layer that any token of a tile moves
    end: Int[Array, "tiles"]  # the first behind those; no more than `begin` where there are none
    first: Int[Array, "tokens"]
    past: Int[Array, "tokens"]
    offset: Int[Array, "tokens"]  # the source's layer minus the target's


class Inputs(NamedTuple):
    """What a kernel reads besides the store; in its body, the references."""

    layers: Int[Array, "2"]
    source: Int[Array, "tokens"]
    target: Int[Array, "tokens"]
    run: Int[Array, "tiles"]
    cos: Float[Array, "tiles rows half"] | None = None
    sin: Float[Array, "tiles rows half"] | None = None
    spans: TileSpans | None = None


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    return by_runs(args, _align)


def _align(args: CopyArgs) -> Store:
    store = args.store
    check_copies(store)
    layers, pages, _, heads, page_size, head_dim = store.shape
    # The rows [token, head] of a tile fill whole warps.
    shape = Shape(layers, pages, heads, page_size, head_dim, max(8, 32 // math.gcd(heads, 32)), store.dtype)
    if store.dtype == FLOAT8 and heads % 2:
        raise NotImplementedError(f"{heads} KV heads of {FLOAT8}; TMA puts tokens at multiples of 128 bytes")
    if shape.tile > page_size or head_dim not in (64, 128):
        raise NotImplementedError(f"tiles of {shape.tile} tokens on pages of {page_size}, head_dim {head_dim}")
    inputs, tree = jax.tree.flatten(_inputs(args, shape))
    ref = jax.new_ref(flat_store(store))
    kernel(
        functools.partial(_kernel, shape, tree),
        args.backend,
        grid=(-(-len(args.source) // shape.tile),),
        grid_names=("tile",),
        num_threads=1,
        scratch_types={
            "k_smem": plgpu.SMEM((STAGES, shape.k_parts, shape.rows, 64), store.dtype),
            "v_smem": plgpu.SMEM((STAGES, shape.rows, head_dim), store.dtype),
            "run_ready": plgpu.Barrier(num_arrivals=(shape.k_parts + 1) * heads, num_barriers=STAGES),
            "tokens_ready": plgpu.Barrier(num_arrivals=(shape.k_parts + 1) * shape.tile, num_barriers=STAGES),
        },
    )(*inputs, ref)
    return jax.freeze(ref).reshape(store.shape)


def _inputs(args: CopyArgs, shape: Shape) -> Inputs:
    source, shift = (pad_rows(x, shape.tile) for x in (args.source, args.shift))
    target = pad_rows(args.target, shape.tile, -1)
    run, spans = one_run(source, target, shape), None
    if args.spans is not None:
        spans, alike = tile_spans(args, shape)
        run &= alike
    inputs = Inputs(args.layers, source, target, run.astype(jnp.int32), spans=spans)
    if args.inv_freq is None:
        return inputs
    as_is = None if args.spans is None else pad_rows(args.spans.as_is, shape.tile)
    cos, sin = rotations(shift, args.inv_freq, run, shape, as_is)
    return inputs._replace(cos=cos, sin=sin)


def tile_spans(args: CopyArgs, shape: Shape) -> tuple[TileSpans, Bool[Array, "tiles"]]:
    """The layers of every tile and token, and whether all tokens of a tile have the same ones."""
    assert args.spans is not None
    within_layers, moved = within(args.spans, args.target, args.layers)
    first, past, offset = (pad_rows(x, shape.tile) for x in within_layers[:3])
    moved = pad_rows(moved, shape.tile)
    begin = jnp.where(moved, first, shape.layers).reshape(-1, shape.tile).min(1)
    end = jnp.where(moved, past, 0).reshape(-1, shape.tile).max(1)
    by_tile = jnp.stack([first, past, offset]).reshape(3, -1, shape.tile)
    return TileSpans(begin, end, first, past, offset), (by_tile == by_tile[..., :1]).all((0, 2))


def one_run(source: Slots, target: Slots, shape: Shape) -> Bool[Array, "tiles"]:
    """Whether a tile's tokens are consecutive in one page, at both ends.

    With pages of 8 slots and tiles of 4 tokens, 2 3 4 5 is a run; 6 7 8 9, of two pages, is none.
    """

    def consecutive(slots: Array) -> Array:
        slots = slots.reshape(-1, shape.tile)
        follow = slots == slots[:, :1] + jnp.arange(shape.tile)
        return follow.all(1) & (slots[:, 0] % shape.page_size <= shape.page_size - shape.tile) & (slots[:, 0] >= 0)

    return consecutive(source) & consecutive(target)


def rotations(
    shift: Slots,
    inv_freq: Float[Array, "half"],
    run: Bool[Array, "tiles"],
    shape: Shape,
    as_is: Bool[Array, "tokens"] | None = None,
) -> tuple[Float[Array, "tiles rows half"], Float[Array, "tiles rows half"]]:
    """Cosines and sines for the rows of every tile, in float32 and in the order that its K has in shared memory.

    Rows of tokens that move as they are have `AS_IS` for a cosine.

    With 2 heads and tiles of 3 tokens, the rows of a run are those of tokens 0 1 2 0 1 2 (head by head), and those of
    other tiles 0 0 1 1 2 2.
    """
    row = jnp.arange(shape.rows)
    token = jnp.where(run[:, None], row % shape.tile, row // shape.heads)
    angles = jnp.take_along_axis(shift.reshape(-1, shape.tile), token, 1)[..., None].astype(jnp.float32) * inv_freq
    cos = jnp.cos(angles)
    if as_is is not None:
        kept = jnp.take_along_axis(as_is.reshape(-1, shape.tile), token, 1)
        cos = jnp.where(kept[..., None], AS_IS, cos)
    return cos, jnp.sin(angles)


def _row_layout(shape: Shape) -> Any:
    """Registers for `[rows, head_dim / 2]`: 8 numbers a thread, 16 bytes of bfloat16, or 4 of 16 bytes of float32."""
    half, vector = shape.head_dim // 2, min(16 // jnp.dtype(shape.dtype).itemsize, 8)
    warp_rows = 32 * vector // half
    tiling = plgpu.Tiling(((4 * warp_rows, half), (warp_rows, half), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _kernel(shape: Shape, tree: Any, *refs: Ref, **scratch: Ref) -> None:
    *inputs, store = refs
    given = jax.tree.unflatten(tree, inputs)
    if given.spans is None:
        _move_tile(shape, given, store, given.layers[0], given.layers[1], **scratch)
        return
    tile = lax.axis_index("tile")
    begin, end = given.spans.begin[tile], given.spans.end[tile]
    pl.when(begin < end)(lambda: _move_tile(shape, given, store, begin, end, **scratch))


def _move_tile(
    shape: Shape,
    given: Any,  # `Inputs`, of references
    store: Ref,
    first_layer: Array,
    end_layer: Array,
    *,
    k_smem: Ref,
    v_smem: Ref,
    run_ready: Ref,
    tokens_ready: Ref,
) -> None:
    tile, half = lax.axis_index("tile"), shape.head_dim // 2
    layout, spans = _row_layout(shape), given.spans
    run = given.run[tile] > 0

    def of_tokens(ref: Ref) -> list[Array]:
        return [ref[tile * shape.tile + n] for n in range(shape.tile)]

    # All addresses are read at once: one by one, each would wait for memory.
    sources, targets = of_tokens(given.source), of_tokens(given.target)
    if spans is not None:
        firsts, pasts, offsets = map(of_tokens, (spans.first, spans.past, spans.offset))
    if given.cos is not None:
        cos, sin = (plgpu.load(ref.at[tile], layout=layout, optimized=False) for ref in (given.cos, given.sin))

    def source_layer(layer: Array, n: int) -> Array:
        """Of any token in any layer of the tile: those that do not move then are loaded, too, and not saved."""
        return layer if spans is None else jnp.clip(layer + offsets[n], 0, shape.layers - 1)

    def moves(layer: Array, n: int) -> Array:
        moved = targets[n] >= 0
        return moved if spans is None else moved & (layer >= firsts[n]) & (layer < pasts[n])

    def pieces(layer: Array, layers: list[Array], slots: list[Array]) -> Iterator[tuple[Ref, Ref, int]]:
        """The copies of one layer: a part of the store, its place in shared memory, and the token it begins at.

        Args:
          layers: of the store; the layer itself, except at the source of tokens with spans.
        """
        stage = lax.rem(layer, STAGES)
        blocks = [(0, pl.ds(64 * part, 64), k_smem.at[stage, part]) for part in range(shape.k_parts)]
        blocks.append((1, pl.ds(0, shape.head_dim), v_smem.at[stage]))
        for kind, columns, smem in blocks:
            for n, (at, slot) in enumerate(zip(layers, slots, strict=True)):
                page, offset = at * shape.pages + lax.div(slot, shape.page_size), lax.rem(slot, shape.page_size)
                if len(slots) > 1:
                    heads = pl.ds(kind * shape.heads, shape.heads)
                    yield store.at[page, heads, offset, columns], smem.at[pl.ds(n * shape.heads, shape.heads)], n
                    continue
                for head in range(shape.heads):  # a run
                    part = store.at[page, kind * shape.heads + head, pl.ds(offset, shape.tile), columns]
                    yield part, smem.at[pl.ds(head * shape.tile, shape.tile)], n

    def load(layer: Array) -> None:
        def copy(slots: list[Array], ready: Ref) -> None:
            layers = [source_layer(layer, n) for n in range(len(slots))]
            for part, smem, _ in pieces(layer, layers, slots):
                plgpu.copy_gmem_to_smem(part, smem, ready.at[lax.rem(layer, STAGES)])

        pl.when(run)(lambda: copy(sources[:1], run_ready))
        pl.when(~run)(lambda: copy(sources, tokens_ready))

    def save(layer: Array) -> None:
        def copy_run() -> None:
            for part, smem, _ in pieces(layer, [layer], targets[:1]):
                plgpu.copy_smem_to_gmem(smem, part, commit_group=False)

        def copy_tokens() -> None:
            for part, smem, n in pieces(layer, [layer] * shape.tile, targets):

                @pl.when(moves(layer, n))
                def _(part: Ref = part, smem: Ref = smem) -> None:
                    plgpu.copy_smem_to_gmem(smem, part, commit_group=False)

        pl.when(run)(copy_run)
        pl.when(~run)(copy_tokens)
        plgpu.commit_smem_to_gmem_group()

    def narrowed(x: Array) -> Array:
        if shape.dtype == FLOAT8:  # its largest number is what becomes of larger ones
            most = float(jnp.finfo(FLOAT8).max)
            x = jnp.minimum(jnp.maximum(x, -most), most)
        return x.astype(shape.dtype)

    def rotate(stage: Array) -> None:
        if shape.k_parts > 1:
            ends = [k_smem.at[stage, 0], k_smem.at[stage, 1]]
        else:
            ends = [k_smem.at[stage, 0, :, pl.ds(begin, half)] for begin in (0, half)]
        first, second = (plgpu.load(end, layout=layout, optimized=False).astype(jnp.float32) for end in ends)
        new_first, new_second = first * cos - second * sin, second * cos + first * sin
        if spans is not None:
            new_first, new_second = (
                jnp.where(cos == AS_IS, first, new_first),
                jnp.where(cos == AS_IS, second, new_second),
            )
        ends[0][...], ends[1][...] = narrowed(new_first), narrowed(new_second)
        plgpu.commit_smem()

    def step(layer: Array, _: None) -> None:
        stage = lax.rem(layer, STAGES)

        pl.when(run)(lambda: plgpu.barrier_wait(run_ready.at[stage]))
        pl.when(~run)(lambda: plgpu.barrier_wait(tokens_ready.at[stage]))
        if given.cos is not None:
            rotate(stage)
        save(layer)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the layer before has left shared memory
        following = layer - 1 + STAGES

        pl.when((layer > first_layer) & (following < end_layer))(lambda: load(following))

    for ahead in range(STAGES):
        pl.when(first_layer + ahead < end_layer)(functools.partial(load, first_layer + ahead))
    lax.fori_loop(first_layer, end_layer, step, None)
    plgpu.wait_smem_to_gmem(0)
