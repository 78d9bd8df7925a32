"""Sparse-query paged attention in Triton (FlashAttention-2, section 3), and decode with split keys (FlashDecoding).

A program owns a tile of consecutive rows of one request and the query heads of one KV head, packed as `[row, head]`
into the rows of its matrix products, so that a K or V block is read once for all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.gpu import LOG2_E, check_low_rank, in_float16, power_of_two
from sparsex_kernels.layout import Queries, RowInts, Window, first_seen
from sparsex_kernels.paged_attention.parts import key_parts
from sparsex_kernels.triton import (
    Config,
    attention_constants,
    call,
    check_attention,
    little_shared_memory,
    tables_ahead,
)

DECODE_BLOCK = 64  # keys a step
DECODE_PROGRAMS = 512  # to aim at: some for each multiprocessor
DECODE_COLUMNS = 32  # of Y's products, of which 4 warps have 8 each. Of fewer, every warp computes all, and the scores
RANKS = (16, 32, 64)  # of adapters: the fewest columns of a product, and what registers suffice for
NO_ADAPTERS = (1, 1, 1)  # in place of their arrays: Triton compiles a 1 into the kernel, which has no such argument


def config_for(args: AttentionArgs) -> Config:
    """What suits the device, for 16-bit types."""
    warps, stages = 8 if args.query.shape[2] > 64 else 4, 2 if little_shared_memory(args.backend) else 3
    return Config(packed=128, block=64, warps=warps, stages=stages)


def paged_attention(
    args: AttentionArgs, return_lse: bool = False, config: Config | None = None
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    inner = in_float16(args)
    out, lse = decode(inner) if args.is_decode else attend(inner, config=config)
    out = out.astype(args.query.dtype)
    return (out, lse / LOG2_E) if return_lse else out


def attend(
    args: AttentionArgs, *, values: bool = True, config: Config | None = None
) -> tuple[Array, Float[Array, "rows q_heads"]]:
    """The output, which is meaningless where `values` is off, and the log-sum-exp in base 2."""
    config = config or config_for(args)
    check_attention(args, config.block)
    check_low_rank(args, RANKS)
    from sparsex_kernels.paged_attention.triton_kernels import attention

    query, constants = args.query, attention_constants(args, config.block)
    padded_share = power_of_two(constants["SHARE"])
    rows = config.packed // padded_share
    tiles = row_tiles(args.positions, args.requests, rows, len(args.page_tables), config.block, args.window)
    tables = tables_ahead(args, config.block)
    out, lse = call(
        attention,
        *(query, args.store, tables, tiles, args.positions.astype(jnp.int32), tables.shape[1]),
        *adapters(args),
        grid=(len(tiles), constants["HEADS"]),
        out_type=(
            jax.ShapeDtypeStruct(query.shape if values else (1,), query.dtype),
            jax.ShapeDtypeStruct(query.shape[:2], jnp.float32),
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        WINDOWED=args.window is not None,
        VALUES=values,
        ROWS=rows,
        PADDED_SHARE=padded_share,
        **constants,
        **low_rank_constants(args, RANKS[0]),
    )
    return out, lse


def adapters(args: AttentionArgs) -> tuple[Any, Any, Any]:
    """Y, the matrices, and for each request its first column, -1 without an adapter, and which matrix is its B."""
    low_rank = args.low_rank
    if low_rank is None:
        return NO_ADAPTERS
    number = low_rank.matrices.shape[1]
    matrix = args.layer * number + jnp.clip(low_rank.adapters, 0, number - 1)
    picks = jnp.stack([low_rank.columns, matrix], axis=-1).astype(jnp.int32)
    return low_rank.store, low_rank.matrices.astype(args.query.dtype), picks


def low_rank_constants(args: AttentionArgs, columns: int) -> dict[str, int]:
    """The rank of adapters, 0 without any, the columns of their products, at least these, and those of their store."""
    low_rank = args.low_rank
    if low_rank is None:
        return {"RANK": 0, "COLUMNS": 0, "WIDTH": 0}
    return {"RANK": low_rank.rank, "COLUMNS": max(low_rank.rank, columns), "WIDTH": low_rank.store.shape[3]}


def row_tiles(
    positions: RowInts, requests: RowInts, rows: int, num_requests: int, block: int, window: Window | None = None
) -> Int[Array, "tiles fields"]:
    """Cut the rows into tiles of at most `rows` rows of one request each.

    Padding is cut into tiles, too, because its output is to be written. There is room for as many tiles as can be
    needed; those that are left over have no rows.

    Returns:
      For each tile its first row and the one behind its last, its request, its last position (-1 for padding), and
      the key block behind the last that every one of its rows sees in full. With a window also the first key that
      some row sees, the first block of which the window hides nothing from any row, and the window.
    """
    # Tiles of 4 rows and blocks of 8 keys, for 5 rows of request 0, 2 of request 2 and one of padding:
    #   positions  0 10 20 30 40 | 7 8 | -1
    #   tiles      [0, 4, 0, 30, 0] [4, 5, 0, 40, 5] [5, 7, 2, 8, 1] [7, 8, 0, -1, 0]
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
    fields = [first, end, jnp.where(padding, 0, group), last, full]
    if window is not None:
        clear = -(-first_seen(last, window) // block)
        fields += [jnp.where(padding, 0, first_seen(lowest, window)), clear, jnp.broadcast_to(window, last.shape)]
    return jnp.stack(fields, axis=-1).astype(jnp.int32)


def decode(args: AttentionArgs) -> tuple[Queries, Float[Array, "rows q_heads"]]:
    """Output and log-sum-exp in base 2 of few rows in any order; a row's keys are split among programs."""
    check_attention(args, DECODE_BLOCK)
    check_low_rank(args, RANKS)
    from sparsex_kernels.paged_attention import triton_kernels

    rows, q_heads, head_dim = args.query.shape
    constants = attention_constants(args, DECODE_BLOCK)
    cut: dict[str, Any] = {"programs": DECODE_PROGRAMS, "block": DECODE_BLOCK, "window": args.window}
    parts, spans = key_parts(args.positions, args.requests, constants["HEADS"], **cut)
    tables = tables_ahead(args, DECODE_BLOCK)
    partial, partial_lse = call(
        triton_kernels.decode,
        *(args.query, args.store, tables, parts, tables.shape[1]),
        *adapters(args),
        grid=(constants["HEADS"], len(parts)),
        out_type=(
            jax.ShapeDtypeStruct((len(parts), q_heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((len(parts), q_heads), jnp.float32),
        ),
        num_warps=4,
        num_stages=2 if little_shared_memory(args.backend) else 4,
        WINDOWED=args.window is not None,
        **constants,
        **low_rank_constants(args, DECODE_COLUMNS),
    )
    return call(
        triton_kernels.merge,
        *(partial, partial_lse, spans),
        grid=(rows, q_heads),
        out_type=(
            jax.ShapeDtypeStruct(args.query.shape, args.query.dtype),
            jax.ShapeDtypeStruct((rows, q_heads), jnp.float32),
        ),
        num_warps=4,
        STEP=16,
        HEADS=q_heads,
        DIM=head_dim,
    )
