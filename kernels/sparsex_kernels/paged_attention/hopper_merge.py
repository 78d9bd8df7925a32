"""Merging what decode's programs found in parts of the keys, for Hopper GPUs, by Pallas' Mosaic GPU.

A program merges one row: 64 query heads, which are the rows of a tile in registers, and some columns. Its warpgroups
share the row's parts.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.layout import Queries
from sparsex_kernels.mosaic import LOG2_E, MASKED, MULTIPROCESSORS, ROWS, WGMMA_ROWS, kernel

SHARE = 8  # rows of a product that are stored; at most so many query heads share a tile
MERGERS = 4  # warpgroups that share a row's parts
IN_FLIGHT = 64  # columns that each of them loads at a time, over several parts


class MergeShape(NamedTuple):
    """Static sizes of one merge."""

    tiles: int  # of 64 rows: query heads
    heads: int  # groups of query heads; eight a tile
    share: int  # query heads in a group
    columns: int  # of a program
    dtype: Any


def merge(
    partial: Float[Array, "parts merged head_dim"],
    lse: Float[Array, "parts merged"],
    spans: Int[Array, "rows 2"],
    q_heads: int,
    share: int,
    dtype: Any,
) -> tuple[Queries, Float[Array, "rows merged"]]:
    """Each row's parts, weighted by what they have of the softmax's denominator, in an order that is always the same.

    Query heads lie in `merged` as the programs of `decode` store them: `share` in each group of `SHARE`, then padding.

    Args:
      lse: in base 2; the result's is in base e, and -inf for rows without parts, whose output is 0.
      spans: a row's first part and the one behind its last.
    """
    rows, (_, merged, head_dim) = len(spans), partial.shape
    shape = MergeShape(merged // WGMMA_ROWS, q_heads // share, share, merge_columns(rows * merged, head_dim), dtype)
    states = (MERGERS, WGMMA_ROWS)
    run = kernel(
        functools.partial(_merge_kernel, shape),
        out_type=(
            jax.ShapeDtypeStruct((rows, q_heads, head_dim), dtype),
            jax.ShapeDtypeStruct((rows, merged), jnp.float32),
        ),
        grid=(rows, shape.tiles, head_dim // shape.columns),
        grid_names=("row", "tile", "slice"),
        num_threads=MERGERS,
        scratch_types={
            "acc_smem": plgpu.SMEM((*states, shape.columns), jnp.float32),
            "top_smem": plgpu.SMEM(states, jnp.float32),
            "total_smem": plgpu.SMEM(states, jnp.float32),
            "out_smem": plgpu.SMEM((WGMMA_ROWS, shape.columns), dtype),
            "lse_smem": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
            "merged": plgpu.Barrier(num_arrivals=MERGERS),
        },
    )
    return run(partial, lse, spans)


def merge_columns(rows: int, head_dim: int) -> int:
    """Columns that a program of the merge has: few where rows are few, so that there are programs for the device."""
    programs = 2 * MULTIPROCESSORS * WGMMA_ROWS
    return next((n for n in (8, 16) if rows * head_dim <= programs * n), 32)


class Fold(NamedTuple):
    """Parts of one row, summed for each query head: what weighs `exp2(lse - top)`."""

    acc: Array  # weighted sum of the parts' values
    top: Array  # largest log-sum-exp
    total: Array | float  # of the weights


def _merge_kernel(shape: MergeShape, *refs: Any, **scratch: Any) -> None:
    partial_ref, lse_ref, spans_ref, out_ref, out_lse_ref = refs
    row, tile, part_of_dim, wg = (lax.axis_index(name) for name in ("row", "tile", "slice", "wg"))
    columns = pl.ds(part_of_dim * shape.columns, shape.columns)
    heads = pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
    folds = [Fold(*(scratch[f"{name}_smem"].at[n] for name in Fold._fields)) for n in range(MERGERS)]
    fold = _fold_parts(shape, partial_ref.at[:, heads, columns], lse_ref.at[:, heads], spans_ref.at[row], wg)
    for name, value in fold._asdict().items():
        scratch[f"{name}_smem"][wg] = value
    plgpu.barrier_arrive(scratch["merged"])

    @pl.when(wg == 0)
    def finish() -> None:
        plgpu.barrier_wait(scratch["merged"])
        acc, top, total = _join([Fold(*map(_load, fold)) for fold in folds])
        seen = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # padding sees nothing and gets 0
        scratch["out_smem"][...] = (acc / lax.broadcast_in_dim(seen, acc.shape, [0])).astype(shape.dtype)
        scratch["lse_smem"][...] = (top + jnp.log2(total)) / LOG2_E
        plgpu.commit_smem()
        _store_heads(shape, tile, scratch["out_smem"], out_ref.at[row, :, columns])
        store_lse = functools.partial(plgpu.copy_smem_to_gmem, scratch["lse_smem"], out_lse_ref.at[row, heads])
        pl.when(part_of_dim == 0)(store_lse)
        plgpu.wait_smem_to_gmem(0)


def _fold_parts(shape: MergeShape, partial_ref: Any, lse_ref: Any, span_ref: Any, wg: Array) -> Fold:
    """One warpgroup's of the row's parts: every `MERGERS`-th, several loaded at a time to wait for memory once."""
    begin, end = span_ref[0], span_ref[1]
    unroll = IN_FLIGHT // shape.columns
    stride = MERGERS * unroll

    def step(i: Array, state: Fold) -> Fold:
        first = begin + wg + i * stride
        # Behind the last part that one is loaded again and counts nothing: it is the row's own.
        numbers = [first + n * MERGERS for n in range(unroll)]
        own = [jnp.minimum(number, end - 1) for number in numbers]
        loaded = [(_load(partial_ref.at[part]), _load(lse_ref.at[part])) for part in own]
        counts = [jnp.broadcast_to(number < end, (WGMMA_ROWS,)) for number in numbers]
        parts = [Fold(x, jnp.where(c, lse, -jnp.inf), 1.0) for c, (x, lse) in zip(counts, loaded, strict=True)]
        return _join([state, *parts])

    start = Fold(
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, shape.columns), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WGMMA_ROWS,), MASKED, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), ROWS),
    )
    return lax.fori_loop(0, lax.div(end - begin - wg + stride - 1, stride), step, start)


def _load(ref: Any) -> Array:
    layout = plgpu.Layout.WGMMA if len(ref.shape) == 2 else ROWS
    return plgpu.load(ref, layout=layout, optimized=False)


def _join(folds: list[Fold]) -> Fold:
    """The fold of all that these are folds of. Rows are kept apart: what is in one reaches no other."""
    top = functools.reduce(jnp.maximum, (fold.top for fold in folds))
    decays = [jnp.exp2(fold.top - top) for fold in folds]
    weighted = zip(folds, decays, strict=True)
    accs = [fold.acc * lax.broadcast_in_dim(decay, fold.acc.shape, [0]) for fold, decay in weighted]
    totals = [fold.total * decay for fold, decay in zip(folds, decays, strict=True)]
    return Fold(functools.reduce(operator.add, accs), top, functools.reduce(operator.add, totals))


def _store_heads(shape: MergeShape, tile: Array, smem: Any, out_ref: Any) -> None:
    """Store the query heads of a tile without the rows between them."""
    groups = WGMMA_ROWS // SHARE
    for group in range(groups):
        head = tile * groups + group
        store = functools.partial(
            plgpu.copy_smem_to_gmem,
            smem.at[pl.ds(group * SHARE, shape.share)],
            out_ref.at[pl.ds(head * shape.share, shape.share)],
        )
        pl.when(head < shape.heads)(store)
