"""Linear layers on stacked weights: rows times one layer's matrices, without copying that layer out of the stack."""

from collections.abc import Sequence

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.dispatch import choose
from sparsex_kernels.linear import hopper, xla

# On a TPU, XLA's products take a layer's slice as it is.
IMPLEMENTATIONS = {"xla": xla.linear, "hopper": hopper.linear, "tpu": xla.linear}
GATED = {"xla": xla.gated_linear, "hopper": hopper.gated_linear, "tpu": xla.gated_linear}


def linear(
    x: Float[Array, "rows inputs"],
    weights: Sequence[Float[Array, "layers inputs _"]],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """`x @ w[layer]` for each of several stacked weights, in the dtype of `x`, summed in float32.

    In a loop over the layers, a product of XLA's has to wait until the layer's weights were copied out of the stack:
    little beside the work of thousands of rows, but three times the bytes of a decode step.

    Args:
      weights: stacks that share their number of inputs, such as those of the queries, keys and values; read together.
      count: how many of the rows are wanted; results of those behind are undefined, and may be NaN. None: all.
      implementation: `xla`, which is also what others are compared with, or `hopper` (Pallas); None chooses.
    """
    return choose("linear", IMPLEMENTATIONS, implementation)(x, tuple(weights), layer, count)


def gated_linear(
    x: Float[Array, "rows inputs"],
    gate: Float[Array, "layers inputs width"],
    up: Float[Array, "layers inputs width"],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`silu(x @ gate[layer]) * (x @ up[layer])`, in the dtype of `x`, each product summed in float32.

    As `linear`, but what leaves is the half of it that the next product reads.

    Args:
      count: how many of the rows are wanted; results of those behind are undefined, and may be NaN. None: all.
      implementation: `xla`, which is also what others are compared with, or `hopper` (Pallas), which rounds once,
        after gating, unless it splits the sum; None chooses.
    """
    return choose("gated_linear", GATED, implementation)(x, gate, up, layer, count)
