"""Blocked attention with an online softmax (FlashAttention-2, algorithm 1) in plain XLA loops.

Loop bounds are data: a tile of rows reads no key behind its last position, no block of keys before its first row's
window, and padding costs nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.layout import (
    Queries,
    Window,
    context,
    first_seen,
    group_heads,
    num_tiles,
    pad_positions,
    pad_rows,
    take_tile,
    visible,
    widen,
)
from sparsex_kernels.paged_attention import gather
from sparsex_kernels.paged_attention.low_rank import beside, expanded, low_rank_values
from sparsex_kernels.paged_attention.online_softmax import Softmax, add_block, no_keys

# Rows that share one pass over the keys, and keys a step, rounded to whole pages. On a CPU a tile fits into the cache;
# on an accelerator steps are few, because each launches kernels.
CPU_TILE = (128, 256)
ACCELERATOR_TILE = (512, 1024)
FEW_ROWS = 64  # a decode step's. An accelerator then gathers every row's keys at once, which is faster than a loop

Grouped = Float[Array, "tile kv_heads group head_dim"]
Packed = Float[Array, "kv_heads packed head_dim"]  # for each KV head, the tile's rows of one query head after the other


class RowTile(NamedTuple):
    """Consecutive rows that share a pass over the keys."""

    query: Packed
    positions: Int[Array, "tile"]  # -1 is padding
    requests: Int[Array, "tile"]


class KeyBlock(NamedTuple):
    """Consecutive keys of one request, and the tile's rows that may see them."""

    request: Int[Array, ""]
    first_key: Int[Array, ""]
    pages: Int[Array, "pages"]
    positions: Int[Array, "tile"]  # -1 for the rows of other requests
    window: Window | None

    def seen(self, keys: Int[Array, "keys"]) -> Bool[Array, "keys"]:
        """Which keys lie between the first and the last that some row may see."""
        seen = keys <= self.positions.max()
        return seen if self.window is None else seen & (keys >= first_of_tile(self.positions, self.window))


def paged_attention(
    args: AttentionArgs, return_lse: bool = False
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    query, store = args.query, args.store
    if len(query) <= FEW_ROWS and args.backend.platform != "cpu":
        return gather.paged_attention(args, return_lse)
    tile = 1 if args.is_decode else row_tile(args)
    grouped = pad_rows(group_heads(query, store), tile)
    positions, requests = pad_positions(args.positions, args.requests, tile)

    def attend_tile(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        attended = _attend_tile(args, *take_tile(i, tile, grouped, positions, requests))
        out, lse = (
            lax.dynamic_update_slice_in_dim(x, new, i * tile, 0) for x, new in zip(results, attended, strict=True)
        )
        return out, lse

    nothing = jnp.zeros_like(grouped), jnp.full(grouped.shape[:3], -jnp.inf)
    out, lse = lax.fori_loop(0, num_tiles(positions, tile), attend_tile, nothing)
    out, lse = out[: len(query)].reshape(query.shape), lse[: len(query)].reshape(query.shape[:2])
    return (out, lse) if return_lse else out


def row_tile(args: AttentionArgs) -> int:
    """Rows that share one pass over the keys."""
    return min(_tile(args.backend)[0], len(args.query))


def block_pages(args: AttentionArgs) -> int:
    """Pages of a key block."""
    return min(max(_tile(args.backend)[1] // args.store.shape[4], 1), args.page_tables.shape[1])


def _tile(backend: Backend) -> tuple[int, int]:
    return CPU_TILE if backend.platform == "cpu" else ACCELERATOR_TILE


def _attend_tile(
    args: AttentionArgs, query: Grouped, positions: Int[Array, "tile"], requests: Int[Array, "tile"]
) -> tuple[Grouped, Float[Array, "tile kv_heads group"]]:
    def step(block: KeyBlock, state: Softmax) -> Softmax:
        keys, values = (widen(x, query.dtype) for x in context(args.store, args.layer, block.pages))
        # A slot that no row sees may hold anything, and 0 * NaN would be NaN.
        seen = block.seen(block.first_key + jnp.arange(values.shape[1]))
        if low_rank is not None:
            values = beside(values, low_rank_values(low_rank, args.layer, block.pages, block.request))
        values = jnp.where(seen[:, None], values, 0)
        return add_block(state, block_scores(tile.query, keys, block, args.scale), values)

    rows, kv_heads, group, _ = query.shape
    low_rank, tile = args.low_rank, RowTile(pack(query), positions, requests)
    more = low_rank.rank if low_rank is not None else 0
    out, lse = fold_key_blocks(args, tile, step, no_keys(tile.query, more)).result()
    lse = lse.reshape(kv_heads, group, rows).transpose(2, 0, 1)
    out = out.reshape(kv_heads, group, rows, -1).transpose(2, 0, 1, 3)
    if low_rank is not None:
        out = expanded(low_rank, args.layer, out, requests)
    return out.astype(query.dtype), lse


def pack(query: Grouped) -> Packed:
    """One matrix a KV head, so that a block's K is read once for all query heads that share it.

    The 3 rows of a tile with 2 query heads a KV head are packed as h0r0 h0r1 h0r2 h1r0 h1r1 h1r2.
    """
    tile, kv_heads, group, head_dim = query.shape
    return query.transpose(1, 2, 0, 3).reshape(kv_heads, group * tile, head_dim)


def fold_key_blocks[State](
    args: AttentionArgs, tile: RowTile, step: Callable[[KeyBlock, State], State], state: State
) -> State:
    """Fold `step` over the key blocks of every request in the tile, from the first that some row sees to the last."""
    pages_each = block_pages(args)
    keys_each = pages_each * args.store.shape[4]
    num_requests, max_pages = args.page_tables.shape
    tables = jnp.pad(args.page_tables, ((0, 0), (0, -max_pages % pages_each)))

    def over_request(request: Array, state: State) -> State:
        own = jnp.where(tile.requests == request, tile.positions, -1)

        def over_block(i: Array, state: State) -> State:
            pages = lax.dynamic_slice_in_dim(tables[request], i * pages_each, pages_each)
            return step(KeyBlock(request, i * keys_each, pages, own, args.window), state)

        first = 0 if args.window is None else first_of_tile(own, args.window) // keys_each
        return lax.fori_loop(first, -(-(own.max() + 1) // keys_each), over_block, state)

    live = tile.positions >= 0
    first = jnp.min(jnp.where(live, tile.requests, num_requests))
    last = jnp.max(jnp.where(live, tile.requests, -1))
    return lax.fori_loop(first, last + 1, over_request, state)


def first_of_tile(positions: Int[Array, "tile"], window: Window) -> Int[Array, ""]:
    """The first key that any row sees; if all are padding, some key that is far behind the last."""
    return jnp.min(first_seen(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), window))


def block_scores(
    query: Packed, keys: Float[Array, "kv_heads keys head_dim"], block: KeyBlock, scale: float
) -> Float[Array, "kv_heads packed keys"]:
    """Scaled scores in float32; -inf where a row, by its position, may not see a key."""
    scores = jnp.einsum("hrd,hkd->hrk", query, keys, preferred_element_type=jnp.float32) * scale
    seen = visible(block.first_key + jnp.arange(keys.shape[1]), block.positions[:, None], block.window)
    return jnp.where(jnp.tile(seen, (query.shape[1] // len(seen), 1)), scores, -jnp.inf)
