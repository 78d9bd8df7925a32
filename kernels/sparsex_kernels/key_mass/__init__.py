"""Key mass: the attention that each key receives from a set of query rows."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.key_mass import reference, triton, xla
from sparsex_kernels.layout import PageTables, Power, Queries, RowInts, Store, Window

IMPLEMENTATIONS = {
    "reference": reference.key_mass,
    "xla": xla.key_mass,
    "hopper": late("sparsex_kernels.key_mass.hopper", "key_mass"),
    "triton": triton.key_mass,
    "tpu": late("sparsex_kernels.key_mass.tpu", "key_mass"),
}


def key_mass(
    query: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    power: Power = 1,
    window: Window | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> Float[Array, "requests context"]:
    """Column sums of the causal softmax over rows and heads.

    With `a[i, h, j]` the attention weight of row i and query head h on key j of the row's request r,

        mass[r, j] = sum over rows i of r and heads h of a[i, h, j] ** power

    which for the power 1 is the score by which SparseX chooses the tokens to recompute.

    Args:
      query, store, layer, positions, requests, page_tables, window: as in `AttentionArgs`. Only keys are read. A key
        that a window hides from a row gets nothing from it.
      power: above 1, a key to which some head gives much of its attention counts more than one to which all heads
        give a little. As data, one program serves several powers; it must then be a power of two, since GPUs multiply
        the queries by it, and these times the power must be finite in their dtype, in float16 over a store of float8.
      scale, backend, implementation: as in `paged_attention`.

    Returns:
      Float32 `[requests, max_pages * page_size]`. For the power 1, all of it sums to rows * q_heads, padding apart.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    args = AttentionArgs(
        query=query,
        store=store,
        layer=layer,
        positions=positions,
        requests=requests,
        page_tables=page_tables,
        scale=scale or query.shape[-1] ** -0.5,
        backend=backend or default_backend(),
        window=window,
    )
    return run("key_mass", IMPLEMENTATIONS, implementation, args, power=power)
