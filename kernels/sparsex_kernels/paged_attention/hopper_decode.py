"""Paged attention of few rows over many keys for Hopper GPUs, by Pallas' Mosaic GPU: a decode step's.

Reading the keys is all the work, so a row's keys are split into parts (FlashDecoding) of about equal size over all
rows, and a program attends to one part with the query heads of one KV head. A second kernel merges each row's parts by
their log-sum-exps; how many a row has is data. It reads no parts but the row's own, so what is not finite in one
request's keys or values reaches no other, and what was never written reaches nobody.
"""

import functools
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
    MULTIPROCESSORS,
    WGMMA_ROWS,
    add_weighted,
    as_scalar,
    check_attention,
    clear_rows,
    empty_softmax,
    flat_store,
    heads_a_tile,
    kernel,
    padded_pages,
    tiled_smem,
)
from sparsex_kernels.paged_attention.hopper_merge import SHARE, merge
from sparsex_kernels.paged_attention.parts import key_parts

BLOCK = 64  # keys a step
STAGES = 5  # blocks in flight
PROGRAMS = 2 * MULTIPROCESSORS  # parts to aim at; more have more to merge, fewer leave a long request short of loads


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
        functools.partial(_kernel, shape),
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


def _kernel(shape: Shape, *refs: Any, **scratch: Any) -> None:
    q_ref, kv_ref, layer_ref, tables_ref, parts_ref, out_ref, lse_ref = refs
    part, head, wg = lax.axis_index("part"), lax.axis_index("heads"), lax.axis_index("wg")
    table = tuple(parts_ref[part, n] for n in range(5))
    live = table[3] < table[4]

    @pl.when((wg == 0) & live)
    def compute() -> None:
        _compute(shape, (part, head), table, (q_ref, out_ref, lse_ref), scratch)

    @pl.when((wg == 1) & live)
    def fetch() -> None:
        _fetch(shape, head, table, kv_ref, layer_ref[0] * shape.pages, tables_ref, scratch)


def _compute(
    shape: Shape,
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
        acc = add_weighted(acc, p.astype(shape.dtype), v_smem.at[slot])
        plgpu.barrier_arrive(scratch["v_used"].at[slot])
        return acc, new_top, total * decay + p.sum(axis=1)

    full = jnp.clip(lax.div(position + 1, BLOCK), begin, end)
    state = lax.fori_loop(begin, full, functools.partial(step, False), empty_softmax(shape.head_dim))
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
