"""Residual and norm of few rows for Hopper GPUs, by Pallas' Mosaic GPU: one launch for three passes over little data.

A program has a row, and each of its warps a line of the row, so that the mean square is a sum over lanes, and then one
over warps in shared memory. All that a thread reads is loaded before it waits for any of it: a row of a decode step
takes as long as the memory answers. Of more rows than a decode step has, a program takes several, one after the other,
up to the last that is wanted. On a mesh it adds the devices' parts too, by their mailboxes.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from sparsex_kernels import mosaic, mosaic_mailboxes
from sparsex_kernels.arguments import AddNormArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.mosaic import Ref
from sparsex_kernels.product_parts import FEW_ROWS, MOST_ROWS

AT_ONCE = 2 * mosaic.MULTIPROCESSORS  # programs of more rows
WARPS = 4  # of a warpgroup
WARPGROUPS = (4, 2, 1)  # of a program: the first whose warps share a row evenly
LINE = 128  # numbers that a warp reads at a time, four a lane
# Lines of a row: `[warps, numbers]`, a warp's numbers in its lanes.
LINES = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LINE), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


class Shape(NamedTuple):
    """Static sizes of one call."""

    programs: int
    warpgroups: int
    width: int
    dtype: Any
    eps: float
    counts_parts: bool  # whether the number of parts is data
    counts_rows: bool  # whether that of the rows that are wanted is
    mailboxes: mosaic_mailboxes.Rows | None  # None: the product is whole

    @property
    def turns(self) -> tuple[int, ...]:
        """An axis for squares of two rows, where a program takes one after the other."""
        return (2,) if self.counts_rows else ()


def add_norm(args: AddNormArgs) -> tuple[Float[Array, "rows width"], Float[Array, "rows width"]]:
    """See `sparsex_kernels.add_norm`."""
    rows, width = args.residual.shape
    room = None if args.mailboxes is None else args.mailboxes.rows
    if reason := refusal(rows, width, args.residual.dtype, args.backend, mailboxes=room):
        raise NotImplementedError(reason)
    if args.mailboxes is not None and args.count is None:
        args = dataclasses.replace(args, count=rows)  # so that a row belongs to the same program as in other sums
    shape = _shape(args)
    lines = (shape.warpgroups, WARPS, width // (shape.warpgroups * WARPS))
    out = jax.ShapeDtypeStruct((rows, *lines), args.residual.dtype)
    run = mosaic.kernel(
        functools.partial(_kernel, shape),
        args.backend,
        out_type=(out, out),
        grid=(shape.programs,),
        grid_names=("row",),
        num_threads=shape.warpgroups,
        scratch_types={
            "squares": plgpu.SMEM((*shape.turns, shape.warpgroups, WARPS), jnp.float32),
            "summed": plgpu.Barrier(num_arrivals=shape.warpgroups),
        },
    )
    parts, used = args.product
    operands = (x.reshape(*x.shape[:-1], *lines) for x in (parts, args.residual, args.scales))
    limits = (used, args.count if rows > FEW_ROWS else None)
    scalars = (mosaic.as_scalar(x) for x in (args.layer, *limits) if x is not None)
    mailboxes = [] if args.mailboxes is None else [args.mailboxes.memory, args.mailboxes.table]
    hidden, normed = run(*operands, *scalars, *mailboxes)
    return hidden.reshape(rows, width), normed.reshape(rows, width)


def refusal(rows: int, width: int, dtype: Any, backend: Backend, *, mailboxes: int | None = None) -> str:
    """Why the kernel cannot take these rows; empty if it can.

    Args:
      mailboxes: the rows that they have room for, if there are any.
    """
    most = MOST_ROWS if mailboxes is None else mailboxes
    if rows > most or width % (WARPS * LINE):
        return f"{rows} rows of {width}; the kernel takes up to {most}, of a multiple of {WARPS * LINE}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"rows of {dtype}; the kernel takes bfloat16 or float16"
    if mailboxes is not None and backend.interpreted:
        return f"mailboxes on {backend}; the kernel has them on GPUs"
    return ""


def _shape(args: AddNormArgs) -> Shape:
    rows, width = args.residual.shape
    warpgroups = next(n for n in WARPGROUPS if width % (n * WARPS * LINE) == 0)
    counts = args.product.used is not None, rows > FEW_ROWS and args.count is not None
    programs = min(rows, AT_ONCE) if counts[1] else rows
    mailboxes = None if args.mailboxes is None else mosaic_mailboxes.Rows(args.mailboxes.rows, width, LINES)
    return Shape(programs, warpgroups, width, args.residual.dtype, args.eps, *counts, mailboxes)


class Operands(NamedTuple):
    """What a program reads: `[..., warpgroups, warps, numbers]`, and scalars."""

    parts: Ref
    residual: Ref
    scales: Ref
    layer: Ref
    num_parts: Ref | None


def _kernel(shape: Shape, *refs: Ref, squares: Ref, summed: Ref) -> None:
    parts, residual, scales, layer, *others, hidden_ref, normed_ref = refs
    table, _ = (others.pop(), others.pop()) if shape.mailboxes else (None, None)
    num_rows = others.pop() if shape.counts_rows else None
    num_parts = others.pop() if shape.counts_parts else None
    operands = Operands(parts, residual, scales, layer, num_parts)
    first, wg = lax.axis_index("row"), lax.axis_index("wg")
    over_devices = shape.mailboxes and mosaic_mailboxes.begin_sum(table, first, shape.mailboxes)

    def run(turn: Array | int, _: None = None) -> None:
        row = first + turn * shape.programs if shape.counts_rows else first
        # While a warpgroup reads the squares of this row, another may write those of the next, but of none behind it.
        own = squares.at[lax.rem(turn, 2)] if shape.counts_rows else squares
        _add_norm(shape, operands, over_devices, row, wg, hidden_ref.at[row, wg], normed_ref.at[row, wg], own, summed)

    def end() -> None:
        if over_devices is not None:
            mosaic_mailboxes.end_sum(over_devices)

    if num_rows is None:
        run(0)
        end()
    else:
        turns = lax.div(num_rows[0] - first + shape.programs - 1, shape.programs)
        lax.fori_loop(0, turns, run, None)
        pl.when(turns > 0)(end)


def _add_norm(
    shape: Shape,
    operands: Operands,
    over_devices: mosaic_mailboxes.Sum | None,
    row: Array,
    wg: Array,
    hidden_ref: Ref,
    normed_ref: Ref,
    squares: Ref,
    summed: Ref,
) -> None:
    number = operands.layer[0]
    loaded = _load_parts(operands, row, wg)
    before = _load(operands.residual.at[row, wg])
    scale = plgpu.load(operands.scales.at[number, wg], layout=LINES, optimized=False)
    product = functools.reduce(operator.add, loaded).astype(shape.dtype)
    if over_devices is not None:
        product = mosaic_mailboxes.sum_over_devices(over_devices, row, product).astype(shape.dtype)
    hidden = (before + product.astype(jnp.float32)).astype(shape.dtype)
    wide = hidden.astype(jnp.float32)
    squares[wg] = (wide * wide).sum(axis=1)
    plgpu.barrier_arrive(summed)
    hidden_ref[...] = hidden
    plgpu.barrier_wait(summed)
    total = functools.reduce(operator.add, (squares[n, warp] for n in range(shape.warpgroups) for warp in range(WARPS)))
    normed = (wide * lax.rsqrt(total / shape.width + shape.eps)).astype(scale.dtype)
    # A product of two bfloat16 is exact in float32, so this rounds as one in bfloat16 does.
    out = scale.astype(jnp.float32) * normed.astype(jnp.float32)
    normed_ref[...] = out.astype(shape.dtype)


def _load_parts(operands: Operands, row: Array, wg: Array) -> list[Array]:
    """The parts of a row's product; zeros for those that are not used."""
    refs = [operands.parts.at[part, row, wg] for part in range(operands.parts.shape[0])]
    return [part.astype(jnp.float32) for part in mosaic.load_parts(refs, operands.num_parts, LINES)]


def _load(ref: Ref) -> Array:
    return plgpu.load(ref, layout=LINES, optimized=False).astype(jnp.float32)
