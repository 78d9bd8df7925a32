"""What the TPU kernels share: pages streamed from HBM, and tiles of slots that are changed in place.

On a TPU the last two axes of an array are stored in tiles of 8 by 128 (two rows of bfloat16 share a word), and a
DMA moves whole tiles. So attention reads a page at a time. A kernel that writes single slots copies the tile of slots
around them (`slot_tile`) into VMEM, changes it there in float32, whose rows can be addressed one by one, and copies it
back.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Int

from sparsex_kernels.layout import FLOAT8, Store

Ref = Any  # a reference to SMEM, VMEM or HBM inside a kernel
Index = Any  # an int, or a scalar of a kernel
Copy = Any  # an asynchronous copy

TILE = 16  # rows of queries, or slots changed together: the rows of a bfloat16 tile, a multiple of those of float32
KEY_BLOCK_BYTES = 2 << 20  # of K and V in VMEM, twice for double buffering
VMEM_BYTES = 48 << 20  # a kernel's limit; a v5e or v6e core has 128 MiB, a v7 core 64

HBM = pl.BlockSpec(memory_space=pl.ANY)


def compiler_params(*dimensions: str) -> Any:
    """Each grid dimension is `arbitrary` (run in order) or `parallel`."""
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=VMEM_BYTES)  # type: ignore[arg-type]


def precision(dtype: Any) -> lax.Precision:
    """The precision of matrix products of this dtype: the MXU would round float32 operands to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def slot_tile(store: Store) -> int:
    """Slots that are changed together: twice as many in float8, of which four rows share a word."""
    return 2 * TILE if store.dtype == FLOAT8 else TILE


def check_page_size(store: Store) -> None:
    """Raise `NotImplementedError` for pages that are not whole tiles."""
    if store.shape[4] % (tile := slot_tile(store)):
        raise NotImplementedError(f"page_size={store.shape[4]} must be a multiple of {tile} on TPU for {store.dtype}")


def pages_a_block(store: Store, max_pages: int) -> int:
    """Pages that one step of a loop over keys takes: 256 to 1024 keys, by their size."""
    _, _, _, kv_heads, page_size, head_dim = store.shape
    key_bytes = 2 * kv_heads * max(head_dim, 128) * store.dtype.itemsize
    keys = min(max(KEY_BLOCK_BYTES // key_bytes, 256), 1024)
    return min(max(keys // page_size, 1), max_pages)


def each_page(count: Index, copy_of: Any, act: str) -> None:
    """Start, or wait for, the copies of the first `count` pages of a block."""
    lax.fori_loop(0, count, lambda page, _: getattr(copy_of(page), act)(), None)


def next_start(starts: Bool[Array, "n"], block: int) -> Int[Array, "n"]:
    """For each entry, the first start at or behind it within its block of entries; the block's size if there is none.

    Entries are counted from the beginning of their block. In blocks of 4, starts at the entries 1, 2 and 7 give
    1 1 2 4 | 3 3 3 3.
    """
    at = jnp.where(starts.reshape(-1, block), jnp.arange(block, dtype=jnp.int32), block)
    return lax.cummin(at, axis=1, reverse=True).reshape(-1)
