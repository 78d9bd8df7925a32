"""Alignment in Triton, all layers in one launch: a program has a tile of tokens in one layer."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import Store
from sparsex_kernels.triton import check_copies, in_place

TILE = 32  # tokens


def align_and_copy(
    store: Store,
    source: Int[Array, "tokens"],
    target: Int[Array, "tokens"],
    shift: Int[Array, "tokens"],
    inv_freq: Float[Array, "half"],
) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    check_copies(store)
    from sparsex_kernels.align_and_copy.triton_kernels import align

    layers, pages, _, kv_heads, page_size, head_dim = store.shape
    angles = shift[:, None].astype(jnp.float32) * inv_freq
    return in_place(
        align,
        *(source.astype(jnp.int32), target.astype(jnp.int32), jnp.cos(angles), jnp.sin(angles)),
        store=store,
        grid=(-(-len(source) // TILE), layers),
        num_warps=4,
        tokens=len(source),
        pages=pages,
        TILE=TILE,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=head_dim,
    )
