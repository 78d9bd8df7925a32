"""Attention on TPU: FlashAttention-2 (algorithm 1) over pages that DMA brings from HBM, double-buffered.

A tile of rows takes one pass over the keys of each request that it has rows of. The query heads that share a KV head
are packed into one matrix, so K and V are read once for all of them.

Where adapters add to the values, the kernel sums Y beside V, and XLA expands the sums: rows of one tile may have
different adapters. A DMA moves whole lines of 128 columns, so Y of several adapters comes, and all but the request's
own is zeroed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs, LowRank
from sparsex_kernels.layout import FLOAT8, Queries, Window, first_seen, pad_positions, pad_rows, widen
from sparsex_kernels.paged_attention.low_rank import expand
from sparsex_kernels.tpu import (
    HBM,
    TILE,
    Copy,
    Index,
    Ref,
    check_page_size,
    compiler_params,
    each_page,
    pages_a_block,
    precision,
)

ROW_TILE = 128  # rows that share one pass over the keys: 512 operations a byte of K and V with 4 heads a KV head
LANES = 128


def paged_attention(
    args: AttentionArgs, return_lse: bool = False
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`. Head sizes that are no multiple of 128 waste lanes of HBM and VMEM."""
    store, page_tables = args.store, args.page_tables
    check_page_size(store)
    rows, q_heads, head_dim = args.query.shape
    tile = row_tile(rows)
    packed, own, owner = pack_rows(args, tile)
    last, following = spans(args, tile)
    windows = () if args.window is None else (first_keys(args, tile, args.window), args.window.reshape(1))
    low_rank, lanes = args.low_rank, low_rank_lanes(args.low_rank)
    columns = () if low_rank is None else (low_rank.columns.astype(jnp.int32),)
    kv_heads, all_rows, _ = packed.shape
    tile_rows = tile * (q_heads // kv_heads)
    keys = pages_a_block(store, page_tables.shape[1]) * store.shape[4]

    by_tile = pl.BlockSpec((kv_heads, tile_rows, head_dim), lambda i, *_: (0, i, 0))
    column = pl.BlockSpec((tile_rows, 1), lambda i, *_: (i, 0))
    lse_by_tile, sums_by_tile = (
        pl.BlockSpec((kv_heads, tile_rows, width), lambda i, *_: (0, i, 0)) for width in (1, lanes)
    )
    out, *results = pl.pallas_call(
        functools.partial(
            _attention_kernel,
            scale=args.scale,
            num_requests=len(page_tables),
            return_lse=return_lse,
            windowed=bool(windows),
            rank=0 if low_rank is None else low_rank.rank,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 + len(windows) + len(columns),
            grid=(all_rows // tile_rows,),
            in_specs=[by_tile, column, column, HBM, *[HBM] * len(columns)],
            out_specs=[by_tile, *[lse_by_tile] * return_lse, *[sums_by_tile] * len(columns)],
            scratch_shapes=[
                pltpu.VMEM((2, 2, kv_heads, keys, head_dim), store.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((kv_heads, tile_rows, head_dim), jnp.float32),
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
                *low_rank_scratch(args, (kv_heads, tile_rows, lanes), keys),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(packed.shape, args.query.dtype if low_rank is None else jnp.float32),
            *[jax.ShapeDtypeStruct((kv_heads, all_rows, 1), jnp.float32)] * return_lse,
            *[jax.ShapeDtypeStruct((kv_heads, all_rows, lanes), args.query.dtype)] * len(columns),
        ],
        compiler_params=compiler_params("parallel"),
        name="paged_attention",
    )(
        *(args.layer.reshape(1), page_tables.reshape(-1), last, following, *windows, *columns),
        *(packed, own, owner, store, *(() if low_rank is None else (low_rank.store,))),
    )
    attended = unpack_rows(out, rows, q_heads)
    if low_rank is not None:
        attended = expand_lanes(args, low_rank, attended, unpack_rows(results[-1], rows, q_heads))
    return (attended, unpack_rows(results[0], rows, q_heads)[..., 0]) if return_lse else attended


def low_rank_lanes(low_rank: LowRank | None) -> int:
    """Columns of Y that are copied and summed: a line of 128 that has a whole adapter's, or all; 0 without adapters."""
    if low_rank is None:
        return 0
    width = low_rank.store.shape[3]
    return width if width % LANES or LANES % low_rank.rank else LANES


def low_rank_scratch(args: AttentionArgs, sums: tuple[int, int, int], keys: int) -> list[Any]:
    """Two buffers of Y, their semaphores, and the sums; none without adapters."""
    if args.low_rank is None:
        return []
    return [
        pltpu.VMEM((2, keys, sums[2]), args.low_rank.store.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM(sums, jnp.float32),
    ]


def expand_lanes(
    args: AttentionArgs, low_rank: LowRank, out: Queries, sums: Float[Array, "rows q_heads lanes"]
) -> Queries:
    """The output with what adapters add. Of a row's sums, all lanes but its adapter's are 0."""
    rows, q_heads, lanes = sums.shape
    kv_heads, rank = args.store.shape[3], low_rank.rank
    own = sums.reshape(rows, kv_heads, q_heads // kv_heads, lanes // rank, rank).sum(3)
    added = expand(low_rank, args.layer, own, args.requests)
    added = jnp.where((args.positions >= 0)[:, None, None], added.reshape(out.shape), 0)
    return (out + added).astype(args.query.dtype)


def row_tile(rows: int) -> int:
    """Rows that share one pass over the keys."""
    return min(ROW_TILE, rows + -rows % TILE)


def pack_rows(
    args: AttentionArgs, tile: int
) -> tuple[Float[Array, "kv_heads packed head_dim"], Int[Array, "packed 1"], Int[Array, "packed 1"]]:
    """One matrix a KV head, and the position and request of each of its lines.

    The lines are `[row, head]`: with 2 query heads a KV head, r0h0 r0h1 r1h0 r1h1 and so on.
    """
    kv_heads = args.store.shape[3]
    group = args.query.shape[1] // kv_heads
    query = pad_rows(args.query, tile)
    packed = query.reshape(len(query), kv_heads, group, -1).transpose(1, 0, 2, 3)
    padded = pad_positions(args.positions, args.requests, tile)
    own, owner = (jnp.repeat(x.astype(jnp.int32), group)[:, None] for x in padded)
    return packed.reshape(kv_heads, len(query) * group, -1).astype(product_dtype(args)), own, owner


def product_dtype(args: AttentionArgs) -> Any:
    """What queries are multiplied in: the store's dtype, or their own if that is float8."""
    return args.query.dtype if args.store.dtype == FLOAT8 else args.store.dtype


def unpack_rows(
    packed: Float[Array, "kv_heads packed head_dim"], rows: int, q_heads: int
) -> Float[Array, "rows q_heads head_dim"]:
    """What `pack_rows` packed, without the padding."""
    kv_heads, _, head_dim = packed.shape
    unpacked = packed.reshape(kv_heads, -1, q_heads // kv_heads, head_dim).transpose(1, 0, 2, 3)
    return unpacked.reshape(-1, q_heads, head_dim)[:rows]


def spans(args: AttentionArgs, tile: int) -> tuple[Int[Array, "tiles_requests"], Int[Array, "tiles_followers"]]:
    """Which keys each tile of rows reads, flattened for SMEM.

    Returns:
      For each tile and request, the last position of the tile's rows of the request, -1 if it has none; and for each
      tile and request, the first request at or behind it that has a row there, `num_requests` if there is none.
    """
    # Of 4 requests, a tile with the positions 3 and 9 of request 1 and 0 of request 3 gives
    #   last       -1  9 -1  0
    #   following   1  1  3  3  4
    num_requests = len(args.page_tables)
    own, owner = (x.reshape(-1, tile, 1) for x in pad_positions(args.positions, args.requests, tile))
    number = jnp.arange(num_requests, dtype=jnp.int32)
    last = jnp.where(owner == number, own, -1).max(1).astype(jnp.int32)
    following = lax.cummin(jnp.where(last >= 0, number, num_requests), axis=1, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=num_requests)
    return last.reshape(-1), following.reshape(-1)


def first_keys(args: AttentionArgs, tile: int, window: Window) -> Int[Array, "tiles_requests"]:
    """For each tile of rows and request, the first key that one of the tile's rows sees; beside the last of `spans`."""
    own, owner = (x.reshape(-1, tile, 1) for x in pad_positions(args.positions, args.requests, tile))
    mine = (owner == jnp.arange(len(args.page_tables))) & (own >= 0)
    first = jnp.min(jnp.where(mine, own, jnp.iinfo(jnp.int32).max), axis=1)
    return first_seen(first, window).astype(jnp.int32).reshape(-1)


def _attention_kernel(
    layer_ref: Ref,  # [1]
    tables_ref: Ref,  # [requests * max_pages]
    last_ref: Ref,  # [tiles * requests]
    following_ref: Ref,  # [tiles * (requests + 1)]
    *refs: Ref,
    scale: float,
    num_requests: int,
    return_lse: bool,
    windowed: bool,
    rank: int,
) -> None:
    """The other `refs`, in this order:

    first_ref: [tiles * requests], and `window_ref`, [1], if there are windows.
    columns_ref: [requests], if there are adapters, of this rank.
    q_ref: [kv_heads, tile_rows, head_dim].
    own_ref: [tile_rows, 1].
    owner_ref: [tile_rows, 1].
    store_ref: [layers, pages, 2, kv_heads, page_size, head_dim], in HBM.
    low_store_ref: [layers, pages, page_size, width], in HBM, if there are adapters.
    out_ref: [kv_heads, tile_rows, head_dim].
    lse_ref: [kv_heads, tile_rows, 1] float32, if it is to be returned.
    sums_ref: [kv_heads, tile_rows, lanes], if there are adapters.
    kv_ref: [2 buffers, 2, kv_heads, keys, head_dim], and `sems`, its two semaphores.
    acc_ref: [kv_heads, tile_rows, head_dim] float32.
    top_ref: [kv_heads, tile_rows, LANES] float32, the running maximum, the same in all lanes.
    total_ref: the same of the running sum.
    y_ref: [2 buffers, keys, lanes], `y_sems`, its two semaphores, and `low_ref`, float32 [kv_heads, tile_rows, lanes],
        the weighted sum of Y, if there are adapters.
    """
    others = iter(refs)

    def take(count: int, given: Any = True) -> list[Ref]:
        return [next(others) if given else None for _ in range(count)]

    first_ref, window_ref = take(2, windowed)
    (columns_ref,) = take(1, rank)
    q_ref, own_ref, owner_ref, store_ref = take(4)
    (low_store_ref,) = take(1, rank)
    (out_ref,) = take(1)
    (lse_ref,) = take(1, return_lse)
    (sums_ref,) = take(1, rank)
    kv_ref, sems, acc_ref, top_ref, total_ref = take(5)
    y_ref, y_sems, low_ref = take(3, rank)
    tile = pl.program_id(0)
    kv_heads, tile_rows, _ = q_ref.shape
    page_size, keys = store_ref.shape[4], kv_ref.shape[3]
    max_pages = tables_ref.shape[0] // num_requests

    def last_of(request: Index) -> Index:
        return last_ref[tile * num_requests + request]

    def first_of(request: Index) -> Index:
        return first_ref[tile * num_requests + request]

    def start_of(request: Index) -> Index:
        """The block that its first key is in. Behind the last request, there is none to read."""
        return lax.div(first_of(jnp.minimum(request, num_requests - 1)), keys) if windowed else 0

    def next_request(request: Index) -> Index:
        return following_ref[tile * (num_requests + 1) + request]

    def transfer(request: Index, block: Index, slot: Index, act: str) -> None:
        first = block * (keys // page_size)

        def copy_of(page: Index) -> Copy:
            number = tables_ref[request * max_pages + first + page]
            target = kv_ref.at[slot, :, :, pl.ds(pl.multiple_of(page * page_size, TILE), page_size)]
            return pltpu.make_async_copy(store_ref.at[layer_ref[0], number], target, sems.at[slot])

        def low_copy_of(page: Index) -> Copy:
            number = tables_ref[request * max_pages + first + page]
            begin: Index = 0
            lanes = y_ref.shape[2]
            if low_store_ref.shape[3] > lanes:
                begin = pl.multiple_of(lax.div(jnp.maximum(columns_ref[request], 0), lanes) * lanes, lanes)
            source = low_store_ref.at[layer_ref[0], number, :, pl.ds(begin, lanes)]
            target = y_ref.at[slot, pl.ds(pl.multiple_of(page * page_size, TILE), page_size)]
            return pltpu.make_async_copy(source, target, y_sems.at[slot])

        count = jnp.minimum(last_of(request) // page_size + 1 - first, keys // page_size)
        each_page(count, copy_of, act)
        if rank:
            each_page(count, low_copy_of, act)

    def attend(request: Index, block: Index, slot: Index) -> None:
        first_key = block * keys

        outside = first_key + keys > last_of(request) + 1
        if windowed:
            outside |= first_key < first_of(request)

        @pl.when(outside)
        def clear_unseen() -> None:  # slots that no row sees may hold anything, and 0 * NaN would be NaN
            seen = first_key + lax.broadcasted_iota(jnp.int32, kv_ref.shape[3:], 0) <= last_of(request)
            if windowed:
                seen &= first_key + lax.broadcasted_iota(jnp.int32, kv_ref.shape[3:], 0) >= first_of(request)

            def clear(head: Index, _: None) -> None:
                values = kv_ref[slot, 1, head].astype(jnp.float32)
                kv_ref[slot, 1, head] = jnp.where(seen, values, 0).astype(kv_ref.dtype)

            lax.fori_loop(0, kv_heads, clear, None)

        if rank:  # so are columns of other adapters, which may be those of other rows of the tile
            shape = y_ref.shape[1:]
            key, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            column = columns_ref[request]  # -1 for a request without an adapter, of which nothing is kept
            own_lane = jnp.where(column < 0, -1, lane - lax.rem(column, shape[1]))
            kept = (first_key + key <= last_of(request)) & (own_lane >= 0) & (own_lane < rank)
            if windowed:
                kept &= first_key + key >= first_of(request)
            y_ref[slot] = jnp.where(kept, y_ref[slot].astype(jnp.float32), 0).astype(y_ref.dtype)

        own = jnp.where(owner_ref[...] == request, own_ref[...], -1)
        visible = first_key + lax.broadcasted_iota(jnp.int32, (tile_rows, keys), 1) <= own
        if windowed:
            oldest = own - window_ref[0] + 1
            visible &= first_key + lax.broadcasted_iota(jnp.int32, (tile_rows, keys), 1) >= oldest

        def attend_head(head: Index, _: None) -> None:
            scores = jnp.where(visible, head_scores(q_ref[head], kv_ref[slot, 0, head], scale), -jnp.inf)
            top = top_ref[head, :, :1]
            new_top = jnp.maximum(top, scores.max(1, keepdims=True))
            finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # rows that have seen no key yet
            weights, decay = jnp.exp(scores - finite_top), jnp.exp(top - finite_top)
            update = weighted_sum(weights, widen(kv_ref[slot, 1, head], q_ref.dtype))
            total = total_ref[head, :, :1] * decay + weights.sum(1, keepdims=True)
            acc_ref[head] = acc_ref[head] * decay + update
            if rank:
                low_ref[head] = low_ref[head] * decay + weighted_sum(weights, y_ref[slot])
            top_ref[head] = jnp.broadcast_to(new_top, (tile_rows, LANES))
            total_ref[head] = jnp.broadcast_to(total, (tile_rows, LANES))

        lax.fori_loop(0, kv_heads, attend_head, None)

    def step(state: tuple[Index, Index, Index]) -> tuple[Index, Index, Index]:
        request, block, slot = state
        more = (block + 1) * keys <= last_of(request)
        following = next_request(request + 1)
        then = jnp.where(more, request, following), jnp.where(more, block + 1, start_of(following)), 1 - slot

        pl.when(then[0] < num_requests)(lambda: transfer(*then, "start"))
        transfer(*state, "wait")
        attend(*state)
        return then

    acc_ref[...] = jnp.zeros_like(acc_ref)
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    if rank:
        low_ref[...] = jnp.zeros_like(low_ref)
    first = next_request(0)
    start = first, start_of(first) if windowed else jnp.int32(0), jnp.int32(0)
    pl.when(start[0] < num_requests)(lambda: transfer(*start, "start"))
    lax.while_loop(lambda state: state[0] < num_requests, step, start)
    for head in range(kv_heads):  # padding sees no key; its output is 0
        total = jnp.maximum(total_ref[head, :, :1], jnp.finfo(jnp.float32).tiny)
        out_ref[head] = (acc_ref[head] / total).astype(out_ref.dtype)
        if rank:
            sums_ref[head] = (low_ref[head] / total).astype(sums_ref.dtype)
        if return_lse:
            lse_ref[head] = top_ref[head, :, :1] + jnp.log(total)


def weighted_sum(weights: Array, values: Array) -> Float[Array, "packed _"]:
    """One head's weights times its values, or Y, in float32."""
    return lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((1,), (0,)), ((), ())),
        precision=precision(values.dtype),
        preferred_element_type=jnp.float32,
    )


def head_scores(q: Array, keys: Array, scale: float) -> Float[Array, "packed keys"]:
    """Scaled products of one head's queries and keys, in float32."""
    keys = widen(keys, q.dtype)
    products = lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())), precision=precision(keys.dtype), preferred_element_type=jnp.float32
    )
    return products * scale
