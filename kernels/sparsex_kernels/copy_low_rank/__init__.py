"""Copies of Y, which adapters have beside K and V. It has no position, so its bits do not change."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.align_and_copy.spans import all_layers, packed, with_patch
from sparsex_kernels.arguments import CopyArgs, Patch
from sparsex_kernels.backend import Backend, default_backend, run
from sparsex_kernels.copy_low_rank import reference, xla
from sparsex_kernels.layout import LowRankStore, Slots

# Where others are preferred, they are XLA's too.
IMPLEMENTATIONS = {
    "reference": reference.copy_low_rank,
    **dict.fromkeys(("xla", "hopper", "triton", "tpu"), xla.copy_low_rank),
}


def copy_low_rank(
    store: LowRankStore,
    source: Slots,
    target: Slots,
    layers: Int[Array, "2"] | None = None,
    patch: Patch | None = None,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> LowRankStore:
    """What `align_and_copy` does, to Y: `Y[target] = Y[source]` in some layers, bit for bit.

    Args:
      store: Y of all layers; donated by the caller's jit, so that it is updated in place.
      source, target, layers, patch: as in `align_and_copy`. The patch's shift says nothing here.
      backend, implementation: as in `paged_attention`.
    """
    nothing, backend = jnp.zeros_like(source), backend or default_backend()
    layers = all_layers(store) if layers is None else layers
    args = with_patch(CopyArgs(store, source, target, nothing, None, layers, backend), patch)
    return run("copy_low_rank", IMPLEMENTATIONS, implementation, args)


def pack_low_rank(
    store: LowRankStore,
    source: Slots,
    target: Slots,
    target_layers: Slots,
    depth: Slots,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> LowRankStore:
    """What `pack_rows` does, to Y: `Y[l + target_layers, target] = Y[l, source]` for l < depth.

    Args:
      store: Y of all layers; donated by the caller's jit, so that it is updated in place.
      source, target, target_layers, depth: as in `pack_rows`.
      backend, implementation: as in `paged_attention`.
    """
    source, target, spans = packed(source, target, target_layers, depth)
    nothing, backend = jnp.zeros_like(source), backend or default_backend()
    args = CopyArgs(store, source, target, nothing, None, all_layers(store), backend, spans)
    return run("pack_low_rank", IMPLEMENTATIONS, implementation, args)
