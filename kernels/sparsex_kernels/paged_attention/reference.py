"""Dense attention in float32: what every other implementation is compared with."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, context


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
    """See `sparsex_kernels.paged_attention`. Materialises every row's scores over every slot of its request."""
    keys, values = jax.vmap(lambda pages: context(store, layer, pages))(page_tables)
    repeat = q.shape[1] // keys.shape[1]
    keys, values = (jnp.repeat(x.astype(jnp.float32), repeat, axis=1)[requests] for x in (keys, values))
    visible = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = jnp.einsum("rhd,rhtd->rht", q.astype(jnp.float32), keys, precision="highest") * scale
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None])
    values = jnp.where(visible[:, None, :, None], values, 0)
    out = jnp.einsum("rht,rhtd->rhd", weights, values, precision="highest")
    out = jnp.where(positions[:, None, None] >= 0, out, 0).astype(q.dtype)
    lse = jnp.where(positions[:, None] >= 0, jax.nn.logsumexp(scores, axis=-1, where=visible[:, None]), -jnp.inf)
    return (out, lse) if return_lse else out
