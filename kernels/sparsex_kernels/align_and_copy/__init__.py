"""Alignment: copy cached KV to other slots of the same store, its keys rotated to their new positions."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.align_and_copy import hopper, reference, tpu, triton, xla
from sparsex_kernels.dispatch import choose
from sparsex_kernels.layout import Store

IMPLEMENTATIONS = {
    "reference": reference.align_and_copy,
    "xla": xla.align_and_copy,
    "hopper": hopper.align_and_copy,
    "triton": triton.align_and_copy,
    "tpu": tpu.align_and_copy,
}


def align_and_copy(
    store: Store,
    source: Int[Array, "tokens"],
    target: Int[Array, "tokens"],
    shift: Int[Array, "tokens"],
    inv_freq: Float[Array, "half"],
    *,
    implementation: str | None = None,
) -> Store:
    """`K[target] = R(shift) K[source]` and `V[target] = V[source]` in all layers (DESIGN.md section 3, step 2).

    Args:
      store: donated by the caller's jit, so that it is updated in place.
      source, target: slots. No slot is both a source and a target, and no target comes twice. Padding, at
        the end, has target -1.
      shift: new position minus the position that the key was computed at.
      inv_freq: rotary frequencies; the rotation is done in float32.
    """
    return choose("align_and_copy", IMPLEMENTATIONS, implementation)(store, source, target, shift, inv_freq)
