"""Copies of Y by gather and scatter, some tokens of all layers at a time."""

import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.copy_low_rank.layers import moved_layers
from sparsex_kernels.layout import LowRankStore, num_tiles, pad_rows, take_tile

TOKENS_A_STEP = 256  # bounds the temporary memory


def copy_low_rank(args: CopyArgs) -> LowRankStore:
    """See `sparsex_kernels.copy_low_rank`."""
    first, end, offset = moved_layers(args)
    moved = (args.target >= 0) & (first < end)
    order = jnp.argsort(~moved, stable=True)  # what does not move stands at the end, and costs nothing
    entries = args.source, jnp.where(moved, args.target, -1), first, end, offset
    step = min(TOKENS_A_STEP, len(args.source))
    source, target, *layers = (pad_rows(x[order], step, -1) for x in entries)

    def move(i: Array, store: Array) -> Array:
        return _move(store, *take_tile(i, step, source, target, *layers))

    return lax.fori_loop(0, num_tiles(target, step), move, args.store)


def _move(store: Array, source: Array, target: Array, first: Array, end: Array, offset: Array) -> Array:
    layers, pages, page_size, _ = store.shape
    layer = jnp.arange(layers)
    rows = store.at[layer + offset[:, None], (source // page_size)[:, None], (source % page_size)[:, None]]
    copied = (layer >= first[:, None]) & (layer < end[:, None]) & (target >= 0)[:, None]
    page = jnp.where(copied, (target // page_size)[:, None], pages)  # behind the last: dropped
    return store.at[layer, page, (target % page_size)[:, None]].set(rows.get(mode="clip"), mode="drop")
