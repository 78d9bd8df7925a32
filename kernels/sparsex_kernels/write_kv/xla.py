"""KV write as one scatter."""

import jax.numpy as jnp

from sparsex_kernels.arguments import WriteArgs
from sparsex_kernels.layout import Store, as_stored, row_addresses


def write_kv(args: WriteArgs) -> Store:
    """See `sparsex_kernels.write_kv`."""
    page, offset = row_addresses(args.store, args.positions, args.requests, args.page_tables)
    rows = as_stored(jnp.stack([args.keys, args.values], axis=1), args.store.dtype)
    return args.store.at[args.layer, page, :, :, offset].set(rows, mode="drop")
