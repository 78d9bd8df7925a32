"""Linear layers as a slice and a product for each weight."""

import jax
from jax import Array
from jaxtyping import Float, Int


def linear(
    x: Float[Array, "rows inputs"],
    weights: tuple[Float[Array, "layers inputs _"], ...],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    return tuple(x @ jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False) for weight in weights)


def gated_linear(
    x: Float[Array, "rows inputs"],
    gate: Float[Array, "layers inputs width"],
    up: Float[Array, "layers inputs width"],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    gates, ups = linear(x, (gate, up), layer, count)
    return jax.nn.silu(gates) * ups
