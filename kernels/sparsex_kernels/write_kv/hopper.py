"""KV write for Hopper GPUs, by Pallas' Mosaic GPU: TMA copies only."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import WriteArgs
from sparsex_kernels.layout import Store, as_stored, pad_rows, row_addresses
from sparsex_kernels.mosaic import Ref, as_scalar, check_copies, flat_store, kernel

ROWS = (16, 8)  # of a program: the first that divides the number of rows, so that none need be padded


def write_kv(args: WriteArgs) -> Store:
    """See `sparsex_kernels.write_kv`. Each row's K and V travel through shared memory, all heads in one copy."""
    store, keys, values = args.store, args.keys, args.values
    check_copies(store)
    page, offset = row_addresses(store, args.positions, args.requests, args.page_tables)
    page = jnp.where(page < store.shape[1], page, -1)
    tile = next((rows for rows in ROWS if len(keys) % rows == 0), ROWS[-1])
    page, offset = (pad_rows(x.astype(jnp.int32), tile, -1) for x in (page, offset))
    keys, values = (pad_rows(as_stored(x, store.dtype), tile) for x in (keys, values))
    ref = jax.new_ref(flat_store(store))
    heads, head_dim = keys.shape[1:]
    kernel(
        functools.partial(_kernel, tile, heads, store.shape[1]),
        args.backend,
        grid=(len(keys) // tile,),
        grid_names=("tile",),
        num_threads=1,
        scratch_types={
            "smem": plgpu.SMEM((2, tile, heads, head_dim), store.dtype),
            "ready": plgpu.Barrier(num_arrivals=2),
        },
    )(keys, values, as_scalar(args.layer), page, offset, ref)
    return jax.freeze(ref).reshape(store.shape)


def _kernel(tile: int, heads: int, layer_pages: int, *refs: Ref, smem: Ref, ready: Ref) -> None:
    keys, values, layer, page_ref, offset_ref, store = refs
    first, first_page = lax.axis_index("tile") * tile, layer[0] * layer_pages
    for kind, rows in enumerate((keys, values)):
        plgpu.copy_gmem_to_smem(rows.at[pl.ds(first, tile)], smem.at[kind], ready)
    # All addresses are read at once: one by one, each would wait for memory.
    pages = [page_ref[first + n] for n in range(tile)]
    offsets = [offset_ref[first + n] for n in range(tile)]
    plgpu.barrier_wait(ready)
    for n, (page, offset) in enumerate(zip(pages, offsets, strict=True)):

        @pl.when(page >= 0)
        def _(n: int = n, page: Array = page, offset: Array = offset) -> None:
            for kind in range(2):
                target = store.at[first_page + page, pl.ds(kind * heads, heads), offset]
                plgpu.copy_smem_to_gmem(smem.at[kind, n], target)

    plgpu.wait_smem_to_gmem(0)
