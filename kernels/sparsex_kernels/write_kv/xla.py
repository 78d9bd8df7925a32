"""KV write as one scatter."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, RowInts, Store, row_addresses


def write_kv(
    store: Store,
    layer: Int[Array, ""],
    keys: Float[Array, "rows kv_heads head_dim"],
    values: Float[Array, "rows kv_heads head_dim"],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
) -> Store:
    """See `sparsex_kernels.write_kv`."""
    page, offset = row_addresses(store, positions, requests, page_tables)
    rows = jnp.stack([keys, values], axis=1).astype(store.dtype)
    return store.at[layer, page, :, :, offset].set(rows, mode="drop")
