"""Alignment: copy cached KV to other slots of the same store, its keys rotated to their new positions."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.align_and_copy import reference, triton, xla
from sparsex_kernels.arguments import CopyArgs
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
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Store:
    """`K[target] = R(shift) K[source]` and `V[target] = V[source]` in some layers, where R(s) rotates by s positions.

    A key was rotated by its old position when it was computed (rotary embedding, RoFormer section 3.4). Rotations
    compose, `R(new - old) R(old) = R(new)`, so the copy is what the new position would have given.

    Args:
      store, source, target, shift, inv_freq, layers: as in `CopyArgs`. Without `layers`, all are copied.
      backend, implementation: as in `paged_attention`.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    if layers is None:
        layers = jnp.array([0, len(store)], jnp.int32)
    args = CopyArgs(store, source, target, shift, inv_freq, layers, backend or default_backend())
    return run("align_and_copy", IMPLEMENTATIONS, implementation, args)
