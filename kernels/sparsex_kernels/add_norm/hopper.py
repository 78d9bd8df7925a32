"""Residual and norm of few rows for Hopper GPUs, by Pallas' Mosaic GPU: one launch for three passes over little data.

A program has a row, and each of its warps a line of the row, so that the mean square is a sum over lanes, and then one
over warps in shared memory. All that a thread reads is loaded before it waits for any of it: a row of a decode step
takes as long as the memory answers. Of more rows than a decode step has, a program takes several, one after the other,
up to the last that is wanted.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import AddNormArgs
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

    @property
    def turns(self) -> tuple[int, ...]:
        """An axis for squares of two rows, where a program takes one after the other."""
        return (2,) if self.counts_rows else ()


def add_norm(args: AddNormArgs) -> tuple[Float[Array, "rows width"], Float[Array, "rows width"]]:
    """See `sparsex_kernels.add_norm`."""
    rows, width = args.residual.shape
    _check(args)
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
    hidden, normed = run(*operands, *scalars)
    return hidden.reshape(rows, width), normed.reshape(rows, width)


def _check(args: AddNormArgs) -> None:
    """Raise `NotImplementedError` where this shape or dtype cannot be done."""
    rows, width = args.residual.shape
    if rows > MOST_ROWS or width % (WARPS * LINE):
        raise NotImplementedError(
            f"{rows} rows of {width}; the kernel takes up to {MOST_ROWS}, of a multiple of {WARPS * LINE}"
        )
    if args.residual.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"rows of {args.residual.dtype}; the kernel takes bfloat16 or float16")


def _shape(args: AddNormArgs) -> Shape:
    rows, width = args.residual.shape
    warpgroups = next(n for n in WARPGROUPS if width % (n * WARPS * LINE) == 0)
    counts = args.product.used is not None, rows > FEW_ROWS and args.count is not None
    programs = min(rows, AT_ONCE) if counts[1] else rows
    return Shape(programs, warpgroups, width, args.residual.dtype, args.eps, *counts)


class Operands(NamedTuple):
    """What a program reads: `[..., warpgroups, warps, numbers]`, and scalars."""

    parts: Ref
    residual: Ref
    scales: Ref
    layer: Ref
    num_parts: Ref | None
    num_rows: Ref | None


def _kernel(shape: Shape, *refs: Ref, squares: Ref, summed: Ref) -> None:
    parts, residual, scales, layer, *limits, hidden_ref, normed_ref = refs
    num_parts = limits[0] if shape.counts_parts else None
    num_rows = limits[-1] if shape.counts_rows else None
    operands = Operands(parts, residual, scales, layer, num_parts, num_rows)
    first, wg = lax.axis_index("row"), lax.axis_index("wg")

    def run(turn: Array | int, _: None = None) -> None:
        row = first + turn * shape.programs if shape.counts_rows else first
        # While a warpgroup reads the squares of this row, another may write those of the next, but of none behind it.
        own = squares.at[lax.rem(turn, 2)] if shape.counts_rows else squares
        _add_norm(shape, operands, row, wg, hidden_ref.at[row, wg], normed_ref.at[row, wg], own, summed)

    if num_rows is None:
        run(0)
    else:
        lax.fori_loop(0, lax.div(num_rows[0] - first + shape.programs - 1, shape.programs), run, None)


def _add_norm(
    shape: Shape,
    operands: Operands,
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
    product = functools.reduce(operator.add, loaded).astype(shape.dtype).astype(jnp.float32)
    hidden = (before + product).astype(shape.dtype)
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
