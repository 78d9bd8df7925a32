"""What the kernels for Hopper GPUs (Pallas, Mosaic GPU) share.

On a CPU they run in Mosaic GPU's interpret mode, which knows TMA copies, barriers, warpgroups and `wgmma` on
operands in shared memory, but not `wgmma` on registers: there `add_weighted` uses a plain product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from sparsex_kernels.layout import PageTables, Queries, Store

LOG2_E = 1.4426950408889634  # scores are kept in base 2, so that exponentials are one instruction
WGMMA_ROWS = 64  # rows of one warpgroup's product
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of it
MASKED = -1e30  # finite, so that a row which has seen no key yet does not make NaN of inf - inf
SWIZZLE = 128  # bytes; tiles of 8 rows x 128 bytes
MULTIPROCESSORS = 132  # of an H100 or H200: what work is cut for; others run the same programs


def interpreted() -> bool:
    """Whether kernels are interpreted rather than compiled: wherever there is no GPU."""
    return jax.default_backend() == "cpu"


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, interpreted on a CPU. One warpgroup is one thread named `wg`."""
    interpret = plgpu.InterpretGPUParams() if interpreted() else None
    params = plgpu.CompilerParams(approx_math=True)
    return plgpu.kernel(body, compiler_params=params, thread_name="wg", interpret=interpret, **options)


def tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose last two axes are laid out as TMA and `wgmma` like it: 8-row tiles, swizzled."""
    columns = SWIZZLE // jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform  # its stub declares it abstract
    swizzle: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, columns)), swizzle(SWIZZLE)))


def flat_store(store: Store) -> Array:
    """The store as `[layers * pages, 2 * kv_heads, page_size, head_dim]`: TMA takes five axes at most. No copy."""
    layers, pages, kv, heads, page_size, head_dim = store.shape
    return store.reshape(layers * pages, kv * heads, page_size, head_dim)


def padded_pages(store: Store, page_tables: PageTables, multiple: int) -> Int[Array, "requests n"]:
    """Page tables padded to a multiple of pages; the padding is some valid page. Kernels add the layer by themselves:
    what does not depend on it is then made once for all layers."""
    tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % multiple)))
    return jnp.clip(tables, 0, store.shape[1] - 1).astype(jnp.int32)


def empty_softmax(width: int) -> tuple[Array, Array, Array]:
    """The softmax of rows that have seen no key: weighted values, largest score in base 2, and sum of weights."""
    return (
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WGMMA_ROWS,), MASKED, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), ROWS),
    )


def add_weighted(acc: Array, weights: Array, values: Any) -> Array:
    """`acc + weights @ values`, of weights in registers and values in shared memory."""
    if interpreted():
        return acc + jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))

    def product(acc: Any) -> None:
        plgpu.wgmma(acc, weights, values)

    return pl.run_state(product)(plgpu.ACC.init(acc))


def as_scalar(layer: Int[Array, ""]) -> Int[Array, "1"]:
    """The layer as a kernel's operand."""
    return jnp.asarray(layer, jnp.int32).reshape(1)


def check_attention(q: Queries, store: Store, block: int) -> None:
    """Raise `NotImplementedError` where the attention kernels cannot do this shape or type."""
    page_size, head_dim = store.shape[4:]
    if q.dtype != store.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries of {q.dtype} on a store of {store.dtype}; both bfloat16 or float16 can be")
    if head_dim not in (64, 128):
        raise NotImplementedError(f"head_dim {head_dim}; 64 and 128 can be")
    if page_size % 64 or max(page_size, block) % min(page_size, block):
        raise NotImplementedError(f"page_size {page_size}; multiples of 64 that fit blocks of {block} can be")


@functools.cache
def heads_a_tile(q_heads: int, kv_heads: int) -> int:
    """Query heads of one KV head that share a tile: the largest divisor of the group up to 8."""
    group = q_heads // kv_heads
    return max(n for n in range(1, 9) if group % n == 0)


def check_copies(store: Store) -> None:
    """Raise `NotImplementedError` where TMA cannot copy single tokens of this store."""
    if store.shape[5] * store.dtype.itemsize % 16 or store.shape[5] > 256 or store.shape[3] > 256:
        raise NotImplementedError(f"copies of {store.shape[3]} heads of {store.shape[5]} {store.dtype}")


def clear_rows(smem: Any, first: Array) -> None:
    """Zero the rows of a V block from `first` on: slots behind the last position may hold NaN, and 0 * NaN is NaN."""
    piece = (64, 64)  # few registers; the layout is that of a product's operand
    rows, columns = smem.shape

    def clear(i: Array, _: None) -> None:
        row = plgpu.broadcasted_iota(jnp.int32, piece, 0, layout=plgpu.Layout.WGMMA) + i * piece[0]
        for column in range(0, columns, piece[1]):
            part = smem.at[pl.ds(i * piece[0], piece[0]), pl.ds(column, piece[1])]
            old = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < first, old, jnp.zeros_like(old))

    lax.fori_loop(lax.div(first, piece[0]), rows // piece[0], clear, None)
    plgpu.commit_smem()
