"""Rotation and write of few rows for Hopper GPUs, by Pallas' Mosaic GPU: one launch for four passes over little data.

A program has four heads of a row, one a warp: of queries, of keys or of values. Its threads add the parts of the
product in registers and store where the head belongs. All loads are under way before one is waited for. Of more rows
than a decode step has, a program takes several, one after the other.
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
from sparsex_kernels.arguments import Heads, RotateArgs
from sparsex_kernels.layout import Queries, Store, row_addresses
from sparsex_kernels.mosaic import Ref
from sparsex_kernels.product_parts import FEW_ROWS, MOST_ROWS

AT_ONCE = 256  # of more rows; programs go from one to the next, up to the last that is wanted
HEADS = 4  # of a program: one a warp
LANES = 32


class Shape(NamedTuple):
    """Static sizes of one call."""

    q_heads: int
    kv_heads: int
    half: int
    pages: int  # of a layer
    dtype: Any
    at_once: int  # rows
    counts_parts: bool  # whether the number of parts is data

    @property
    def layout(self) -> Any:
        """Of half of each head: a head's numbers in the lanes of its warp."""
        tiling = plgpu.Tiling(((HEADS, self.half), (self.half // LANES,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def rotate_and_write(args: RotateArgs) -> tuple[Queries, Store]:
    """See `sparsex_kernels.rotate_and_write`."""
    _check(args)
    store, rows, half = args.store, len(args.positions), args.heads.dim // 2
    at_once = rows if rows <= FEW_ROWS else AT_ONCE
    product, used = args.product
    shape = Shape(args.heads.queries, args.heads.keys, half, store.shape[1], args.dtype, at_once, used is not None)
    page, offset = row_addresses(store, args.positions, args.requests, args.page_tables)
    page = jnp.where(page < store.shape[1], page, -1)
    angles = args.positions[:, None].astype(jnp.float32) * args.inv_freq
    parts = product.reshape(len(product), rows, -1, 2, half)
    ref = jax.new_ref(mosaic.flat_store(store))
    run = mosaic.kernel(
        functools.partial(_kernel, shape),
        args.backend,
        out_type=jax.ShapeDtypeStruct((rows, shape.q_heads, 2, half), args.dtype),
        grid=(at_once, parts.shape[2] // HEADS),
        grid_names=("row", "group"),
        num_threads=1,
    )
    addresses = mosaic.as_scalar(args.layer), page.astype(jnp.int32), offset.astype(jnp.int32)
    count = None if rows <= FEW_ROWS else rows if args.count is None else args.count
    limits = (mosaic.as_scalar(limit) for limit in (used, count) if limit is not None)
    q = run(parts, _for_each_head(jnp.cos(angles)), _for_each_head(jnp.sin(angles)), *addresses, *limits, ref)
    return q.reshape(rows, shape.q_heads, args.heads.dim), jax.freeze(ref).reshape(store.shape)


def _for_each_head(x: Array) -> Array:
    """What all heads of a program use, once for each: its warps load their own."""
    return jnp.broadcast_to(x[:, None], (len(x), HEADS, x.shape[1]))


def _check(args: RotateArgs) -> None:
    """Raise `NotImplementedError` where this shape or dtype cannot be done."""
    if reason := refusal(len(args.positions), args.heads, args.dtype, args.store.dtype):
        raise NotImplementedError(reason)


def refusal(rows: int, heads: Heads, dtype: Any, stored: Any) -> str:
    """Why the kernel cannot take this number of rows with these heads; empty if it can.

    Args:
      dtype: of the queries.
      stored: the dtype of the store.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or stored != dtype:
        return f"rows of {dtype} on a store of {stored}; the kernel takes 16 bits for both"
    if rows > MOST_ROWS or heads.queries % HEADS or heads.keys % HEADS or heads.dim % (2 * LANES):
        about = f"{rows} rows of {heads.queries} and {heads.keys} heads of {heads.dim}"
        limits = f"up to {MOST_ROWS}, multiples of {HEADS} heads of multiples of {2 * LANES}"
        return f"{about}; the kernel takes {limits}"
    return ""


class Operands(NamedTuple):
    """What a program reads."""

    parts: Ref  # [parts, rows, heads, 2, half]
    cos: Ref  # [rows, HEADS, half]
    sin: Ref
    layer: Ref
    pages: Ref
    offsets: Ref
    num_parts: Ref | None


def _kernel(shape: Shape, *refs: Ref) -> None:
    parts, cos, sin, layer, pages, offsets, *limits, store, q_ref = refs
    num_parts = limits[0] if shape.counts_parts else None
    operands = Operands(parts, cos, sin, layer, pages, offsets, num_parts)
    first = lax.axis_index("row")
    if shape.at_once <= FEW_ROWS:
        _run_row(shape, operands, first, store, q_ref)
        return

    def step(i: Array, _: None) -> None:
        _run_row(shape, operands, first + i * shape.at_once, store, q_ref)

    mine = lax.div(limits[-1][0] - first + shape.at_once - 1, shape.at_once)
    lax.fori_loop(0, mine, step, None)


def _run_row(shape: Shape, operands: Operands, row: Array, store: Ref, q_ref: Ref) -> None:
    first = lax.axis_index("group") * HEADS
    heads, load = pl.ds(first, HEADS), functools.partial(plgpu.load, layout=shape.layout, optimized=False)
    page, offset = operands.pages[row], operands.offsets[row]
    first_page = operands.layer[0] * shape.pages
    loaded = [_load_parts(shape, operands, row, heads, side) for side in range(2)]
    c, s = load(operands.cos.at[row]), load(operands.sin.at[row])
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


def _load_parts(shape: Shape, operands: Operands, row: Array, heads: Any, side: int) -> list[Array]:
    """The parts of one side of a program's heads; zeros for those that are not used."""
    refs = [operands.parts.at[part, row, heads, side] for part in range(operands.parts.shape[0])]
    return mosaic.load_parts(refs, operands.num_parts, shape.layout)
