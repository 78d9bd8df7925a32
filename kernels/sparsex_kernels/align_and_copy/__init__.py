"""Alignment: copy cached KV to other slots of the same store, its keys rotated to their new positions."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.align_and_copy import reference, triton, xla
from sparsex_kernels.align_and_copy.spans import all_layers, packed, with_patch
from sparsex_kernels.arguments import CopyArgs, Patch
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.layout import Frequencies, Slots, Store

IMPLEMENTATIONS = {
    "reference": reference.align_and_copy,
    "xla": xla.align_and_copy,
    "hopper": late("sparsex_kernels.align_and_copy.hopper", "align_and_copy"),
    "triton": triton.align_and_copy,
    "tpu": late("sparsex_kernels.align_and_copy.tpu", "align_and_copy"),
}


def align_and_copy(
    store: Store,
    source: Slots,
    target: Slots,
    shift: Slots,
    inv_freq: Frequencies,
    layers: Int[Array, "2"] | None = None,
    patch: Patch | None = None,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Store:
    """`K[target] = R(shift) K[source]` and `V[target] = V[source]` in some layers, where R(s) rotates by s positions.

    A key was rotated by its old position when it was computed (rotary embedding, RoFormer section 3.4). Rotations
    compose, `R(new - old) R(old) = R(new)`, so the copy is what the new position would have given.

    Args:
      store, source, target, shift, inv_freq, layers: as in `CopyArgs`. Without `layers`, all are copied.
      patch: rows to take instead of the source's in each token's first layers; None, for a program without. Where the
        whole token is patched, its source may be any number.
      backend, implementation: as in `paged_attention`.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    layers, backend = all_layers(store) if layers is None else layers, backend or default_backend()
    args = with_patch(CopyArgs(store, source, target, shift, inv_freq, layers, backend), patch)
    return run("align_and_copy", IMPLEMENTATIONS, implementation, args)


def pack_rows(
    store: Store,
    source: Slots,
    target: Slots,
    target_layers: Slots,
    depth: Slots,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Store:
    """Copy each token's first layers, `K[l + target_layers, target] = K[l, source]` for l < depth, and V likewise.

    Bits do not change. Short stacks of rows may share a slot: of 32 layers, eight tokens' first four fill one. As a
    `Patch` of `target`, `target_layers` and `depth`, they come back.

    Args:
      store: donated by the caller's jit, so that it is updated in place.
      source, target: slots; no row is both read and written, and none is written twice. Padding has the target -1.
      target_layers: the layer of the target that a token's first layer goes to.
      depth: how many layers of each token are copied; at most those that the store has from `target_layers` on.
      backend, implementation: as in `paged_attention`.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    source, target, spans = packed(source, target, target_layers, depth)
    nothing, backend = jnp.zeros_like(source), backend or default_backend()
    args = CopyArgs(store, source, target, nothing, None, all_layers(store), backend, spans)
    return run("pack_rows", IMPLEMENTATIONS, implementation, args)
