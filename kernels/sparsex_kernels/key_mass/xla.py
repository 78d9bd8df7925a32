"""Blocked key mass in plain XLA loops: one pass over the keys for the log-sum-exp, one for the column sums."""

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp
from jaxtyping import Float

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Power, context, group_heads, num_tiles, pad_positions, pad_rows, take_tile, widen
from sparsex_kernels.paged_attention import xla as blocked
from sparsex_kernels.paged_attention.xla import KeyBlock, RowTile


def key_mass(args: AttentionArgs, power: Power = 1) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`. Sums in a fixed order, so the result is deterministic."""
    rows = blocked.row_tile(args)
    grouped = pad_rows(group_heads(args.query, args.store), rows)
    positions, requests = pad_positions(args.positions, args.requests, rows)

    def add_tile(i: Array, mass: Array) -> Array:
        query, own, owner = take_tile(i, rows, grouped, positions, requests)
        return _add_tile(args, mass, RowTile(blocked.pack(query), own, owner), power)

    num_requests, max_pages = args.page_tables.shape
    padded_pages = max_pages + -max_pages % blocked.block_pages(args)
    mass = jnp.zeros((num_requests, padded_pages * args.store.shape[4]))
    return lax.fori_loop(0, num_tiles(positions, rows), add_tile, mass)[:, : args.context]


def _add_tile(
    args: AttentionArgs, mass: Float[Array, "requests padded_context"], tile: RowTile, power: Power
) -> Float[Array, "requests padded_context"]:
    def scores(block: KeyBlock) -> Array:
        keys, _ = context(args.store, args.layer, block.pages)
        return blocked.block_scores(tile.query, widen(keys, tile.query.dtype), block, args.scale)

    def log_sum_exp(block: KeyBlock, lse: Array) -> Array:
        return jnp.logaddexp(lse, logsumexp(scores(block), axis=-1))

    def column_sums(block: KeyBlock, mass: Array) -> Array:
        visible = scores(block)
        weights = jnp.where(jnp.isfinite(visible), jnp.exp(power * (visible - lse[..., None])), 0)
        at = (block.request, block.first_key)
        sums = weights.sum((0, 1))[None]
        return lax.dynamic_update_slice(mass, lax.dynamic_slice(mass, at, sums.shape) + sums, at)

    none_yet = jnp.full(tile.query.shape[:2], -jnp.inf)
    lse = blocked.fold_key_blocks(args, tile, log_sum_exp, none_yet)
    return blocked.fold_key_blocks(args, tile, column_sums, mass)
