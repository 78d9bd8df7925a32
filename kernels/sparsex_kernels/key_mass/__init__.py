"""Key mass: the attention that each key receives from a set of query rows."""

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.dispatch import choose
from sparsex_kernels.key_mass import hopper, reference, tpu, triton, xla
from sparsex_kernels.layout import PageTables, Queries, RowInts, Store

IMPLEMENTATIONS = {
    "reference": reference.key_mass,
    "xla": xla.key_mass,
    "hopper": hopper.key_mass,
    "triton": triton.key_mass,
    "tpu": tpu.key_mass,
}


def key_mass(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    *,
    scale: float | None = None,
    power: int = 1,
    implementation: str | None = None,
) -> Float[Array, "requests context"]:
    """Column sums of the causal softmax over rows and heads, `s_j` of DESIGN.md section 3, step 4.

    Arguments are those of `paged_attention`. The result is float32, `[requests, max_pages * page_size]`, and
    sums to rows * q_heads over each request's keys.

    Args:
      power: weights of the softmax are raised to it before they are summed. Above 1, a key that some head looks at
        firmly outdoes one that all of them glance at.
    """
    mass = choose("key_mass", IMPLEMENTATIONS, implementation)
    return mass(q, store, layer, positions, requests, page_tables, scale or q.shape[-1] ** -0.5, power)
