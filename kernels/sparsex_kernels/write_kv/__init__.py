"""KV write: put the K and V of new rows into one layer of the store, in place."""

from jax import Array
from jaxtyping import Int

from sparsex_kernels.arguments import WriteArgs
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.layout import KVRows, PageTables, RowInts, Store
from sparsex_kernels.write_kv import reference, triton, xla

IMPLEMENTATIONS = {
    "reference": reference.write_kv,
    "xla": xla.write_kv,
    "hopper": late("sparsex_kernels.write_kv.hopper", "write_kv"),
    "triton": triton.write_kv,
    "tpu": late("sparsex_kernels.write_kv.tpu", "write_kv"),
}


def write_kv(
    store: Store,
    layer: Int[Array, ""],
    keys: KVRows,
    values: KVRows,
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Store:
    """The store with each row's K and V at the row's slot; padding rows write nothing.

    Args:
      store, layer, keys, values, positions, requests, page_tables: as in `WriteArgs`.
      backend, implementation: as in `paged_attention`.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    args = WriteArgs(store, layer, keys, values, positions, requests, page_tables, backend or default_backend())
    return run("write_kv", IMPLEMENTATIONS, implementation, args)
