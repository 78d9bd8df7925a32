"""Sparse-query paged attention in Triton (FlashAttention-2, section 3), and decode with split keys (FlashDecoding).

A program owns a tile of consecutive rows of one request and the query heads of one KV head, packed as `[row, head]`
into the rows of its matrix products, so that a K or V block is read once for all of them.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, row_a_request
from sparsex_kernels.mosaic import LOG2_E, heads_a_tile
from sparsex_kernels.paged_attention.parts import key_parts
from sparsex_kernels.triton import (
    Config,
    call,
    check_attention,
    little_shared_memory,
    power_of_two,
    tables_ahead,
)

DECODE_BLOCK = 64  # keys a step
DECODE_PROGRAMS = 512  # to aim at: some for each multiprocessor


def config_for(head_dim: int) -> Config:
    """What suits this device, for 16-bit types."""
    return Config(packed=128, block=64, warps=8 if head_dim > 64 else 4, stages=2 if little_shared_memory() else 3)


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    return_lse: bool = False,
    config: Config | None = None,
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    if row_a_request(q, page_tables):
        out, lse = decode(q, store, layer, positions, requests, page_tables, scale)
    else:
        out, lse = attend(q, store, layer, positions, requests, page_tables, scale, config=config)
    return (out, lse / LOG2_E) if return_lse else out


def attend(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    *,
    values: bool = True,
    config: Config | None = None,
) -> tuple[Array, Float[Array, "rows q_heads"]]:
    """Output, which is nothing of use where `values` is off, and log-sum-exp in base 2."""
    kv_heads, page_size, head_dim = store.shape[3:]
    config = config or config_for(head_dim)
    check_attention(q, store, config.block)
    from sparsex_kernels.paged_attention.triton_kernels import attention

    share = heads_a_tile(q.shape[1], kv_heads)
    rows = config.packed // power_of_two(share)
    tiles = row_tiles(positions, requests, rows, page_tables.shape[0], config.block)
    tables = tables_ahead(store, layer, page_tables, config.block)
    out, lse = call(
        attention,
        *(q, store, tables, tiles, positions.astype(jnp.int32), tables.shape[1]),
        grid=(len(tiles), q.shape[1] // share),
        out_type=(
            jax.ShapeDtypeStruct(q.shape if values else (1,), q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        VALUES=values,
        SCALE=float(scale) * LOG2_E,
        ROWS=rows,
        SHARE=share,
        PADDED_SHARE=power_of_two(share),
        HEADS=q.shape[1] // share,
        KV_HEADS=kv_heads,
        BLOCK=config.block,
        PAGE=page_size,
        DIM=head_dim,
    )
    return out, lse


def row_tiles(positions: RowInts, requests: RowInts, rows: int, num_requests: int, block: int) -> Int[Array, "tiles 5"]:
    """Cut the rows into tiles of one request each: the first row and one behind the last, the request, the last
    position, and how many key blocks every row sees in full. Padding is cut too, at position -1, as its output is to be
    written. What is left over at the end has no rows."""
    owner = jnp.where(positions >= 0, requests, num_requests)
    count = (owner[:, None] == jnp.arange(num_requests + 1)).sum(0)
    tiles = -(-count // rows)
    ends = jnp.cumsum(tiles)
    tile = jnp.arange(len(positions) // rows + min(num_requests + 1, len(positions)))
    group = jnp.minimum((ends <= tile[:, None]).sum(1), num_requests)
    group_end = jnp.cumsum(count)[group]
    first = group_end - count[group] + (tile - (ends - tiles)[group]) * rows
    end = jnp.where(tile < ends[-1], jnp.minimum(first + rows, group_end), first)
    lowest, last = (positions.at[at].get(mode="clip") for at in (first, end - 1))
    padding = group == num_requests
    last, full = jnp.where(padding, -1, last), jnp.where(padding, 0, (lowest + 1) // block)
    return jnp.stack([first, end, jnp.where(padding, 0, group), last, full], axis=-1).astype(jnp.int32)


def decode(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
) -> tuple[Queries, Float[Array, "rows q_heads"]]:
    """Output and log-sum-exp in base 2 of few rows in any order; a row's keys are split among programs."""
    check_attention(q, store, DECODE_BLOCK)
    from sparsex_kernels.paged_attention import triton_kernels

    kv_heads, page_size, head_dim = store.shape[3:]
    rows, q_heads, _ = q.shape
    share = heads_a_tile(q_heads, kv_heads)
    heads = q_heads // share
    parts, spans = key_parts(positions, requests, heads, programs=DECODE_PROGRAMS, block=DECODE_BLOCK)
    tables = tables_ahead(store, layer, page_tables, DECODE_BLOCK)
    partial, partial_lse = call(
        triton_kernels.decode,
        *(q, store, tables, parts, tables.shape[1]),
        grid=(heads, len(parts)),
        out_type=(
            jax.ShapeDtypeStruct((len(parts), q_heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((len(parts), q_heads), jnp.float32),
        ),
        num_warps=4,
        num_stages=2 if little_shared_memory() else 4,
        SCALE=float(scale) * LOG2_E,
        SHARE=share,
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK=DECODE_BLOCK,
        PAGE=page_size,
        DIM=head_dim,
    )
    return call(
        triton_kernels.merge,
        *(partial, partial_lse, spans),
        grid=(rows, q_heads),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((rows, q_heads), jnp.float32)),
        num_warps=4,
        STEP=16,
        HEADS=q_heads,
        DIM=head_dim,
    )
