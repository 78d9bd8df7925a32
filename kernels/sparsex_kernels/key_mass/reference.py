"""Dense key mass in float32: what every other implementation is compared with."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, context


def key_mass(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    power: int = 1,
) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    keys = jax.vmap(lambda pages: context(store, layer, pages)[0])(page_tables)
    keys = jnp.repeat(keys.astype(jnp.float32), q.shape[1] // keys.shape[1], axis=1)[requests]
    visible = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = jnp.einsum("rhd,rhtd->rht", q.astype(jnp.float32), keys, precision="highest") * scale
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None]) ** power
    per_row = jnp.where(positions[:, None] >= 0, weights.sum(1), 0)
    return jax.ops.segment_sum(per_row, requests, num_segments=page_tables.shape[0])
