"""Attention of rows at arbitrary positions over the paged store: full, chunked and sparse prefill, and decode."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs, LowRank
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, Window
from sparsex_kernels.paged_attention import gather, reference, triton, xla

IMPLEMENTATIONS = {
    "reference": reference.paged_attention,
    "xla": xla.paged_attention,
    "gather": gather.paged_attention,
    "hopper": late("sparsex_kernels.paged_attention.hopper", "paged_attention"),
    "triton": triton.paged_attention,
    "tpu": late("sparsex_kernels.paged_attention.tpu", "paged_attention"),
}


def paged_attention(
    query: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    scale: float | None = None,
    window: Window | None = None,
    low_rank: LowRank | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """Softmax attention of each row over its request's keys at positions up to its own, or the last of these.

    Args:
      query, store, layer, positions, requests, page_tables, window, low_rank: as in `AttentionArgs`. The output of
        padding is 0. Blocks of keys that a window hides from all rows of a tile are not read.
      scale: of the scores; 1 / sqrt(head_dim) by default.
      return_lse: also return the logarithm of the softmax's denominator in float32, `[rows, q_heads]`, by which
        results over parts of the keys can be merged; -inf for padding.
      backend: where it runs; None: on JAX's first device.
      implementation: `reference` (dense, float32), `xla` (blocked), `gather`, `hopper` or `tpu` (Pallas), or `triton`;
        None: the first of the backend's order that can do it.

    Returns:
      `[rows, q_heads, head_dim]` in the dtype of the queries.

    Raises:
      ValueError: `low_rank` does not belong to this store.
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    scale = scale or query.shape[-1] ** -0.5
    backend = backend or default_backend()
    args = AttentionArgs(query, store, layer, positions, requests, page_tables, scale, backend, window, low_rank)
    if low_rank is not None:
        low_rank.check(store, query)
    # Kernels are validated with adapters and without, so these are two operations to a backend.
    operation = "paged_attention" if low_rank is None else "low_rank_attention"
    return run(operation, IMPLEMENTATIONS, implementation, args, return_lse=return_lse)
