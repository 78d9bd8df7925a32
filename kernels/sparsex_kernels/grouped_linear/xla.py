"""Products of groups of rows as a loop over the tiles that are used: a slice of the stack and a product for each.

`jax.lax.ragged_dot` is no help here: where XLA has no kernel for it, which it has on TPUs only, it multiplies all rows
with the matrices of all groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from sparsex_kernels.arguments import GroupedArgs
from sparsex_kernels.quantised import floats, merged

# Tiles of a step: a GPU needs several to be busy. Their matrices are copied together.
_TOGETHER = {"gpu": 16}


def grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.grouped_linear`."""
    return _over_tiles(args, lambda product: product)


def gated_grouped_linear(args: GroupedArgs) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_grouped_linear`."""
    return _over_tiles(args, lambda gate, up: jax.nn.silu(gate) * up)


def _over_tiles(args: GroupedArgs, finish: Callable[..., Array]) -> Array:
    tiles, rows, matrices = len(args.groups), args.tile, [merged(weight) for weight in args.weights]
    together = min(_TOGETHER.get(args.backend.platform, 1), tiles)

    def step(number: Array, out: Array) -> Array:
        # The last step begins early enough to be a whole one, and may do some tiles again.
        first = jnp.minimum(number * together, tiles - together)
        x = lax.dynamic_slice_in_dim(args.inputs, first * rows, together * rows).reshape(together, rows, -1)
        which = lax.dynamic_slice_in_dim(args.matrix_of_tile, first, together)
        copies = [jnp.stack([floats(each[which[n]], x.dtype) for n in range(together)]) for each in matrices]
        done = finish(*(jnp.einsum("tri,tiw->trw", x, copy) for copy in copies))
        return lax.dynamic_update_slice_in_dim(out, done.reshape(together * rows, -1), first * rows, 0)

    nothing = jnp.zeros((len(args.inputs), args.width), args.inputs.dtype)
    return lax.fori_loop(0, -(-args.used // together), step, nothing)
