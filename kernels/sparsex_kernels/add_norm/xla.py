"""Residual and norm as XLA fuses them."""

import jax
from jaxtyping import Array, Float

from sparsex_kernels.arguments import AddNormArgs
from sparsex_kernels.norm import rms_norm
from sparsex_kernels.product_parts import sum_parts


def add_norm(args: AddNormArgs) -> tuple[Float[Array, "rows width"], Float[Array, "rows width"]]:
    """See `sparsex_kernels.add_norm`."""
    product = sum_parts(args.product, args.residual.dtype)
    if args.mailboxes is not None:  # XLA has a collective for it
        product = jax.lax.psum(product, args.mailboxes.axis)
    hidden = args.residual + product
    scale = jax.lax.dynamic_index_in_dim(args.scales, args.layer, keepdims=False)
    return hidden, rms_norm(hidden, scale, args.eps)
