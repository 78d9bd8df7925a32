"""The second kernel of attention in parts for Hopper GPUs, by Pallas' Mosaic GPU: it merges results over parts of keys.

A program merges 64 rows of a tile in registers, and some columns of them: query heads of one row where decode cut the
keys of a row, packed rows and heads where prefill cut those of a tile of rows. Its warpgroups share the parts.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels import mosaic
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import LOG2_E
from sparsex_kernels.layout import Queries
from sparsex_kernels.mosaic import MULTIPROCESSORS, ROWS, WGMMA_ROWS, Ref

SHARE = 8  # rows of a product that are stored; no more query heads share a tile
MERGERS = 4  # warpgroups that share a row's parts
IN_FLIGHT = 256  # bytes of each row that one of them loads at a time, over several parts


class MergeShape(NamedTuple):
    """Static sizes of one merge."""

    tiles: int  # of 64 rows
    columns: int  # of a program
    dtype: Any  # of the output


class RowHeads(NamedTuple):
    """Which query heads a tile's rows are in a merge of single rows: groups of `SHARE`, the first `share` of each."""

    heads: int  # groups of query heads; eight a tile
    share: int  # query heads in a group


class TileRows(NamedTuple):
    """Which rows and query heads a tile's rows are in a merge of tiles of rows: `[head, row]`."""

    heads: int  # groups of query heads
    warpgroups: int  # tiles of each group, one after the other
    rows: int  # of a tile
    share: int  # query heads in a group


def merge(
    partial: Float[Array, "parts merged head_dim"],
    lse: Float[Array, "parts merged"],
    spans: Int[Array, "rows 2"],
    q_heads: int,
    share: int,
    dtype: Any,
    backend: Backend,
) -> tuple[Queries, Float[Array, "rows merged"]]:
    """Sum each row's parts, weighted by their share of the softmax's denominator, in an order that is always the same.

    Query heads lie in `merged` as the programs of `decode` store them: `share` in each group of `SHARE`, then padding.
    With `share` 3, heads 0 1 2 are at 0 1 2, heads 3 4 5 at 8 9 10.

    Args:
      partial: float32, the output of each part.
      lse: float32, the log-sum-exp of each part, in base 2. The result's is in base e, and -inf for rows without
        parts, whose output is 0.
      spans: a row's first part and the one behind its last.
      dtype: of the output.
    """
    rows, (_, merged, head_dim) = len(spans), partial.shape
    types = (
        jax.ShapeDtypeStruct((rows, q_heads, head_dim), dtype),
        jax.ShapeDtypeStruct((rows, merged), jnp.float32),
    )
    kernel = functools.partial(_merge_row, RowHeads(q_heads // share, share))
    return _run(kernel, types, dtype, backend, partial, lse, spans)


def merge_tiles(
    partial: Float[Array, "parts merged head_dim"],
    lse: Float[Array, "parts merged"],
    spans: Int[Array, "tiles 2"],
    out: Float[Array, "padded_rows q_heads head_dim"],
    layout: TileRows,
    backend: Backend,
) -> Float[Array, "padded_rows q_heads head_dim"]:
    """`out`, changed in place, with the rows of those tiles that have several parts; else as `merge`.

    Args:
      spans: of the first tiles, first part and the one behind the last.
      layout: of `merged`.
    """
    ref = jax.new_ref(out)
    _run(functools.partial(_merge_tile, layout), (), out.dtype, backend, partial, lse, spans, ref)
    return jax.freeze(ref)


def merge_lse(
    partial: Float[Array, "parts merged"], spans: Int[Array, "few 2"], lse: Float[Array, "tiles merged"]
) -> Float[Array, "tiles merged"]:
    """`lse` with those of the first tiles that have several parts, in base 2."""
    part, (begin, end) = jnp.arange(len(partial)), spans.T[..., None]
    own = (part >= begin) & (part < end)  # [few, parts]
    merged = jax.nn.logsumexp(jnp.where(own[..., None], partial / LOG2_E, -jnp.inf), axis=1) * LOG2_E
    return jnp.concatenate([jnp.where(end - begin > 1, merged, lse[: len(spans)]), lse[len(spans) :]])


def _run(kernel: Callable[..., None], types: tuple[Any, ...], dtype: Any, backend: Backend, *operands: Any) -> Any:
    """Launch a merge of `partial` and its log-sum-exps by spans, the first operands."""
    partial, _, spans = operands[:3]
    _, merged, head_dim = partial.shape
    shape = MergeShape(merged // WGMMA_ROWS, merge_columns(len(spans) * merged, head_dim), dtype)
    states = (MERGERS, WGMMA_ROWS)
    run = mosaic.kernel(
        functools.partial(kernel, shape),
        backend,
        out_type=types,
        grid=(len(spans), shape.tiles, head_dim // shape.columns),
        grid_names=("span", "tile", "slice"),
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
    return run(*operands)


def merge_columns(rows: int, head_dim: int) -> int:
    """Columns of a program. It has few where rows are few, so that there are programs for all multiprocessors."""
    programs = 2 * MULTIPROCESSORS * WGMMA_ROWS
    return next((n for n in (8, 16) if rows * head_dim <= programs * n), 32)


class Fold(NamedTuple):
    """The sum over some parts, for each row of the tile; a part has the weight `exp2(lse - top)`."""

    acc: Array  # weighted sum of the parts' outputs
    top: Array  # largest log-sum-exp
    total: Array | float  # sum of the weights


def _merge_row(layout: RowHeads, shape: MergeShape, *refs: Ref, **scratch: Ref) -> None:
    *operands, out_ref, out_lse_ref = refs
    row, tile, part_of_dim = (lax.axis_index(name) for name in ("span", "tile", "slice"))

    def store(columns: Any) -> None:
        _store_heads(layout, tile, scratch["out_smem"], out_ref.at[row, :, columns])
        target = out_lse_ref.at[row, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
        pl.when(part_of_dim == 0)(lambda: plgpu.copy_smem_to_gmem(scratch["lse_smem"], target))

    _merge_parts(shape, operands, store, scratch)


def _merge_tile(layout: TileRows, shape: MergeShape, *refs: Ref, **scratch: Ref) -> None:
    *operands, out_ref = refs
    span, tile = lax.axis_index("span"), lax.axis_index("tile")
    group, wg = lax.div(tile, layout.warpgroups), lax.rem(tile, layout.warpgroups)
    rows = pl.ds((span * layout.warpgroups + wg) * layout.rows, layout.rows)

    def store(columns: Any) -> None:
        for h in range(layout.share):
            source = scratch["out_smem"].at[pl.ds(h * layout.rows, layout.rows)]
            plgpu.copy_smem_to_gmem(source, out_ref.at[rows, group * layout.share + h, columns])

    spans_ref = operands[2]
    cut = spans_ref[span, 1] - spans_ref[span, 0] > 1
    pl.when(cut)(lambda: _merge_parts(shape, operands, store, scratch))


def _merge_parts(shape: MergeShape, operands: list[Ref], store: Callable[[Any], None], scratch: dict[str, Ref]) -> None:
    """Merge the program's parts, and let `store` write its columns from shared memory."""
    partial_ref, lse_ref, spans_ref = operands
    span, tile, part_of_dim, wg = (lax.axis_index(name) for name in ("span", "tile", "slice", "wg"))
    columns = pl.ds(part_of_dim * shape.columns, shape.columns)
    rows = pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
    folds = [Fold(*(scratch[f"{name}_smem"].at[n] for name in Fold._fields)) for n in range(MERGERS)]
    fold = _fold_parts(shape, partial_ref.at[:, rows, columns], lse_ref.at[:, rows], spans_ref.at[span], wg)
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
        store(columns)
        plgpu.wait_smem_to_gmem(0)


def _fold_parts(shape: MergeShape, partial_ref: Ref, lse_ref: Ref, span_ref: Ref, wg: Array) -> Fold:
    """Sum every `MERGERS`-th part, one warpgroup's. Several are loaded at a time to wait for memory once."""
    begin, end = span_ref[0], span_ref[1]
    unroll = IN_FLIGHT // (shape.columns * partial_ref.dtype.itemsize)
    stride = MERGERS * unroll

    def step(i: Array, state: Fold) -> Fold:
        first = begin + wg + i * stride
        # A number behind the last part loads that part again, with no weight: another span's part could hold NaN.
        numbers = [first + n * MERGERS for n in range(unroll)]
        own = [jnp.minimum(number, end - 1) for number in numbers]
        loaded = [(_load(partial_ref.at[part]), _load(lse_ref.at[part])) for part in own]
        counts = [jnp.broadcast_to(number < end, (WGMMA_ROWS,)) for number in numbers]
        parts = [Fold(x, jnp.where(c, lse, -jnp.inf), 1.0) for c, (x, lse) in zip(counts, loaded, strict=True)]
        return _join([state, *parts])

    start = Fold(*mosaic.empty_softmax(shape.columns))
    return lax.fori_loop(0, lax.div(end - begin - wg + stride - 1, stride), step, start)


def _load(ref: Ref) -> Array:
    layout = plgpu.Layout.WGMMA if len(ref.shape) == 2 else ROWS
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _join(folds: list[Fold]) -> Fold:
    """Add sums over different parts. Each row of the tile is added by itself."""
    top = functools.reduce(jnp.maximum, (fold.top for fold in folds))
    decays = [jnp.exp2(fold.top - top) for fold in folds]
    weighted = zip(folds, decays, strict=True)
    accs = [fold.acc * lax.broadcast_in_dim(decay, fold.acc.shape, [0]) for fold, decay in weighted]
    totals = [fold.total * decay for fold, decay in zip(folds, decays, strict=True)]
    return Fold(functools.reduce(operator.add, accs), top, functools.reduce(operator.add, totals))


def _store_heads(layout: RowHeads, tile: Array, smem: Ref, out_ref: Ref) -> None:
    """Store the query heads of a tile without the padding between their groups."""
    groups = WGMMA_ROWS // SHARE
    for group in range(groups):
        head = tile * groups + group
        store = functools.partial(
            plgpu.copy_smem_to_gmem,
            smem.at[pl.ds(group * SHARE, layout.share)],
            out_ref.at[pl.ds(head * layout.share, layout.share)],
        )
        pl.when(head < layout.heads)(store)
