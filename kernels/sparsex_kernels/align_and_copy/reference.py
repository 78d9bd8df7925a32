"""Alignment token by token: what every other implementation is compared with."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import Store, as_stored


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`. Rotates pairs as complex numbers."""
    source, target, page_size = args.source, args.target, args.store.shape[4]
    layer = jnp.arange(len(args.store))

    def move(i: Array, store: Array) -> Array:
        copied = (layer >= args.layers[0]) & (layer < args.layers[1]) & (target[i] >= 0)
        from_layer = layer
        if args.spans is not None:
            copied &= (layer >= args.spans.first[i]) & (layer < args.spans.end[i])
            from_layer = jnp.clip(layer + args.spans.offset[i], 0, len(store) - 1)
        old = store[from_layer, source[i] // page_size, :, :, source[i] % page_size]  # [layers, 2, kv_heads, head_dim]
        new = jnp.stack([_rotated(old[:, 0], i, args), old[:, 1]], axis=1)
        moved = store.at[:, target[i] // page_size, :, :, target[i] % page_size].set(new)
        return jnp.where(copied.reshape(-1, *[1] * (store.ndim - 1)), moved, store)

    return lax.fori_loop(0, len(source), move, args.store)


def _rotated(
    keys: Float[Array, "layers kv_heads head_dim"], i: Int[Array, ""], args: CopyArgs
) -> Float[Array, "layers kv_heads head_dim"]:
    if args.inv_freq is None:
        return keys
    inv_freq = args.inv_freq if args.inv_freq.ndim == 1 else args.inv_freq[:, None]  # against [layers, kv_heads, half]
    real, imag = jnp.split(keys.astype(jnp.float32), 2, axis=-1)
    turned = lax.complex(real, imag) * jnp.exp(1j * args.shift[i] * inv_freq)
    new = as_stored(jnp.concatenate([turned.real, turned.imag], axis=-1), keys.dtype)
    return new if args.spans is None else jnp.where(args.spans.as_is[i], keys, new)
