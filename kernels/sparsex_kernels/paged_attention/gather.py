"""All rows at once, each over a copy of its request's keys: no loop, but memory for rows x context. For a few rows."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, group_heads


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    return_lse: bool = False,
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    tiles = store[layer, page_tables.at[requests].get(mode="clip")]  # [rows, pages, 2, kv_heads, page_size, head_dim]
    keys, values = (tiles[:, :, i].swapaxes(1, 2).reshape(len(q), store.shape[3], -1, store.shape[5]) for i in (0, 1))
    visible = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = jnp.einsum("rhgd,rhkd->rhgk", group_heads(q, store), keys, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
    weights = jnp.where((positions >= 0)[:, None, None, None], weights, 0)  # padding sees nothing and gets 0
    values = jnp.where(visible[:, None, :, None], values, 0)  # 0 * NaN would be NaN
    out = jnp.einsum("rhgk,rhkd->rhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = out.reshape(q.shape).astype(q.dtype)
    if not return_lse:
        return out
    lse = jax.nn.logsumexp(scores, axis=-1, where=visible[:, None, None])
    return out, jnp.where((positions >= 0)[:, None], lse.reshape(q.shape[:2]), -jnp.inf)
