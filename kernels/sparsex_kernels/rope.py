"""Rotary position embedding in the half-split form of Hugging Face checkpoints (RoFormer, section 3.4)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "*batch heads head_dim"],
    positions: Int[Array, "*batch"],
    inv_freq: Float[Array, "*#batch half"],
) -> Float[Array, "*batch heads head_dim"]:
    """Rotate pairs `(x[i], x[i + head_dim / 2])` by `position * inv_freq[i]`, in float32.

    Frequencies may differ along the axes of the batch; a pair of frequency 0 stays as it is.

    Rotations compose: `apply_rope(apply_rope(k, p), s)` is `apply_rope(k, p + s)`, which is how cached keys
    move to new positions.
    """
    by_head = inv_freq if inv_freq.ndim == 1 else inv_freq[..., None, :]
    angles = positions[..., None, None].astype(jnp.float32) * by_head
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x.dtype)
