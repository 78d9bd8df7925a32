"""All rows at once, each over a copy of its request's keys. No loop, but memory for rows x context: for few rows."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Queries, group_heads


def paged_attention(
    args: AttentionArgs, return_lse: bool = False
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    query, store, positions = args.query, args.store, args.positions
    pages = args.page_tables.at[args.requests].get(mode="clip")
    tiles = store[args.layer, pages]  # [rows, pages, 2, kv_heads, page_size, head_dim]
    keys, values = (
        tiles[:, :, kv].swapaxes(1, 2).reshape(len(query), store.shape[3], -1, store.shape[5]) for kv in (0, 1)
    )
    visible = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = jnp.einsum("rhgd,rhkd->rhgk", group_heads(query, store), keys, preferred_element_type=jnp.float32)
    scores *= args.scale
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
    weights = jnp.where((positions >= 0)[:, None, None, None], weights, 0)  # padding sees no key; its output is 0
    values = jnp.where(visible[:, None, :, None], values, 0)  # 0 * NaN would be NaN
    out = jnp.einsum("rhgk,rhkd->rhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = out.reshape(query.shape).astype(query.dtype)
    if not return_lse:
        return out
    lse = jax.nn.logsumexp(scores, axis=-1, where=visible[:, None, None])
    return out, jnp.where((positions >= 0)[:, None], lse.reshape(query.shape[:2]), -jnp.inf)
