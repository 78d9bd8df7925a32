"""Blocked attention with an online softmax (FlashAttention-2, algorithm 1) in plain XLA loops.

Loop bounds are data: a tile of rows reads no key behind its last position, and padding costs nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.layout import (
    PageTables,
    Queries,
    RowInts,
    Store,
    context,
    group_heads,
    num_tiles,
    pad_rows,
    row_a_request,
    take_tile,
)
from sparsex_kernels.paged_attention import gather

# Rows that share one pass over the keys, and keys a step, rounded to whole pages: what a cache holds on a CPU, and
# few steps, each of which launches kernels, on an accelerator.
CPU_TILE = (128, 256)
ACCELERATOR_TILE = (512, 1024)
FEW_ROWS = 64  # a decode step's, for which an accelerator rather gathers every row's keys at once

Grouped = Float[Array, "tile kv_heads group head_dim"]
Packed = Float[Array, "kv_heads packed head_dim"]  # the tile's rows of each query head behind each other


class KeyBlock(NamedTuple):
    """Some consecutive keys of one request, and the tile's rows that may see them."""

    request: Int[Array, ""]
    first_key: Int[Array, ""]
    pages: Int[Array, "pages"]
    positions: Int[Array, "tile"]  # -1 for the rows of other requests


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    return_lse: bool = False,
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""

    def attend_tile(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        q, own, owner = take_tile(i, tile, grouped, positions, requests)
        attended = _attend_tile(q, own, owner, store, layer, page_tables, scale)
        out, lse = (
            lax.dynamic_update_slice_in_dim(x, new, i * tile, 0) for x, new in zip(results, attended, strict=True)
        )
        return out, lse

    if q.shape[0] <= FEW_ROWS and jax.default_backend() != "cpu":
        return gather.paged_attention(q, store, layer, positions, requests, page_tables, scale, return_lse)
    tile = 1 if row_a_request(q, page_tables) else min(row_tile(), q.shape[0])
    grouped = pad_rows(group_heads(q, store), tile)
    positions, requests = pad_rows(positions, tile, -1), pad_rows(requests, tile)
    nothing = jnp.zeros_like(grouped), jnp.full(grouped.shape[:3], -jnp.inf)
    out, lse = lax.fori_loop(0, num_tiles(positions, tile), attend_tile, nothing)
    out, lse = out[: q.shape[0]].reshape(q.shape), lse[: q.shape[0]].reshape(q.shape[:2])
    return (out, lse) if return_lse else out


def row_tile() -> int:
    return _tile()[0]


def _tile() -> tuple[int, int]:
    return CPU_TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE


def _attend_tile(
    q: Grouped,
    positions: Int[Array, "tile"],
    requests: Int[Array, "tile"],
    store: Store,
    layer: Int[Array, ""],
    page_tables: PageTables,
    scale: float,
) -> tuple[Grouped, Float[Array, "tile kv_heads group"]]:
    def step(block: KeyBlock, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, values = context(store, layer, block.pages)
        # A slot that nobody sees may hold anything, and 0 * NaN would be NaN.
        seen = block.first_key + jnp.arange(values.shape[1]) <= block.positions.max()
        values = jnp.where(seen[:, None], values, 0)
        return _online_softmax(state, block_scores(packed, keys, block, scale), values)

    tile, kv_heads, group, head_dim = q.shape
    packed = pack(q)
    start = (
        jnp.zeros(packed.shape, jnp.float32),
        jnp.full(packed.shape[:2], -jnp.inf),
        jnp.zeros(packed.shape[:2]),
    )
    acc, top, total = fold_key_blocks(positions, requests, store, page_tables, step, start)
    out = acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]  # padding sees nothing and gets 0
    lse = (top + jnp.log(total)).reshape(kv_heads, group, tile).transpose(2, 0, 1)
    return out.reshape(kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3).astype(q.dtype), lse


def pack(q: Grouped) -> Packed:
    """One matrix a KV head, so that a block's K is read once for all query heads that share it."""
    tile, kv_heads, group, head_dim = q.shape
    return q.transpose(1, 2, 0, 3).reshape(kv_heads, group * tile, head_dim)


def block_pages(store: Store, page_tables: PageTables) -> int:
    """Pages a key block takes."""
    return min(max(_tile()[1] // store.shape[4], 1), page_tables.shape[1])


def fold_key_blocks[State](
    positions: Int[Array, "tile"],
    requests: Int[Array, "tile"],
    store: Store,
    page_tables: PageTables,
    step: Callable[[KeyBlock, State], State],
    state: State,
) -> State:
    """Fold `step` over the key blocks, up to the last one any row sees, of every request in the tile."""
    pages_each = block_pages(store, page_tables)
    keys_each = pages_each * store.shape[4]
    tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % pages_each)))

    def over_request(request: Array, state: State) -> State:
        own = jnp.where(requests == request, positions, -1)

        def over_block(i: Array, state: State) -> State:
            pages = lax.dynamic_slice_in_dim(tables[request], i * pages_each, pages_each)
            return step(KeyBlock(request, i * keys_each, pages, own), state)

        return lax.fori_loop(0, -(-(own.max() + 1) // keys_each), over_block, state)

    live = positions >= 0
    first = jnp.min(jnp.where(live, requests, page_tables.shape[0]))
    last = jnp.max(jnp.where(live, requests, -1))
    return lax.fori_loop(first, last + 1, over_request, state)


def block_scores(
    q: Packed, keys: Float[Array, "kv_heads keys head_dim"], block: KeyBlock, scale: float
) -> Float[Array, "kv_heads packed keys"]:
    """Scaled scores in float32; -inf where a row, by its true position, may not see a key."""
    scores = jnp.einsum("hrd,hkd->hrk", q, keys, preferred_element_type=jnp.float32) * scale
    visible = block.first_key + jnp.arange(keys.shape[1]) <= block.positions[:, None]
    return jnp.where(jnp.tile(visible, (q.shape[1] // len(visible), 1)), scores, -jnp.inf)


def _online_softmax(state: tuple[Array, Array, Array], scores: Array, values: Array) -> tuple[Array, Array, Array]:
    acc, top, total = state
    most = scores.max(-1)
    new_top = jnp.maximum(top, most)
    finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0)  # rows that have seen no key yet
    weights = jnp.exp(scores - finite_top[..., None])
    decay = jnp.exp(top - finite_top)
    update = jnp.einsum("hrk,hkd->hrd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # Rows that see nothing of the block take nothing of it: what another request made NaN stays its own.
    update = jnp.where((most == -jnp.inf)[..., None], 0, update)
    return acc * decay[..., None] + update, new_top, total * decay + weights.sum(-1)
