"""Attention on TPU: FlashAttention-2 (algorithm 1) over pages that DMA brings from HBM, double-buffered.

A tile of rows takes one pass over the keys of each request that it has rows of. The query heads that share a KV head
are packed into one matrix, so K and V are read once for all of them.

Where adapters add to the values, the kernel sums Y beside V, and XLA expands the sums: rows of one tile may have
different adapters. A DMA moves whole lines of 128 columns, so Y of several adapters comes, and all but the request's
own is zeroed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

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


class _Refs(NamedTuple):
    """What the kernel reads and writes, in the order in which it gets it. None: this call has no use for it.

    Attributes:
      layer: [1].
      tables: [requests * max_pages].
      last, following: as `spans`.
      first: as `first_keys`, and `window`, [1], if there are windows.
      columns: [requests], if there are adapters.
      q: [kv_heads, tile_rows, head_dim].
      own, owner: [tile_rows, 1].
      store: [layers, pages, 2, kv_heads, page_size, head_dim], in HBM.
      low_store: [layers, pages, page_size, width], in HBM, if there are adapters.
      out: [kv_heads, tile_rows, head_dim].
      lse: [kv_heads, tile_rows, 1] float32, if it is to be returned.
      sums: [kv_heads, tile_rows, lanes], if there are adapters.
      kv: [2 buffers, 2, kv_heads, keys, head_dim], and `sems`, its two semaphores.
      acc: [kv_heads, tile_rows, head_dim] float32.
      top: [kv_heads, tile_rows, LANES] float32, the running maximum, the same in all lanes.
      total: the same of the running sum.
      y: [2 buffers, keys, lanes], `y_sems`, its two semaphores, and `low`, float32 [kv_heads, tile_rows, lanes], the
        weighted sum of Y, if there are adapters.
    """

    layer: Ref
    tables: Ref
    last: Ref
    following: Ref
    first: Ref
    window: Ref
    columns: Ref
    q: Ref
    own: Ref
    owner: Ref
    store: Ref
    low_store: Ref
    out: Ref
    lse: Ref
    sums: Ref
    kv: Ref
    sems: Ref
    acc: Ref
    top: Ref
    total: Ref
    y: Ref
    y_sems: Ref
    low: Ref

    @classmethod
    def of(cls, refs: Sequence[Ref], *, windows: bool, adapters: bool, lse: bool) -> "_Refs":
        wanted = dict.fromkeys(("first", "window"), windows) | {"lse": lse}
        wanted |= dict.fromkeys(("columns", "low_store", "sums", "y", "y_sems", "low"), adapters)
        given = iter(refs)
        return cls(*(next(given) if wanted.get(name, True) else None for name in cls._fields))


def _attention_kernel(*refs: Ref, scale: float, num_requests: int, return_lse: bool, windowed: bool, rank: int) -> None:
    """A tile's pass over all keys that its rows see.

    Args:
      refs: as `_Refs.of` takes them.
      rank: of the adapters; 0: there are none.
    """
    named = _Refs.of(refs, windows=windowed, adapters=rank > 0, lse=return_lse)
    one = _Pass(named, pl.program_id(0), scale, num_requests, rank)
    one.begin()
    first = one.next_request(0)
    start = first, one.start_of(first) if windowed else jnp.int32(0), jnp.int32(0)
    pl.when(start[0] < num_requests)(lambda: one.transfer(*start, "start"))
    lax.while_loop(lambda state: state[0] < num_requests, one.step, start)
    one.end()


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One tile of rows on its way over the keys of its requests, block by block. While a block is attended to in one
    buffer, the next one comes into the other."""

    refs: _Refs
    tile: Index
    scale: float
    num_requests: int
    rank: int

    @property
    def windowed(self) -> bool:
        return self.refs.first is not None

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.refs.kv.shape[3]

    @property
    def page_size(self) -> int:
        return self.refs.store.shape[4]

    # Which keys ---------------------------------------------------------------------------------------------

    def last_of(self, request: Index) -> Index:
        return self.refs.last[self.tile * self.num_requests + request]

    def first_of(self, request: Index) -> Index:
        return self.refs.first[self.tile * self.num_requests + request]

    def start_of(self, request: Index) -> Index:
        """The block that its first key is in. Behind the last request, there is none to read."""
        if not self.windowed:
            return 0
        return lax.div(self.first_of(jnp.minimum(request, self.num_requests - 1)), self.keys)

    def next_request(self, request: Index) -> Index:
        return self.refs.following[self.tile * (self.num_requests + 1) + request]

    def step(self, state: tuple[Index, Index, Index]) -> tuple[Index, Index, Index]:
        """Attend to a block of a request's keys, in a buffer. Returns the next block, which is coming by then."""
        request, block, slot = state
        more = (block + 1) * self.keys <= self.last_of(request)
        following = self.next_request(request + 1)
        then = jnp.where(more, request, following), jnp.where(more, block + 1, self.start_of(following)), 1 - slot

        pl.when(then[0] < self.num_requests)(lambda: self.transfer(*then, "start"))
        self.transfer(*state, "wait")
        self.attend(*state)
        return then

    # Into VMEM ----------------------------------------------------------------------------------------------

    def transfer(self, request: Index, block: Index, slot: Index, act: str) -> None:
        """Start, or wait for, the copies of those pages of a block that have keys which are seen."""
        first = block * (self.keys // self.page_size)
        count = jnp.minimum(self.last_of(request) // self.page_size + 1 - first, self.keys // self.page_size)
        each_page(count, functools.partial(self.copy_of, request, first, slot), act)
        if self.rank:
            each_page(count, functools.partial(self.low_copy_of, request, first, slot), act)

    def copy_of(self, request: Index, first: Index, slot: Index, page: Index) -> Copy:
        """Of K and V in a page of the block whose first page this is."""
        number = self.number_of(request, first, page)
        target = self.refs.kv.at[slot, :, :, self.place_of(page)]
        return pltpu.make_async_copy(self.refs.store.at[self.refs.layer[0], number], target, self.refs.sems.at[slot])

    def low_copy_of(self, request: Index, first: Index, slot: Index, page: Index) -> Copy:
        """Of Y in the same page: the line of lanes that has the columns of the request's adapter."""
        number = self.number_of(request, first, page)
        begin: Index = 0
        lanes = self.refs.y.shape[2]
        if self.refs.low_store.shape[3] > lanes:
            begin = pl.multiple_of(lax.div(jnp.maximum(self.refs.columns[request], 0), lanes) * lanes, lanes)
        source = self.refs.low_store.at[self.refs.layer[0], number, :, pl.ds(begin, lanes)]
        target = self.refs.y.at[slot, self.place_of(page)]
        return pltpu.make_async_copy(source, target, self.refs.y_sems.at[slot])

    def number_of(self, request: Index, first: Index, page: Index) -> Index:
        """Where a page of the block is in the store."""
        max_pages = self.refs.tables.shape[0] // self.num_requests
        return self.refs.tables[request * max_pages + first + page]

    def place_of(self, page: Index) -> Any:
        """Of a page's keys in a buffer."""
        return pl.ds(pl.multiple_of(page * self.page_size, TILE), self.page_size)

    # Attention ----------------------------------------------------------------------------------------------

    def attend(self, request: Index, block: Index, slot: Index) -> None:
        first_key = block * self.keys
        self.clear_unseen(request, first_key, slot)
        if self.rank:
            self.clear_other_columns(request, first_key, slot)
        visible = self.visible(request, first_key)
        lax.fori_loop(0, self.refs.q.shape[0], lambda head, _: self.attend_head(head, visible, slot), None)

    def clear_unseen(self, request: Index, first_key: Index, slot: Index) -> None:
        """Slots that no row sees may hold anything, and 0 * NaN would be NaN."""
        outside = first_key + self.keys > self.last_of(request) + 1
        if self.windowed:
            outside |= first_key < self.first_of(request)
        kv_ref = self.refs.kv

        @pl.when(outside)
        def clear_all() -> None:
            seen = first_key + lax.broadcasted_iota(jnp.int32, kv_ref.shape[3:], 0) <= self.last_of(request)
            if self.windowed:
                seen &= first_key + lax.broadcasted_iota(jnp.int32, kv_ref.shape[3:], 0) >= self.first_of(request)

            def clear(head: Index, _: None) -> None:
                values = kv_ref[slot, 1, head].astype(jnp.float32)
                kv_ref[slot, 1, head] = jnp.where(seen, values, 0).astype(kv_ref.dtype)

            lax.fori_loop(0, kv_ref.shape[2], clear, None)

    def clear_other_columns(self, request: Index, first_key: Index, slot: Index) -> None:
        """So may columns of other adapters, which may be those of other rows of the tile."""
        y_ref, shape = self.refs.y, self.refs.y.shape[1:]
        key, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        column = self.refs.columns[request]  # -1 for a request without an adapter, of which nothing is kept
        own_lane = jnp.where(column < 0, -1, lane - lax.rem(column, shape[1]))
        kept = (first_key + key <= self.last_of(request)) & (own_lane >= 0) & (own_lane < self.rank)
        if self.windowed:
            kept &= first_key + key >= self.first_of(request)
        y_ref[slot] = jnp.where(kept, y_ref[slot].astype(jnp.float32), 0).astype(y_ref.dtype)

    def visible(self, request: Index, first_key: Index) -> Bool[Array, "tile_rows keys"]:
        """Which of a block's keys each row of the tile sees; those of other requests see none."""
        shape = (self.refs.q.shape[1], self.keys)
        own = jnp.where(self.refs.owner[...] == request, self.refs.own[...], -1)
        visible = first_key + lax.broadcasted_iota(jnp.int32, shape, 1) <= own
        if self.windowed:
            oldest = own - self.refs.window[0] + 1
            visible &= first_key + lax.broadcasted_iota(jnp.int32, shape, 1) >= oldest
        return visible

    def attend_head(self, head: Index, visible: Bool[Array, "tile_rows keys"], slot: Index) -> None:
        q_ref, kv_ref, acc_ref, top_ref, total_ref = (
            getattr(self.refs, name) for name in ("q", "kv", "acc", "top", "total")
        )
        scores = jnp.where(visible, head_scores(q_ref[head], kv_ref[slot, 0, head], self.scale), -jnp.inf)
        top = top_ref[head, :, :1]
        new_top = jnp.maximum(top, scores.max(1, keepdims=True))
        finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # rows that have seen no key yet
        weights, decay = jnp.exp(scores - finite_top), jnp.exp(top - finite_top)
        update = weighted_sum(weights, widen(kv_ref[slot, 1, head], q_ref.dtype))
        total = total_ref[head, :, :1] * decay + weights.sum(1, keepdims=True)
        acc_ref[head] = acc_ref[head] * decay + update
        if self.rank:
            self.refs.low[head] = self.refs.low[head] * decay + weighted_sum(weights, self.refs.y[slot])
        top_ref[head] = jnp.broadcast_to(new_top, top_ref.shape[1:])
        total_ref[head] = jnp.broadcast_to(total, total_ref.shape[1:])

    # Its two ends -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing has been seen."""
        refs = self.refs
        refs.acc[...] = jnp.zeros_like(refs.acc)
        refs.top[...] = jnp.full_like(refs.top, -jnp.inf)
        refs.total[...] = jnp.zeros_like(refs.total)
        if self.rank:
            refs.low[...] = jnp.zeros_like(refs.low)

    def end(self) -> None:
        """Write the results. Padding sees no key; its output is 0."""
        refs = self.refs
        for head in range(refs.q.shape[0]):
            total = jnp.maximum(refs.total[head, :, :1], jnp.finfo(jnp.float32).tiny)
            refs.out[head] = (refs.acc[head] / total).astype(refs.out.dtype)
            if self.rank:
                refs.sums[head] = (refs.low[head] / total).astype(refs.sums.dtype)
            if refs.lse is not None:
                refs.lse[head] = refs.top[head, :, :1] + jnp.log(total)


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
