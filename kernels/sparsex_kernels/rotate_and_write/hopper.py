"""Rotation and write of few rows for Hopper GPUs, by Pallas' Mosaic GPU: one launch for four passes over little data.

A program has four heads of a row, one a warp: of queries, of keys or of values. Its threads add the parts of the
product in registers and store where the head belongs. All loads are under way before one is waited for.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import RotateArgs
from sparsex_kernels.layout import Queries, Store, row_addresses
from sparsex_kernels.mosaic import Ref

MOST_ROWS = 64
HEADS = 4  # of a program: one a warp
LANES = 32


class Shape(NamedTuple):
    """Static sizes of one call."""

    q_heads: int
    kv_heads: int
    half: int
    pages: int  # of a layer
    dtype: Any

    @property
    def layout(self) -> Any:
        """Of half of each head: a head's numbers in the lanes of its warp."""
        tiling = plgpu.Tiling(((HEADS, self.half), (self.half // LANES,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def rotate_and_write(args: RotateArgs) -> tuple[Queries, Store]:
    """See `sparsex_kernels.rotate_and_write`."""
    _check(args)
    store, rows, half = args.store, len(args.positions), args.head_dim // 2
    shape = Shape(args.q_heads, args.kv_heads, half, store.shape[1], args.dtype)
    page, offset = row_addresses(store, args.positions, args.requests, args.page_tables)
    page = jnp.where(page < store.shape[1], page, -1)
    angles = args.positions[:, None].astype(jnp.float32) * args.inv_freq
    parts = args.product.parts.reshape(-1, rows, args.product.width // args.head_dim, 2, half)
    ref = jax.new_ref(mosaic.flat_store(store))
    run = mosaic.kernel(
        functools.partial(_kernel, shape),
        args.backend,
        out_type=jax.ShapeDtypeStruct((rows, shape.q_heads, 2, half), args.dtype),
        grid=(rows, parts.shape[2] // HEADS),
        grid_names=("row", "group"),
        num_threads=1,
    )
    addresses = mosaic.as_scalar(args.layer), page.astype(jnp.int32), offset.astype(jnp.int32)
    q = run(parts, _for_each_head(jnp.cos(angles)), _for_each_head(jnp.sin(angles)), *addresses, ref)
    return q.reshape(rows, shape.q_heads, args.head_dim), jax.freeze(ref).reshape(store.shape)


def _for_each_head(x: Array) -> Array:
    """What all heads of a program use, once for each: its warps load their own."""
    return jnp.broadcast_to(x[:, None], (len(x), HEADS, x.shape[1]))


def _check(args: RotateArgs) -> None:
    """Raise `NotImplementedError` where this shape or dtype cannot be done."""
    rows, store = len(args.positions), args.store
    if args.dtype not in (jnp.bfloat16, jnp.float16) or store.dtype != args.dtype:
        raise NotImplementedError(
            f"rows of {args.dtype} on a store of {store.dtype}; the kernel takes 16 bits for both"
        )
    if args.product.used is not None:
        raise NotImplementedError("a number of parts that is data; the kernel adds all parts")
    if rows > MOST_ROWS or args.q_heads % HEADS or args.kv_heads % HEADS or args.head_dim % (2 * LANES):
        raise NotImplementedError(
            f"{rows} rows of {args.q_heads} and {args.kv_heads} heads of {args.head_dim}; the kernel takes up to "
            f"{MOST_ROWS}, multiples of {HEADS} heads of multiples of {2 * LANES}"
        )


def _kernel(
    shape: Shape, parts: Ref, cos: Ref, sin: Ref, layer: Ref, page_ref: Ref, offset_ref: Ref, store: Ref, q_ref: Ref
) -> None:
    row, first = lax.axis_index("row"), lax.axis_index("group") * HEADS
    heads, load = pl.ds(first, HEADS), functools.partial(plgpu.load, layout=shape.layout, optimized=False)
    page, offset, first_page = page_ref[row], offset_ref[row], layer[0] * shape.pages
    loaded = [[load(parts.at[part, row, heads, side]) for part in range(parts.shape[0])] for side in range(2)]
    c, s = load(cos.at[row]), load(sin.at[row])
    x, y = (functools.reduce(operator.add, side).astype(shape.dtype) for side in loaded)
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    rotated = (wide_x * c - wide_y * s).astype(shape.dtype), (wide_y * c + wide_x * s).astype(shape.dtype)

    @pl.when(first < shape.q_heads)
    def store_queries() -> None:
        for side, half in enumerate(rotated):
            q_ref.at[row, heads, side][...] = half

    # The heads of a page are those of K, and then those of V.
    own = first - shape.q_heads
    for is_kind, halves in ((own < shape.kv_heads, rotated), (own >= shape.kv_heads, (x, y))):

        @pl.when((own >= 0) & is_kind & (page >= 0))
        def store_heads(halves: tuple[Array, Array] = halves) -> None:
            for side, half in enumerate(halves):
                columns = pl.ds(side * shape.half, shape.half)
                store.at[first_page + page, pl.ds(own, HEADS), offset, columns][...] = half
