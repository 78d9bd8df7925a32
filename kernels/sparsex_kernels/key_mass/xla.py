"""Blocked key mass in plain XLA loops: one pass over the keys for the log-sum-exp, one for the column sums."""

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp
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
    take_tile,
)
from sparsex_kernels.paged_attention.xla import (
    Grouped,
    KeyBlock,
    block_pages,
    block_scores,
    fold_key_blocks,
    pack,
    row_tile,
)


def key_mass(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    power: int = 1,
) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`. Sums in a fixed order, so the result is deterministic."""

    def add_tile(i: Array, mass: Array) -> Array:
        q, own, owner = take_tile(i, tile, grouped, positions, requests)
        return _add_tile(mass, q, own, owner, store, layer, page_tables, scale, power)

    tile = min(row_tile(), q.shape[0])
    grouped = pad_rows(group_heads(q, store), tile)
    positions, requests = pad_rows(positions, tile, -1), pad_rows(requests, tile)
    num_requests, max_pages = page_tables.shape
    padded_pages = max_pages + -max_pages % block_pages(store, page_tables)
    mass = jnp.zeros((num_requests, padded_pages * store.shape[4]))
    mass = lax.fori_loop(0, num_tiles(positions, tile), add_tile, mass)
    return mass[:, : max_pages * store.shape[4]]


def _add_tile(
    mass: Float[Array, "requests context"],
    q: Grouped,
    positions: Int[Array, "tile"],
    requests: Int[Array, "tile"],
    store: Store,
    layer: Int[Array, ""],
    page_tables: PageTables,
    scale: float,
    power: int,
) -> Float[Array, "requests context"]:
    def scores(block: KeyBlock) -> Array:
        return block_scores(packed, context(store, layer, block.pages)[0], block, scale)

    def log_sum_exp(block: KeyBlock, lse: Array) -> Array:
        block_lse = logsumexp(scores(block), axis=-1)
        return jnp.logaddexp(lse, block_lse)

    def column_sums(block: KeyBlock, mass: Array) -> Array:
        visible = scores(block)
        weights = jnp.where(jnp.isfinite(visible), jnp.exp(power * (visible - lse[..., None])), 0)
        at = (block.request, block.first_key)
        sums = weights.sum((0, 1))[None]
        return lax.dynamic_update_slice(mass, lax.dynamic_slice(mass, at, sums.shape) + sums, at)

    packed = pack(q)
    none_yet = jnp.full(packed.shape[:2], -jnp.inf)
    lse = fold_key_blocks(positions, requests, store, page_tables, log_sum_exp, none_yet)
    return fold_key_blocks(positions, requests, store, page_tables, column_sums, mass)
