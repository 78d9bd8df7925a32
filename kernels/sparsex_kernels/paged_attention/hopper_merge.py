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
LSE_IN_FLIGHT = 4  # parts that it loads at a time where it merges log-sum-exps only


class MergeShape(NamedTuple):
    """Static sizes of one merge."""

    tiles: int  # of 64 rows
    columns: int  # of a program; 0: only log-sum-exps are merged
    dtype: Any  # of the output


class Parts(NamedTuple):
    """Results over parts of keys, as arrays or as references to them.

    Attributes:
      out: `[parts, merged, head_dim]`; None where only log-sum-exps are merged.
      lse: float32 `[parts, merged]`, in base 2.
      spans: `[spans, 2]`, the first part and the one behind the last of what is merged into one result.
    """

    out: Any
    lse: Any
    spans: Any


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
    return _run(kernel, Parts(partial, lse, spans), (), types, dtype, backend)


def merge_tiles(parts: Parts, results: dict[str, Array], layout: TileRows, backend: Backend) -> dict[str, Array]:
    """The results, changed in place, with those of tiles that have several parts merged from these; else as `merge`.

    Args:
      parts: `spans` are of the first tiles; `layout` says what lies where in `merged`.
      results: one or both of `out`, `[padded_rows, q_heads, head_dim]`, if there are `parts.out`, and `lse`, float32
        `[heads, tiles, warpgroups, 64]` in base e.
    """
    refs = {name: jax.new_ref(result) for name, result in results.items()}
    dtype = None if parts.out is None else parts.out.dtype
    _run(functools.partial(_merge_tile, layout, tuple(refs)), parts, tuple(refs.values()), (), dtype, backend)
    return {name: jax.freeze(ref) for name, ref in refs.items()}


def _run(
    kernel: Callable[..., None],
    parts: Parts,
    targets: tuple[Any, ...],
    types: tuple[Any, ...],
    dtype: Any,
    backend: Backend,
) -> Any:
    """Launch a merge, whose results are written to `targets` or returned, of these types."""
    merged, spans = parts.lse.shape[1], len(parts.spans)
    head_dim = 0 if parts.out is None else parts.out.shape[2]
    columns = merge_columns(spans * merged, head_dim) if head_dim else 0
    shape = MergeShape(merged // WGMMA_ROWS, columns, dtype)
    run = mosaic.kernel(
        functools.partial(kernel, shape),
        backend,
        out_type=types,
        grid=(spans, shape.tiles, head_dim // columns if columns else 1),
        grid_names=("span", "tile", "slice"),
        num_threads=MERGERS,
        scratch_types=_scratch(shape),
    )
    return run(*(x for x in parts if x is not None), *targets)


def _scratch(shape: MergeShape) -> dict[str, Any]:
    states = (MERGERS, WGMMA_ROWS)
    sums = {
        "acc_smem": plgpu.SMEM((*states, shape.columns), jnp.float32),
        "out_smem": plgpu.SMEM((WGMMA_ROWS, shape.columns), shape.dtype),
    }
    return (sums if shape.columns else {}) | {
        "top_smem": plgpu.SMEM(states, jnp.float32),
        "total_smem": plgpu.SMEM(states, jnp.float32),
        "lse_smem": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        "merged": plgpu.Barrier(num_arrivals=MERGERS),
    }


def merge_columns(rows: int, head_dim: int) -> int:
    """Columns of a program. It has few where rows are few, so that there are programs for all multiprocessors."""
    programs = 2 * MULTIPROCESSORS * WGMMA_ROWS
    return next((n for n in (8, 16) if rows * head_dim <= programs * n), 32)


class Fold(NamedTuple):
    """The sum over some parts, for each row of the tile; a part has the weight `exp2(lse - top)`."""

    acc: Any  # weighted sum of the parts' outputs; None where only log-sum-exps are merged
    top: Any  # largest log-sum-exp
    total: Any  # sum of the weights


def _merge_row(layout: RowHeads, shape: MergeShape, *refs: Ref, **scratch: Ref) -> None:
    *operands, out_ref, out_lse_ref = refs
    row, tile, part_of_dim = (lax.axis_index(name) for name in ("span", "tile", "slice"))

    def store(columns: Any) -> None:
        _store_heads(layout, tile, scratch["out_smem"], out_ref.at[row, :, columns])
        target = out_lse_ref.at[row, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
        pl.when(part_of_dim == 0)(lambda: plgpu.copy_smem_to_gmem(scratch["lse_smem"], target))

    _merge_parts(shape, Parts(*operands), store, scratch)


def _merge_tile(layout: TileRows, names: tuple[str, ...], shape: MergeShape, *refs: Ref, **scratch: Ref) -> None:
    first = len(refs) - len(names)
    parts, outs = Parts(*([None] * (3 - first)), *refs[:first]), dict(zip(names, refs[first:], strict=True))
    span, tile, part_of_dim = (lax.axis_index(name) for name in ("span", "tile", "slice"))
    group, wg = lax.div(tile, layout.warpgroups), lax.rem(tile, layout.warpgroups)
    rows = pl.ds((span * layout.warpgroups + wg) * layout.rows, layout.rows)

    def store(columns: Any) -> None:
        for h in range(layout.share if "out" in outs else 0):
            source = scratch["out_smem"].at[pl.ds(h * layout.rows, layout.rows)]
            plgpu.copy_smem_to_gmem(source, outs["out"].at[rows, group * layout.share + h, columns])
        if "lse" in outs:
            target = outs["lse"].at[group, span, wg]
            pl.when(part_of_dim == 0)(lambda: plgpu.copy_smem_to_gmem(scratch["lse_smem"], target))

    cut = parts.spans[span, 1] - parts.spans[span, 0] > 1
    pl.when(cut)(lambda: _merge_parts(shape, parts, store, scratch))


def _merge_parts(shape: MergeShape, parts: Parts, store: Callable[[Any], None], scratch: dict[str, Ref]) -> None:
    """Merge the program's parts, and let `store` write its columns from shared memory."""
    span, tile, part_of_dim, wg = (lax.axis_index(name) for name in ("span", "tile", "slice", "wg"))
    columns, rows = pl.ds(part_of_dim * shape.columns, shape.columns), pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
    out = parts.out.at[:, rows, columns] if shape.columns else None
    own = Parts(out, parts.lse.at[:, rows], parts.spans.at[span])
    names = [name for name in Fold._fields if shape.columns or name != "acc"]
    fold = _fold_parts(shape, own, wg)
    for name in names:
        scratch[f"{name}_smem"][wg] = getattr(fold, name)
    plgpu.barrier_arrive(scratch["merged"])

    @pl.when(wg == 0)
    def finish() -> None:
        plgpu.barrier_wait(scratch["merged"])
        loaded = [{name: _load(scratch[f"{name}_smem"].at[n]) for name in names} for n in range(MERGERS)]
        acc, top, total = _join([Fold(**{"acc": None} | fold) for fold in loaded])
        if shape.columns:
            seen = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # padding sees nothing and gets 0
            scratch["out_smem"][...] = (acc / lax.broadcast_in_dim(seen, acc.shape, [0])).astype(shape.dtype)
        scratch["lse_smem"][...] = (top + jnp.log2(total)) / LOG2_E
        plgpu.commit_smem()
        store(columns)
        plgpu.wait_smem_to_gmem(0)


def _fold_parts(shape: MergeShape, parts: Parts, wg: Array) -> Fold:
    """Sum every `MERGERS`-th part, one warpgroup's. Several are loaded at a time to wait for memory once."""
    begin, end = parts.spans[0], parts.spans[1]
    unroll = IN_FLIGHT // (shape.columns * parts.out.dtype.itemsize) if shape.columns else LSE_IN_FLIGHT
    stride = MERGERS * unroll

    def step(i: Array, state: Fold) -> Fold:
        first = begin + wg + i * stride
        # A number behind the last part loads that part again, with no weight: another span's part could hold NaN.
        numbers = [first + n * MERGERS for n in range(unroll)]
        own = [jnp.minimum(number, end - 1) for number in numbers]
        loaded = [(_load(parts.out.at[part]) if shape.columns else None, _load(parts.lse.at[part])) for part in own]
        counts = [jnp.broadcast_to(number < end, (WGMMA_ROWS,)) for number in numbers]
        folds = [Fold(x, jnp.where(c, lse, -jnp.inf), 1.0) for c, (x, lse) in zip(counts, loaded, strict=True)]
        return _join([state, *folds])

    acc, top, total, _ = mosaic.empty_softmax(shape.columns or 8)
    start = Fold(acc if shape.columns else None, top, total)
    return lax.fori_loop(0, lax.div(end - begin - wg + stride - 1, stride), step, start)


def _load(ref: Ref) -> Array:
    layout = plgpu.Layout.WGMMA if len(ref.shape) == 2 else ROWS
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _join(folds: list[Fold]) -> Fold:
    """Add sums over different parts. Each row of the tile is added by itself."""
    top = functools.reduce(jnp.maximum, (fold.top for fold in folds))
    decays = [jnp.exp2(fold.top - top) for fold in folds]
    total = functools.reduce(operator.add, (fold.total * decay for fold, decay in zip(folds, decays, strict=True)))
    if folds[0].acc is None:
        return Fold(None, top, total)
    weighted = zip(folds, decays, strict=True)
    accs = [fold.acc * lax.broadcast_in_dim(decay, fold.acc.shape, [0]) for fold, decay in weighted]
    return Fold(functools.reduce(operator.add, accs), top, total)


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
