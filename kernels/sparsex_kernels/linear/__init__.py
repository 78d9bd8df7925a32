"""Linear layers on stacked weights: rows times one layer's matrices, without copying that layer out of the stack."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import Added, LinearArgs, Matrices
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.linear import xla
from sparsex_kernels.linear.apart import plus
from sparsex_kernels.product_parts import ProductParts, one_part
from sparsex_kernels.quantised import Mixed, same_kind

# On a TPU, XLA's products take a layer's slice as it is.
IMPLEMENTATIONS = {"xla": xla.linear, "hopper": late("sparsex_kernels.linear.hopper", "linear"), "tpu": xla.linear}
PARTS = {
    "xla": xla.linear_parts,
    "hopper": late("sparsex_kernels.linear.hopper", "linear_parts"),
    "tpu": xla.linear_parts,
}
GATED = {
    "xla": xla.gated_linear,
    "hopper": late("sparsex_kernels.linear.hopper", "gated_linear"),
    "tpu": xla.gated_linear,
}


def linear(
    inputs: Float[Array, "rows inputs"],
    weights: Sequence[Matrices],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    added: Sequence[Added | None] = (),
    backend: Backend | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """`inputs @ w[layer]` for each stack w of weights, in the dtype of the inputs, summed in float32.

    In a loop over the layers, a product of XLA's has to wait until the layer's weights were copied out of the stack:
    little beside the work of thousands of rows, but three times the bytes of a decode step.

    What is added comes out of the same kernel: `hopper` goes on with its sum and rounds once, `xla` rounds the product,
    what is added, and their sum.

    Args:
      inputs, weights, layer, count, added: as in `LinearArgs`. Weights such as those of queries, keys and values are
        read in one kernel, if they are of one kind. Quantised ones are dequantised on the way.
      backend: where it runs; None: on JAX's first device.
      implementation: `xla`, which is also what others are compared with, or `hopper` (Pallas); None: the first of the
        backend's order that can do it.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    backend = backend or default_backend()
    on: Any = {"backend": backend, "implementation": implementation}
    if len(weights) > 1 and not same_kind(weights):
        pairs = zip(weights, added or [None] * len(weights), strict=True)
        apart = (linear(inputs, [each], layer, count, added=[more], **on) for each, more in pairs)
        return tuple(product for products in apart for product in products)
    if isinstance(weights[0], Mixed):  # whose layers are elsewhere in each of its parts
        product = _mixed(inputs, weights[0], layer, count, backend, implementation)
        return plus([product], added, lambda more: linear(more.own, [more.stack], layer, count, **on)[0])
    plain = tuple(weight for weight in weights if not isinstance(weight, Mixed))  # all of them, by now
    args = LinearArgs(inputs, plain, layer, count, backend, added=tuple(added))
    return run("linear", IMPLEMENTATIONS, implementation, args)


def linear_parts(
    inputs: Float[Array, "rows inputs"],
    weights: Sequence[Matrices],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> ProductParts:
    """The products of `linear` side by side, for an operation that adds their parts as it reads them.

    Args:
      inputs, weights, layer, count, backend, implementation: as in `linear`. Implementations that split no sums, and
        weights of several kinds, give one part. Of 65 to 1024 rows, `hopper` uses more parts where fewer are wanted.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    plain = tuple(weight for weight in weights if not isinstance(weight, Mixed))
    if len(plain) < len(weights) or not same_kind(weights):
        apart = linear(inputs, weights, layer, count, backend=backend, implementation=implementation)
        return one_part(jnp.concatenate(apart, axis=1))
    args = LinearArgs(inputs, plain, layer, count, backend or default_backend())
    return run("linear", PARTS, implementation, args)


def _mixed(inputs: Array, weight: Mixed, layer: Any, *about: Any) -> Array:
    """The product with a layer of whichever kind it is."""
    count, backend, implementation = about

    def product(part: Any, place: Array) -> Array:
        return linear(inputs, [part], place, count, backend=backend, implementation=implementation)[0]

    return weight.switch(layer, product)


def gated_linear(
    inputs: Float[Array, "rows inputs"],
    gate: Matrices,
    up: Matrices,
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    activation: str = "silu",
    added: Sequence[Added | None] = (),
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`f(inputs @ gate[layer]) * (inputs @ up[layer])`, in the dtype of the inputs, each product summed in float32.

    The kernel writes the gated product only, which is half of what two products would write and read again.

    Args:
      inputs, layer, count, backend, implementation: as in `linear`. `hopper` rounds once, after gating, unless it
        splits the sum over the inputs.
      added: to the two products, before they are gated.
      activation: f: `silu`, or `gelu_tanh`, the tanh approximation of GELU, which `hopper` does not do.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    if isinstance(gate, Mixed) or isinstance(up, Mixed) or not same_kind([gate, up]):
        on: Any = {"backend": backend, "implementation": implementation}
        first, second = linear(inputs, [gate, up], layer, count, added=added, **on)
        return xla.ACTIVATIONS[activation](first) * second
    args = LinearArgs(inputs, (gate, up), layer, count, backend or default_backend(), activation, tuple(added))
    return run("gated_linear", GATED, implementation, args)
