"""Products of groups of rows, each with a matrix of its own: what a mixture of experts computes.

Rows come in tiles of equal size, each of which belongs to one group, as MegaBlocks and vLLM's `moe_align_block_size`
lay them out: `tiles.py` makes the tiles. A group has as many tiles as its rows need, and no weights are read of a
group that has none.
"""

from typing import Any

import jax
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import GroupedArgs, Groups
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.grouped_linear import ragged, reference, xla
from sparsex_kernels.grouped_linear.tiles import Tiles, make_tiles, rows_a_tile
from sparsex_kernels.quantised import Mixed, same_kind

__all__ = ["Tiles", "gated_grouped_linear", "grouped_linear", "make_tiles", "rows_a_tile"]

# XLA has a kernel for `ragged_dot` on TPUs. Elsewhere it multiplies all rows with the matrices of all groups.
IMPLEMENTATIONS = {
    "reference": reference.grouped_linear,
    "xla": xla.grouped_linear,
    "ragged": ragged.grouped_linear,
    "hopper": late("sparsex_kernels.grouped_linear.hopper", "grouped_linear"),
    "tpu": ragged.grouped_linear,
}
GATED = {
    "reference": reference.gated_grouped_linear,
    "xla": xla.gated_grouped_linear,
    "ragged": ragged.gated_grouped_linear,
    "hopper": late("sparsex_kernels.grouped_linear.hopper", "gated_grouped_linear"),
    "tpu": ragged.gated_grouped_linear,
}


def grouped_linear(
    inputs: Float[Array, "rows inputs"],
    weights: Groups,
    layer: Int[Array, ""] | int,
    groups: Int[Array, "tiles"],
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`inputs[tile] @ weights[layer, groups[tile]]` for each tile, in the dtype of the inputs, summed in float32.

    Args:
      inputs, weights, layer, groups: as in `GroupedArgs`. Results of tiles that are not used are undefined.
      backend: where it runs; None: on JAX's first device.
      implementation: `reference`, `xla` (a loop over the tiles that are used), `ragged` (`jax.lax.ragged_dot`) or
        `hopper` (Pallas); None: the first of the backend's order that can do it.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    if isinstance(weights, Mixed):
        options: dict[str, Any] = {"backend": backend, "implementation": implementation}
        return weights.switch(layer, lambda part, place: grouped_linear(inputs, part, place, groups, **options))
    args = GroupedArgs(inputs, (weights,), layer, groups, backend or default_backend())
    return run("grouped_linear", IMPLEMENTATIONS, implementation, args)


def gated_grouped_linear(
    inputs: Float[Array, "rows inputs"],
    gate: Groups,
    up: Groups,
    layer: Int[Array, ""] | int,
    groups: Int[Array, "tiles"],
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`silu(x @ gate[layer, group]) * (x @ up[layer, group])` for the rows x of each tile and its group.

    Args, errors: as in `grouped_linear`. `hopper` rounds once, after gating.
    """
    if isinstance(gate, Mixed) or isinstance(up, Mixed) or not same_kind([gate, up]):
        options: dict[str, Any] = {"backend": backend, "implementation": implementation}
        first, second = (grouped_linear(inputs, weight, layer, groups, **options) for weight in (gate, up))
        return jax.nn.silu(first) * second
    args = GroupedArgs(inputs, (gate, up), layer, groups, backend or default_backend())
    return run("gated_grouped_linear", GATED, implementation, args)
