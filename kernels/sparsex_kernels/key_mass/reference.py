"""Dense key mass in float32: what every other implementation is compared with."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Power
from sparsex_kernels.paged_attention.reference import dense_scores


def key_mass(args: AttentionArgs, power: Power = 1) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    scores, _, visible = dense_scores(args)
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None]) ** power
    per_row = jnp.where(args.positions[:, None] >= 0, weights.sum(1), 0)
    return jax.ops.segment_sum(per_row, args.requests, num_segments=len(args.page_tables))
