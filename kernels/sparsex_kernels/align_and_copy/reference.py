"""Alignment token by token: what every other implementation is compared with."""

import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import Store, as_stored


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`. Rotates pairs as complex numbers."""
    source, target, page_size = args.source, args.target, args.store.shape[4]
    inv_freq = args.inv_freq if args.inv_freq.ndim == 1 else args.inv_freq[:, None]  # against [layers, kv_heads, half]
    layer = jnp.arange(len(args.store)).reshape(-1, *[1] * (args.store.ndim - 1))
    copied = (layer >= args.layers[0]) & (layer < args.layers[1])

    def move(i: Array, store: Array) -> Array:
        old = store[:, source[i] // page_size, :, :, source[i] % page_size]  # [layers, 2, kv_heads, head_dim]
        real, imag = jnp.split(old[:, 0].astype(jnp.float32), 2, axis=-1)
        turned = lax.complex(real, imag) * jnp.exp(1j * args.shift[i] * inv_freq)
        keys = as_stored(jnp.concatenate([turned.real, turned.imag], axis=-1), store.dtype)
        new = jnp.stack([keys, old[:, 1]], axis=1)
        moved = store.at[:, target[i] // page_size, :, :, target[i] % page_size].set(new)
        return jnp.where((target[i] >= 0) & copied, moved, store)

    return lax.fori_loop(0, len(source), move, args.store)
