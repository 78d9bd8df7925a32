"""Low-rank write as one scatter."""

from typing import Any

import jax.numpy as jnp

from sparsex_kernels.arguments import WriteLowRankArgs
from sparsex_kernels.layout import LowRankStore


def write_low_rank(args: WriteLowRankArgs) -> LowRankStore:
    """See `sparsex_kernels.write_low_rank`."""
    store, values = args.store, args.values.astype(args.store.dtype)
    _, pages, page_size, _ = store.shape
    page = args.page_tables.at[args.requests, args.positions // page_size].get(mode="clip")
    dropped = pages + jnp.arange(len(values))  # behind the last page, each row elsewhere: no two rows share a slot
    page, offset = jnp.where(args.positions >= 0, page, dropped), args.positions % page_size
    how: Any = {"mode": "drop", "unique_indices": True}  # so that nothing need be atomic
    if args.columns is None:
        return store.at[args.layer, page, offset].set(values, **how)
    first = args.columns.at[args.requests].get(mode="clip")
    page = jnp.where(first >= 0, page, dropped)
    column = first[:, None] + jnp.arange(values.shape[1])
    return store.at[args.layer, page[:, None], offset[:, None], column].set(values, **how)
