"""Products of groups of rows as one batched product, each tile with a copy of its matrix, in float32."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import GroupedArgs
from sparsex_kernels.quantised import floats


def grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.grouped_linear`."""
    (out,) = _products(args)
    return out.astype(args.inputs.dtype)


def gated_grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_grouped_linear`."""
    gate, up = _products(args)
    return (jax.nn.silu(gate) * up).astype(args.inputs.dtype)


def _products(args: GroupedArgs) -> list[Array]:
    tiled = args.inputs.reshape(len(args.groups), args.tile, -1).astype(jnp.float32)
    stacks = (floats(weight[args.layer][args.groups], jnp.float32) for weight in args.weights)
    return [jnp.einsum("tri,tiw->trw", tiled, stack).reshape(len(args.inputs), -1) for stack in stacks]
