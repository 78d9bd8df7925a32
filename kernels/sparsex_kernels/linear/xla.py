"""Linear layers as a slice and a product for each weight."""

import functools
from collections.abc import Callable

import jax
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import LinearArgs

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(args: LinearArgs) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    layers = (jax.lax.dynamic_index_in_dim(weight, args.layer, keepdims=False) for weight in args.weights)
    return tuple(args.inputs @ weight for weight in layers)


def gated_linear(args: LinearArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    gate, up = linear(args)
    return ACTIVATIONS[args.activation](gate) * up
