"""Which layers each entry of a copy moves, with spans and without."""

import jax.numpy as jnp
from jax import Array

from sparsex_kernels.align_and_copy.spans import within
from sparsex_kernels.arguments import CopyArgs


def moved_layers(args: CopyArgs) -> tuple[Array, Array, Array]:
    """Of each entry, the first layer that it moves, the one behind the last, and where it takes them from."""
    if args.spans is not None:
        spans, _ = within(args.spans, args.target, args.layers)
        return spans.first, spans.end, spans.offset
    first, end = (jnp.broadcast_to(layer, args.source.shape) for layer in args.layers)
    return first, end, jnp.zeros_like(args.source)
