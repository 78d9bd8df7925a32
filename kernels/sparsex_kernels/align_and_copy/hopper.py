"""Alignment for Hopper GPUs, all layers in one call, by Pallas' Mosaic GPU.

A program has a tile of tokens and goes through the layers, some layers in flight by TMA; the rotation stays in its
registers. A tile whose tokens are consecutive in one page, at the source and at the target, is a *run* and moves head
by head; any other moves token by token. K is `[head, token]` in shared memory for a run and `[token, head]` otherwise.
The rotations are laid out the same way, so the arithmetic is the same for both.

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
from jaxtyping import Bool, Float

from sparsex_kernels.align_and_copy.runs import by_runs
from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import FLOAT8, Slots, Store, pad_rows
from sparsex_kernels.mosaic import Ref, check_copies, flat_store, kernel

STAGES = 3  # layers in flight


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
    source, shift = (pad_rows(x, shape.tile) for x in (args.source, args.shift))
    target = pad_rows(args.target, shape.tile, -1)
    run = one_run(source, target, shape)
    ref = jax.new_ref(flat_store(store))
    kernel(
        functools.partial(_kernel, shape),
        args.backend,
        grid=(len(run),),
        grid_names=("tile",),
        num_threads=1,
        scratch_types={
            "k_smem": plgpu.SMEM((STAGES, shape.k_parts, shape.rows, 64), store.dtype),
            "v_smem": plgpu.SMEM((STAGES, shape.rows, head_dim), store.dtype),
            "run_ready": plgpu.Barrier(num_arrivals=(shape.k_parts + 1) * heads, num_barriers=STAGES),
            "tokens_ready": plgpu.Barrier(num_arrivals=(shape.k_parts + 1) * shape.tile, num_barriers=STAGES),
        },
    )(args.layers, source, target, run.astype(jnp.int32), *rotations(shift, args.inv_freq, run, shape), ref)
    return jax.freeze(ref).reshape(store.shape)


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
    shift: Slots, inv_freq: Float[Array, "half"], run: Bool[Array, "tiles"], shape: Shape
) -> tuple[Float[Array, "tiles rows half"], Float[Array, "tiles rows half"]]:
    """Cosines and sines for the rows of every tile, in float32 and in the order that its K has in shared memory.

    With 2 heads and tiles of 3 tokens, the rows of a run are those of tokens 0 1 2 0 1 2 (head by head), and those of
    other tiles 0 0 1 1 2 2.
    """
    row = jnp.arange(shape.rows)
    token = jnp.where(run[:, None], row % shape.tile, row // shape.heads)
    angles = jnp.take_along_axis(shift.reshape(-1, shape.tile), token, 1)[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def _row_layout(shape: Shape) -> Any:
    """Registers for `[rows, head_dim / 2]`: 8 numbers a thread, 16 bytes of bfloat16, or 4 of 16 bytes of float32."""
    half, vector = shape.head_dim // 2, min(16 // jnp.dtype(shape.dtype).itemsize, 8)
    warp_rows = 32 * vector // half
    tiling = plgpu.Tiling(((4 * warp_rows, half), (warp_rows, half), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _kernel(shape: Shape, *refs: Ref, k_smem: Ref, v_smem: Ref, run_ready: Ref, tokens_ready: Ref) -> None:
    layers_ref, source_ref, target_ref, run_ref, cos_ref, sin_ref, store = refs
    tile = lax.axis_index("tile")
    layout, half = _row_layout(shape), shape.head_dim // 2
    run = run_ref[tile] > 0
    first_layer, end_layer = layers_ref[0], layers_ref[1]
    # All addresses are read at once: one by one, each would wait for memory.
    sources = [source_ref[tile * shape.tile + n] for n in range(shape.tile)]
    targets = [target_ref[tile * shape.tile + n] for n in range(shape.tile)]
    cos, sin = (plgpu.load(ref.at[tile], layout=layout, optimized=False) for ref in (cos_ref, sin_ref))

    def pieces(layer: Array, slots: list[Array]) -> Iterator[tuple[Ref, Ref, Array]]:
        """The copies of one layer: a part of the store, its place in shared memory, and the slot it begins at."""
        stage = lax.rem(layer, STAGES)
        blocks = [(0, pl.ds(64 * part, 64), k_smem.at[stage, part]) for part in range(shape.k_parts)]
        blocks.append((1, pl.ds(0, shape.head_dim), v_smem.at[stage]))
        for kind, columns, smem in blocks:
            for n, slot in enumerate(slots):
                page, offset = layer * shape.pages + lax.div(slot, shape.page_size), lax.rem(slot, shape.page_size)
                if len(slots) > 1:
                    heads = pl.ds(kind * shape.heads, shape.heads)
                    yield store.at[page, heads, offset, columns], smem.at[pl.ds(n * shape.heads, shape.heads)], slot
                    continue
                for head in range(shape.heads):  # a run
                    part = store.at[page, kind * shape.heads + head, pl.ds(offset, shape.tile), columns]
                    yield part, smem.at[pl.ds(head * shape.tile, shape.tile)], slot

    def load(layer: Array) -> None:
        def copy(slots: list[Array], ready: Ref) -> None:
            for part, smem, _ in pieces(layer, slots):
                plgpu.copy_gmem_to_smem(part, smem, ready.at[lax.rem(layer, STAGES)])

        pl.when(run)(lambda: copy(sources[:1], run_ready))
        pl.when(~run)(lambda: copy(sources, tokens_ready))

    def save(layer: Array) -> None:
        def copy_run() -> None:
            for part, smem, _ in pieces(layer, targets[:1]):
                plgpu.copy_smem_to_gmem(smem, part, commit_group=False)

        def copy_tokens() -> None:
            for part, smem, target in pieces(layer, targets):

                @pl.when(target >= 0)
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
        ends[0][...] = narrowed(first * cos - second * sin)
        ends[1][...] = narrowed(second * cos + first * sin)
        plgpu.commit_smem()

    def step(layer: Array, _: None) -> None:
        stage = lax.rem(layer, STAGES)

        pl.when(run)(lambda: plgpu.barrier_wait(run_ready.at[stage]))
        pl.when(~run)(lambda: plgpu.barrier_wait(tokens_ready.at[stage]))
        rotate(stage)
        save(layer)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the layer before has left shared memory
        following = layer - 1 + STAGES

        pl.when((layer > first_layer) & (following < end_layer))(lambda: load(following))

    for ahead in range(STAGES):
        pl.when(first_layer + ahead < end_layer)(functools.partial(load, first_layer + ahead))
    lax.fori_loop(first_layer, end_layer, step, None)
    plgpu.wait_smem_to_gmem(0)
