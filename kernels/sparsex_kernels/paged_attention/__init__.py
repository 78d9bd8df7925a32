"""Attention of rows at arbitrary positions over the paged store: full, chunked and sparse prefill, and decode."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.dispatch import choose
from sparsex_kernels.layout import PageTables, Queries, RowInts, Store
from sparsex_kernels.paged_attention import gather, hopper, reference, tpu, triton, xla

IMPLEMENTATIONS = {
    "reference": reference.paged_attention,
    "xla": xla.paged_attention,
    "gather": gather.paged_attention,
    "hopper": hopper.paged_attention,
    "triton": triton.paged_attention,
    "tpu": tpu.paged_attention,
}


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
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
      return_lse: also return the logarithm of the softmax's denominator in float32, `[rows, q_heads]`, by which
        results over parts of the keys can be merged; -inf for padding.
      implementation: `reference` (dense, float32), `xla` (blocked), `hopper` or `tpu` (Pallas), `triton`; None chooses.
    """
    attend = choose("paged_attention", IMPLEMENTATIONS, implementation)
    scale = scale or q.shape[-1] ** -0.5
    return attend(q, store, layer, positions, requests, page_tables, scale, return_lse=return_lse)
