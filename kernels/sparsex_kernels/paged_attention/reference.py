"""Dense attention in float32: what every other implementation is compared with."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Queries, context, visible
from sparsex_kernels.paged_attention.low_rank import dense_low_rank


def paged_attention(
    args: AttentionArgs, return_lse: bool = False
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`. Holds every row's scores over every slot of its request."""
    scores, values, visible = dense_scores(args)
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None])
    out = jnp.einsum("rht,rhtd->rhd", weights, jnp.where(visible[:, None, :, None], values, 0), precision="highest")
    if args.low_rank is not None:
        out += dense_low_rank(args.low_rank, args.layer, weights, visible, args.page_tables, args.requests)
    real = args.positions >= 0
    out = jnp.where(real[:, None, None], out, 0).astype(args.query.dtype)
    lse = jnp.where(real[:, None], jax.nn.logsumexp(scores, axis=-1, where=visible[:, None]), -jnp.inf)
    return (out, lse) if return_lse else out


def dense_scores(
    args: AttentionArgs,
) -> tuple[
    Float[Array, "rows q_heads context"], Float[Array, "rows q_heads context head_dim"], Bool[Array, "rows context"]
]:
    """Scaled scores in float32, the values that each row and head reads, and which keys a row may see."""
    query = args.query.astype(jnp.float32)
    keys, values = jax.vmap(lambda pages: context(args.store, args.layer, pages))(args.page_tables)
    repeat = query.shape[1] // keys.shape[1]
    keys, values = (jnp.repeat(x.astype(jnp.float32), repeat, axis=1)[args.requests] for x in (keys, values))
    scores = jnp.einsum("rhd,rhtd->rht", query, keys, precision="highest") * args.scale
    return scores, values, visible(jnp.arange(keys.shape[2]), args.positions[:, None], args.window)
