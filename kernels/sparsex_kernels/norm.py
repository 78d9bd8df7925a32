"""Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch dim"], scale: Float[Array, "dim"], eps: float) -> Float[Array, "*batch dim"]:
    """x / rms(x) * scale, the mean square taken in float32. A scale of a wider dtype multiplies before x is rounded."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scale * normed.astype(scale.dtype)).astype(x.dtype)
