"""Copies of Y token by token: what every other implementation is compared with."""

import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.copy_low_rank.layers import moved_layers
from sparsex_kernels.layout import LowRankStore


def copy_low_rank(args: CopyArgs) -> LowRankStore:
    """See `sparsex_kernels.copy_low_rank`."""
    page_size, layer = args.store.shape[2], jnp.arange(len(args.store))
    first, end, offset = moved_layers(args)

    def move(i: Array, store: Array) -> Array:
        copied = (layer >= first[i]) & (layer < end[i]) & (args.target[i] >= 0)
        source = jnp.clip(layer + offset[i], 0, len(store) - 1)
        rows = store[source, args.source[i] // page_size, args.source[i] % page_size]
        moved = store.at[:, args.target[i] // page_size, args.target[i] % page_size].set(rows)
        return jnp.where(copied[:, None, None, None], moved, store)

    return lax.fori_loop(0, len(args.source), move, args.store)
