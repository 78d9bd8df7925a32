"""Products of groups of rows by `jax.lax.ragged_dot`.

A layer is not taken out of the stack, which would copy the matrices of all its groups: the groups of the other layers
have no rows.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import GroupedArgs


def grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.grouped_linear`."""
    (out,) = _products(args)
    return out


def gated_grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_grouped_linear`."""
    gate, up = _products(args)
    return jax.nn.silu(gate) * up


def _products(args: GroupedArgs) -> list[Array]:
    matrices = args.matrices
    used = jnp.where(args.groups < 0, len(matrices[0]), args.matrix_of_tile)
    sizes = jnp.zeros(len(matrices[0]), jnp.int32).at[used].add(args.tile, mode="drop")
    return [jax.lax.ragged_dot(args.inputs, matrix, sizes) for matrix in matrices]
