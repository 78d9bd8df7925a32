"""Linear layers as a slice and a product for each weight."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.linear.apart import plus
from sparsex_kernels.product_parts import ProductParts, one_part
from sparsex_kernels.quantised import Quantised, dequantise, numbers

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(args: LinearArgs) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    products = [_product(args.inputs, weight, args.layer) for weight in args.weights]
    return plus(products, args.added, lambda more: _product(more.own, more.stack, args.layer))


def linear_parts(args: LinearArgs) -> ProductParts:
    """See `sparsex_kernels.linear`."""
    return one_part(jnp.concatenate(linear(args), axis=1))


def _product(inputs: Array, stack: Array | Quantised, layer: Array | int) -> Array:
    weight = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), stack)
    if not isinstance(weight, Quantised):
        return inputs @ weight
    if not weight.scaled_by_output:
        return inputs @ dequantise(weight, inputs.dtype)
    product = jnp.dot(inputs, numbers(weight).astype(inputs.dtype), preferred_element_type=jnp.float32)
    return (product * weight.scales).astype(inputs.dtype)


def gated_linear(args: LinearArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    gate, up = linear(args)
    return ACTIVATIONS[args.activation](gate) * up
