"""Low-rank write row by row: what every other implementation is compared with."""

import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import WriteLowRankArgs
from sparsex_kernels.layout import LowRankStore


def write_low_rank(args: WriteLowRankArgs) -> LowRankStore:
    """See `sparsex_kernels.write_low_rank`."""
    page_size, requests = args.store.shape[2], jnp.minimum(args.requests, len(args.page_tables) - 1)
    columns = jnp.zeros(len(args.page_tables), jnp.int32) if args.columns is None else args.columns

    def write(i: Array, store: Array) -> Array:
        request, position = requests[i], args.positions[i]
        row = args.values[i].astype(store.dtype).reshape(1, 1, 1, -1)
        page = args.page_tables[request, position // page_size]
        place = args.layer, page, position % page_size, jnp.maximum(columns[request], 0)
        written = lax.dynamic_update_slice(store, row, place)
        return jnp.where((position >= 0) & (columns[request] >= 0), written, store)

    return lax.fori_loop(0, len(args.values), write, args.store)
