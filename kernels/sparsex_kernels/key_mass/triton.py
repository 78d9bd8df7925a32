"""Key mass in Triton: a pass for the log-sum-exp, and one for the column sums.

In the second pass a program owns a block of keys and the query heads of one KV head, and goes through the rows that
see them. No sum is shared between programs, which makes the result deterministic.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store
from sparsex_kernels.mosaic import LOG2_E, heads_a_tile
from sparsex_kernels.paged_attention.triton import attend
from sparsex_kernels.triton import Config, call, check_attention, little_shared_memory, power_of_two, tables_ahead


def default_config() -> Config:
    """What suits this device, for 16-bit types."""
    return Config(packed=64, block=128, warps=4, stages=2 if little_shared_memory() else 3)


def key_mass(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    power: int = 1,
    config: Config | None = None,
) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    kv_heads, page_size, head_dim = store.shape[3:]
    config = config or default_config()
    check_attention(q, store, config.block)
    from sparsex_kernels.key_mass.triton_kernels import column_sums

    _, lse = attend(q, store, layer, positions, requests, page_tables, scale, values=False)
    share = heads_a_tile(q.shape[1], kv_heads)
    heads, context = q.shape[1] // share, page_tables.shape[1] * page_size
    ranges = seen_by(positions, requests, len(page_tables), -(-context // config.block), config.block)
    tables = tables_ahead(store, layer, page_tables, config.block)
    mass = call(
        column_sums,
        *(q, store, tables, ranges, positions.astype(jnp.int32), power * lse, tables.shape[1]),
        grid=(ranges.shape[1], len(page_tables), heads),
        out_type=jax.ShapeDtypeStruct((heads, *ranges.shape[:2], config.block), jnp.float32),
        num_warps=config.warps,
        num_stages=config.stages,
        SCALE=power * float(scale) * LOG2_E,
        ROWS=config.packed // power_of_two(share),
        SHARE=share,
        PADDED_SHARE=power_of_two(share),
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK=config.block,
        PAGE=page_size,
        DIM=head_dim,
    )
    return mass.sum(axis=0).reshape(len(page_tables), -1)[:, :context]


def seen_by(
    positions: RowInts, requests: RowInts, num_requests: int, blocks: int, block: int
) -> Int[Array, "requests blocks 3"]:
    """Rows that see anything of a block of keys, which are consecutive: the first, the first that sees all of the
    block, and one behind the last."""
    context = blocks * block
    if (num_requests + 1) * context >= 2**31:
        raise NotImplementedError(f"{num_requests} requests of {context} tokens; fewer than 2^31 slots can be")
    # Rows in the order that they have: by request, then by position.
    place = jnp.where(positions >= 0, requests * context + positions, num_requests * context)
    begin = jnp.arange(num_requests)[:, None] * context + jnp.arange(blocks) * block
    end = jnp.broadcast_to(jnp.arange(1, num_requests + 1)[:, None] * context, begin.shape)
    wanted = jnp.stack([begin, begin + block - 1, end], axis=-1)
    found = jnp.searchsorted(place, wanted.reshape(-1), method="compare_all").reshape(wanted.shape)
    return jnp.minimum(found, found[..., 2:]).astype(jnp.int32)
