"""From the product of queries, keys and values to what attention needs: rotate, and put K and V into the store."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import Heads, RotateArgs
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.layout import PageTables, Queries, RowInts, Store
from sparsex_kernels.product_parts import ProductParts
from sparsex_kernels.rotate_and_write import xla

IMPLEMENTATIONS = {
    "xla": xla.rotate_and_write,
    "hopper": late("sparsex_kernels.rotate_and_write.hopper", "rotate_and_write"),
}
_REFUSAL = late("sparsex_kernels.rotate_and_write.hopper", "refusal")


def rotate_and_write(
    product: ProductParts,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    inv_freq: Float[Array, "half"],
    count: Int[Array, ""] | int | None = None,
    *,
    dtype: Any,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> tuple[Queries, Store]:
    """The rotated queries of rows, and the store with their rotated keys and their values at the rows' slots.

    Args:
      product, store, layer, positions, requests, page_tables, inv_freq, count, dtype: as in `RotateArgs`.
      backend, implementation: as in `paged_attention`. `xla` is also what others are compared with; it writes by what
        `write_kv` chooses. `hopper` does all in one launch, for up to 2048 rows.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    rows = positions, requests, page_tables, inv_freq
    args = RotateArgs(product, store, layer, *rows, backend or default_backend(), dtype, count)
    return run("rotate_and_write", IMPLEMENTATIONS, implementation, args)


def is_one_kernel(rows: int, heads: Heads, *, dtype: Any, stored: Any, backend: Backend) -> bool:
    """Whether one kernel does all of `rotate_and_write` for this number of rows with these heads.

    Args:
      dtype: of the queries.
      stored: the dtype of the store.
    """
    return "hopper" in backend.order("rotate_and_write") and not _REFUSAL(rows, heads, dtype, stored)
