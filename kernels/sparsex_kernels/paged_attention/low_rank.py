"""Attention over V + Y B in plain JAX: what adapters add to values, apart from them (LRAgent's Flash-LoRA-Attention).

    softmax(scores) (V + Y B) = softmax(scores) V + (softmax(scores) Y) B

So Y goes through the softmax as a few more columns of V, the same for all heads, and B multiplies the sum, once a row
and head. A sum that is weighted by shares of the softmax's denominator commutes with B as well: parts of keys may be
expanded before they are merged.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_kernels.arguments import LowRank

Grouped = Float[Array, "rows kv_heads group _"]


def low_rank_values(
    low_rank: LowRank, layer: Int[Array, ""], pages: Int[Array, "n"], request: Int[Array, ""]
) -> Float[Array, "keys rank"]:
    """Y of these pages, their slots one after the other, in the columns of the request's adapter."""
    tiles = low_rank.store[layer, pages]  # [n, page_size, width]
    first = jnp.maximum(low_rank.columns.at[request].get(mode="clip"), 0)
    return lax.dynamic_slice_in_dim(tiles.reshape(-1, tiles.shape[2]), first, low_rank.rank, axis=1)


def beside(
    values: Float[Array, "*rows kv_heads keys head_dim"], more: Float[Array, "*rows keys rank"]
) -> Float[Array, "*rows kv_heads keys columns"]:
    """V of each head, and Y, which all heads share, as more columns."""
    shape = (*values.shape[:-1], more.shape[-1])
    return jnp.concatenate([values, jnp.broadcast_to(more[..., None, :, :], shape)], axis=-1)


def expanded(low_rank: LowRank, layer: Int[Array, ""], out: Grouped, requests: Int[Array, "rows"]) -> Grouped:
    """The output, given the weighted sums of what `beside` made."""
    plain, sums = jnp.split(out, [out.shape[-1] - low_rank.rank], axis=-1)
    return plain + expand(low_rank, layer, sums, requests)


def expand(low_rank: LowRank, layer: Int[Array, ""], sums: Grouped, requests: Int[Array, "rows"]) -> Grouped:
    """Each row's sum times its adapter's B, multiplied in the sums' dtype into float32; 0 for rows without an adapter.

    All matrices are one: a row's sum stands at its adapter's place between zeros. With ranks of 2 and 3 adapters, a row
    of adapter 1 is `0 0 y0 y1 0 0`. So no row has a copy of its matrix.
    """
    column, adapter = (x.at[requests].get(mode="clip") for x in (low_rank.columns, low_rank.adapters))
    matrices = low_rank.matrices[layer].astype(sums.dtype)  # [adapters, kv_heads, rank, head_dim]
    own = (column >= 0)[:, None] & (adapter[:, None] == jnp.arange(len(matrices)))
    placed = jnp.where(own[:, None, None, :, None], sums[..., None, :], 0)
    return jnp.einsum("rhgak,ahkd->rhgd", placed, matrices, preferred_element_type=jnp.float32)


def dense_low_rank(
    low_rank: LowRank,
    layer: Int[Array, ""],
    weights: Float[Array, "rows q_heads context"],
    visible: Bool[Array, "rows context"],
    page_tables: Int[Array, "requests max_pages"],
    requests: Int[Array, "rows"],
) -> Float[Array, "rows q_heads head_dim"]:
    """What is added to each row's output, given its softmax and which keys it may see."""
    read = jax.vmap(low_rank_values, in_axes=(None, None, 0, 0))
    values = read(low_rank, layer, page_tables, jnp.arange(len(page_tables)))[requests]
    values = jnp.where(visible[..., None], values.astype(jnp.float32), 0)  # 0 * NaN would be NaN
    sums = jnp.einsum("rht,rtk->rhk", weights, values, precision="highest")
    matrices = low_rank.matrices[layer, low_rank.adapters[requests]].astype(jnp.float32)
    matrices = jnp.repeat(matrices, weights.shape[1] // matrices.shape[1], axis=1)
    added = jnp.einsum("rhk,rhkd->rhd", sums, matrices, precision="highest")
    return jnp.where((low_rank.columns[requests] >= 0)[:, None, None], added, 0)
