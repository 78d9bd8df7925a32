"""Paged attention of few rows over many keys for Hopper GPUs, by Pallas' Mosaic GPU: a decode step's.

Reading the keys is all the work, so a row's keys are split into parts (FlashDecoding) of about equal size over all
rows, and a program attends to one part with the query heads of one KV head. A second kernel merges each row's parts by
their log-sum-exps; how many a row has is data. It reads no parts but the row's own, so what is not finite in one
request's keys or values reaches no other, and what was never written reaches nobody.
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

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store
from sparsex_kernels.mosaic import (
    LOG2_E,
    MASKED,
    MULTIPROCESSORS,
    WGMMA_ROWS,
    as_scalar,
    check_attention,
    clear_rows,
    flat_store,
    heads_a_tile,
    interpreted,
    kernel,
    padded_pages,
    tiled_smem,
)
from sparsex_kernels.paged_attention.parts import key_parts

BLOCK = 64  # keys a step
STAGES = 5  # blocks in flight
PROGRAMS = 4 * MULTIPROCESSORS  # parts to aim at: some for each multiprocessor
SHARE = 8  # rows of a product that are stored; at most so many query heads share a tile
MERGERS = 4  # warpgroups that share a row's parts
IN_FLIGHT = 64  # columns that each of them loads at a time, over several parts
ROWS = plgpu.Layout.WGMMA.reduce(1)


class Shape(NamedTuple):
    """Static sizes of one call."""

    parts: int
    heads: int  # programs over the heads
    repeat: int  # programs that read the same KV head
    kv_heads: int
    pages: int  # of a layer
    page_size: int
    head_dim: int
    dtype: Any
    scale: float


class MergeShape(NamedTuple):
    """Static sizes of one merge."""

    tiles: int  # of 64 rows: query heads
    heads: int  # groups of query heads; eight a tile
    share: int  # query heads in a group
    columns: int  # of a program
    dtype: Any


def decode(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
) -> tuple[Queries, Float[Array, "rows q_heads"]]:
    """Output and log-sum-exp, as `sparsex_kernels.paged_attention` has them; rows may be in any order."""
    check_attention(q, store, BLOCK)
    _, pages, _, kv_heads, page_size, head_dim = store.shape
    rows, q_heads, _ = q.shape
    share = heads_a_tile(q_heads, kv_heads)
    heads = q_heads // share
    table, spans = key_parts(positions, requests, heads, programs=PROGRAMS, block=BLOCK)
    parts, merged = len(table), -(-heads * SHARE // WGMMA_ROWS) * WGMMA_ROWS
    shape = Shape(parts, heads, heads // kv_heads, kv_heads, pages, page_size, head_dim, q.dtype, float(scale))
    packed = jnp.pad(q.reshape(rows, heads, share, head_dim), ((0, 0), (0, 0), (0, SHARE - share), (0, 0)))
    run = kernel(
        functools.partial(_kernel, shape, interpreted()),
        out_type=(
            jax.ShapeDtypeStruct((parts, merged, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts, merged), jnp.float32),
        ),
        grid=(heads, parts),
        grid_names=("heads", "part"),
        num_threads=2,
        scratch_types=_scratch(shape),
    )
    partial, lse = run(packed, flat_store(store), as_scalar(layer), padded_pages(store, page_tables, 1), table)
    out, lse = merge(partial, lse, spans, q_heads, share, q.dtype)
    return out, lse.reshape(rows, -1, SHARE)[:, :heads, :share].reshape(rows, q_heads)


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


def _scratch(shape: Shape) -> dict[str, Any]:
    block = (STAGES, BLOCK, shape.head_dim)
    return {
        "q_smem": tiled_smem((WGMMA_ROWS, shape.head_dim), shape.dtype),
        "k_smem": tiled_smem(block, shape.dtype),
        "v_smem": tiled_smem(block, shape.dtype),
        "out_smem": tiled_smem((WGMMA_ROWS, shape.head_dim), jnp.float32),
        "lse_smem": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "k_ready": plgpu.Barrier(num_barriers=STAGES),
        "v_ready": plgpu.Barrier(num_barriers=STAGES),
        "tail_ready": plgpu.Barrier(),
        "k_used": plgpu.Barrier(num_barriers=STAGES),
        "v_used": plgpu.Barrier(num_barriers=STAGES),
    }


def _kernel(shape: Shape, interpret: bool, *refs: Any, **scratch: Any) -> None:
    q_ref, kv_ref, layer_ref, tables_ref, parts_ref, out_ref, lse_ref = refs
    part, head, wg = lax.axis_index("part"), lax.axis_index("heads"), lax.axis_index("wg")
    table = tuple(parts_ref[part, n] for n in range(5))
    live = table[3] < table[4]

    @pl.when((wg == 0) & live)
    def compute() -> None:
        _compute(shape, interpret, (part, head), table, (q_ref, out_ref, lse_ref), scratch)

    @pl.when((wg == 1) & live)
    def fetch() -> None:
        _fetch(shape, head, table, kv_ref, layer_ref[0] * shape.pages, tables_ref, scratch)


def _compute(
    shape: Shape,
    interpret: bool,
    program: tuple[Array, Array],
    table: tuple[Array, ...],
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
) -> None:
    (part, head), (row, _, position, begin, end), (q_ref, out_ref, lse_ref) = program, table, refs
    q_smem, k_smem, v_smem, stored = scratch["q_smem"], scratch["k_smem"], scratch["v_smem"], pl.ds(0, SHARE)
    # Only the first rows are filled: what the others hold stays in them, and is not stored.
    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[stored], scratch["q_ready"])
    plgpu.barrier_wait(scratch["q_ready"])
    square = (WGMMA_ROWS, BLOCK)

    def scores(slot: Array) -> Array:
        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC(square, jnp.float32))

    def add_values(acc: Array, weights: Array, slot: Array) -> Array:
        if interpret:
            return acc + jnp.dot(weights.astype(jnp.float32), v_smem[slot].astype(jnp.float32))

        def product(acc: Any) -> None:
            plgpu.wgmma(acc, weights, v_smem.at[slot])

        return pl.run_state(product)(plgpu.ACC.init(acc))

    def step(masked: bool, i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, top, total = state
        slot = lax.rem(i - begin, STAGES)
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        s = scores(slot)
        plgpu.barrier_arrive(scratch["k_used"].at[slot])
        if masked:
            keys = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA) + i * BLOCK
            s = jnp.where(keys <= position, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=1) * (shape.scale * LOG2_E))
        p = jnp.exp2(s * (shape.scale * LOG2_E) - lax.broadcast_in_dim(new_top, square, [0]))
        decay = jnp.exp2(top - new_top)
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        acc = add_values(acc, p.astype(shape.dtype), slot)
        plgpu.barrier_arrive(scratch["v_used"].at[slot])
        return acc, new_top, total * decay + p.sum(axis=1)

    state = (
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, shape.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WGMMA_ROWS,), MASKED, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), ROWS),
    )
    full = jnp.clip(lax.div(position + 1, BLOCK), begin, end)
    state = lax.fori_loop(begin, full, functools.partial(step, False), state)
    acc, top, total = lax.fori_loop(full, end, functools.partial(step, True), state)
    scratch["out_smem"][...] = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    scratch["lse_smem"][...] = top + jnp.log2(total)
    plgpu.commit_smem()
    rows = pl.ds(head * SHARE, SHARE)
    plgpu.copy_smem_to_gmem(scratch["out_smem"].at[stored], out_ref.at[part, rows])
    plgpu.copy_smem_to_gmem(scratch["lse_smem"].at[stored], lse_ref.at[part, rows])
    plgpu.wait_smem_to_gmem(0)


def _fetch(
    shape: Shape,
    head: Array,
    table: tuple[Array, ...],
    kv_ref: Any,
    first_page: Array,
    tables_ref: Any,
    scratch: dict[str, Any],
) -> None:
    _, request, position, begin, end = table
    kv_head = lax.div(head, shape.repeat)
    last = lax.div(position, BLOCK)

    def step(i: Array, _: None) -> None:
        slot = lax.rem(i - begin, STAGES)
        page = first_page + tables_ref[request, lax.div(i * BLOCK, shape.page_size)]
        keys = pl.ds(lax.rem(i * BLOCK, shape.page_size), BLOCK)

        def refill(used: Any) -> None:
            pl.when(i - begin >= STAGES)(lambda: plgpu.barrier_wait(used.at[slot]))

        def copy_values(ready: Any) -> None:
            plgpu.copy_gmem_to_smem(kv_ref.at[page, shape.kv_heads + kv_head, keys], scratch["v_smem"].at[slot], ready)

        def copy_last_values() -> None:
            copy_values(scratch["tail_ready"])
            plgpu.barrier_wait(scratch["tail_ready"])
            clear_rows(scratch["v_smem"].at[slot], position + 1 - i * BLOCK)
            plgpu.barrier_arrive(scratch["v_ready"].at[slot])

        refill(scratch["k_used"])
        plgpu.copy_gmem_to_smem(kv_ref.at[page, kv_head, keys], scratch["k_smem"].at[slot], scratch["k_ready"].at[slot])
        refill(scratch["v_used"])
        pl.when(i < last)(lambda: copy_values(scratch["v_ready"].at[slot]))
        pl.when(i == last)(copy_last_values)

    def drain(i: Array, _: None) -> None:  # so that every phase of a barrier is seen by who waits on it
        for used in ("k_used", "v_used"):
            plgpu.barrier_wait(scratch[used].at[lax.rem(i - begin, STAGES)])

    lax.fori_loop(begin, end, step, None)
    lax.fori_loop(jnp.maximum(end - STAGES, begin), end, drain, None)


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
