"""Low-rank write: put Y of new rows into one layer of the store of Y, in place."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import WriteLowRankArgs
from sparsex_kernels.backend import Backend, default_backend, run
from sparsex_kernels.layout import LowRankStore, PageTables, RowInts
from sparsex_kernels.write_low_rank import reference, xla

# Where others are preferred, they are XLA's too.
IMPLEMENTATIONS = {
    "reference": reference.write_low_rank,
    **dict.fromkeys(("xla", "hopper", "triton", "tpu"), xla.write_low_rank),
}


def write_low_rank(
    store: LowRankStore,
    layer: Int[Array, ""],
    values: Float[Array, "rows columns"],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    columns: Int[Array, "requests"] | None = None,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> LowRankStore:
    """The store with each row's Y at the row's slot; padding rows write nothing.

    Without `columns`, a row's Y of all adapters is written at once. With them, that of its request's adapter is, and
    that of others stays.

    Args:
      store, layer, values, positions, requests, page_tables, columns: as in `WriteLowRankArgs`.
      backend, implementation: as in `paged_attention`.

    Raises:
      ValueError: the values have more columns than the store, or fewer and it is not said which.
    """
    width, given = store.shape[3], values.shape[1]
    if given > width or (columns is None and given < width):
        raise ValueError(f"values of {given} columns for a store of {width}{'' if columns is None else ' at most'}")
    backend = backend or default_backend()
    args = WriteLowRankArgs(store, layer, values, positions, requests, page_tables, columns, backend)
    return run("write_low_rank", IMPLEMENTATIONS, implementation, args)
