"""Linear layers on stacked weights: rows times one layer's matrices, without copying that layer out of the stack."""

from collections.abc import Sequence

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.backend import Backend, default_backend, run
from sparsex_kernels.linear import hopper, xla

# On a TPU, XLA's products take a layer's slice as it is.
IMPLEMENTATIONS = {"xla": xla.linear, "hopper": hopper.linear, "tpu": xla.linear}
GATED = {"xla": xla.gated_linear, "hopper": hopper.gated_linear, "tpu": xla.gated_linear}


def linear(
    inputs: Float[Array, "rows inputs"],
    weights: Sequence[Float[Array, "layers inputs _"]],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """`inputs @ w[layer]` for each stack w of weights, in the dtype of the inputs, summed in float32.

    In a loop over the layers, a product of XLA's has to wait until the layer's weights were copied out of the stack:
    little beside the work of thousands of rows, but three times the bytes of a decode step.

    Args:
      inputs, weights, layer, count: as in `LinearArgs`. Weights such as those of queries, keys and values are read
        in one kernel.
      backend: where it runs; None: on JAX's first device.
      implementation: `xla`, which is also what others are compared with, or `hopper` (Pallas); None: the first of the
        backend's order that can do it.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    args = LinearArgs(inputs, tuple(weights), layer, count, backend or default_backend())
    return run("linear", IMPLEMENTATIONS, implementation, args)


def gated_linear(
    inputs: Float[Array, "rows inputs"],
    gate: Float[Array, "layers inputs width"],
    up: Float[Array, "layers inputs width"],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    activation: str = "silu",
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`f(inputs @ gate[layer]) * (inputs @ up[layer])`, in the dtype of the inputs, each product summed in float32.

    The kernel writes the gated product only, which is half of what two products would write and read again.

    Args:
      inputs, layer, count, backend, implementation: as in `linear`. `hopper` rounds once, after gating, unless it
        splits the sum over the inputs.
      activation: f: `silu`, or `gelu_tanh`, the tanh approximation of GELU, which `hopper` does not do.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    args = LinearArgs(inputs, (gate, up), layer, count, backend or default_backend(), activation)
    return run("gated_linear", GATED, implementation, args)
