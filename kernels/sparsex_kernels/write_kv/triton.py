"""KV write in Triton: a program puts some rows of one head at their slots."""

import jax.numpy as jnp

from sparsex_kernels.arguments import WriteArgs
from sparsex_kernels.layout import Store, as_stored, row_addresses
from sparsex_kernels.triton import check_copies, in_place

TILE = 32  # rows


def write_kv(args: WriteArgs) -> Store:
    """See `sparsex_kernels.write_kv`."""
    check_copies(args)
    from sparsex_kernels.write_kv.triton_kernels import write

    store = args.store
    keys, values = (as_stored(x, store.dtype) for x in (args.keys, args.values))
    page, offset = row_addresses(store, args.positions, args.requests, args.page_tables)
    page = jnp.where(page < store.shape[1], page + args.layer * store.shape[1], -1)
    return in_place(
        write,
        *(keys, values, page.astype(jnp.int32), offset.astype(jnp.int32)),
        store=store,
        grid=(-(-len(keys) // TILE), store.shape[3]),
        num_warps=4,
        rows=len(keys),
        TILE=TILE,
        KV_HEADS=store.shape[3],
        PAGE=store.shape[4],
        DIM=store.shape[5],
    )
