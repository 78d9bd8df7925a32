"""Attention of rows at arbitrary positions over the paged store: full, chunked and sparse prefill, and decode."""

from jax import Array
from jaxtyping import Int

from sparsex_kernels.dispatch import choose
from sparsex_kernels.layout import PageTables, Queries, RowInts, Store
from sparsex_kernels.paged_attention import reference, tpu, xla

IMPLEMENTATIONS = {"reference": reference.paged_attention, "xla": xla.paged_attention, "tpu": tpu.paged_attention}


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Queries:
    """Softmax attention of each row over its request's keys at positions up to its own.

    The rows' own K and V must be in the store already (`write_kv`). Every slot from 0 to a row's position must
    have been written; slots behind it may hold anything, NaN included.

    Args:
      q: queries, rotated; any float dtype. Query head h reads KV head `h // (q_heads / kv_heads)`.
      layer: which layer of the store.
      positions: position of each row in its request; -1 is padding, whose output is 0. Rows are sorted by
        (request, position), padding last.
      requests: line of `page_tables` for each row.
      scale: of the scores; 1 / sqrt(head_dim) by default.
      implementation: `reference` (dense, float32), `xla` (blocked) or `tpu` (Pallas); None chooses.
    """
    attend = choose("paged_attention", IMPLEMENTATIONS, implementation)
    return attend(q, store, layer, positions, requests, page_tables, scale or q.shape[-1] ** -0.5)
