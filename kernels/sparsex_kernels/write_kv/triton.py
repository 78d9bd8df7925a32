"""KV write in Triton: a program puts some rows of one head at their slots."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, RowInts, Store, row_addresses
from sparsex_kernels.triton import check_copies, in_place

TILE = 32  # rows


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
    check_copies(store)
    from sparsex_kernels.write_kv.triton_kernels import write

    page, offset = row_addresses(store, positions, requests, page_tables)
    page = jnp.where(page < store.shape[1], page + layer * store.shape[1], -1)
    return in_place(
        write,
        *(keys.astype(store.dtype), values.astype(store.dtype), page.astype(jnp.int32), offset.astype(jnp.int32)),
        store=store,
        grid=(-(-len(keys) // TILE), store.shape[3]),
        num_warps=4,
        rows=len(keys),
        TILE=TILE,
        KV_HEADS=store.shape[3],
        PAGE=store.shape[4],
        DIM=store.shape[5],
    )
