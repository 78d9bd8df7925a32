"""KV write: put the K and V of new rows into one layer of the store, in place."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.dispatch import choose
from sparsex_kernels.layout import PageTables, RowInts, Store
from sparsex_kernels.write_kv import hopper, reference, tpu, triton, xla

IMPLEMENTATIONS = {
    "reference": reference.write_kv,
    "xla": xla.write_kv,
    "hopper": hopper.write_kv,
    "triton": triton.write_kv,
    "tpu": tpu.write_kv,
}


def write_kv(
    store: Store,
    layer: Int[Array, ""],
    keys: Float[Array, "rows kv_heads head_dim"],
    values: Float[Array, "rows kv_heads head_dim"],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    implementation: str | None = None,
) -> Store:
    """The store with each row's K (rotated) and V at the row's slot; padding rows write nothing.

    Args:
      store: donated by the caller's jit, so that it is updated in place.
      positions, requests: of the rows, as in `paged_attention`; no two rows share a slot.
    """
    write = choose("write_kv", IMPLEMENTATIONS, implementation)
    return write(store, layer, keys, values, positions, requests, page_tables)
