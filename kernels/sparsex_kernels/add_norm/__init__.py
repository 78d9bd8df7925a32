"""Residual and norm: add a product to the residual, and normalise the sum for what comes next."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.add_norm import xla
from sparsex_kernels.arguments import AddNormArgs
from sparsex_kernels.backend import Backend, default_backend, late, run
from sparsex_kernels.mailboxes import Mailboxes
from sparsex_kernels.product_parts import ProductParts

IMPLEMENTATIONS = {
    "xla": xla.add_norm,
    "hopper": late("sparsex_kernels.add_norm.hopper", "add_norm"),
}
_REFUSAL = late("sparsex_kernels.add_norm.hopper", "refusal")


def add_norm(
    product: ProductParts,
    residual: Float[Array, "rows width"],
    scales: Float[Array, "layers width"],
    layer: Int[Array, ""] | int,
    count: Int[Array, ""] | int | None = None,
    mailboxes: Mailboxes | None = None,
    *,
    eps: float,
    backend: Backend | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows width"], Float[Array, "rows width"]]:
    """`residual + product`, and its RMS norm times the scale of one layer, both in the dtype of the residual.

    Args:
      product, residual, scales, layer, count, mailboxes, eps: as in `AddNormArgs`.
      backend, implementation: as in `paged_attention`. `xla` is also what others are compared with. `hopper` does
        all in one launch, for up to 2048 rows, or for as many as mailboxes have room for.

    Raises:
      NotImplementedError: the implementation cannot do this shape or dtype.
    """
    args = AddNormArgs(product, residual, scales, layer, backend or default_backend(), eps, count, mailboxes)
    return run("add_norm", IMPLEMENTATIONS, implementation, args)


def adds_devices(rows: int, width: int, *, dtype: Any, backend: Backend) -> bool:
    """Whether `add_norm` takes mailboxes with room for this number of rows.

    Args:
      dtype: of the residual.
    """
    return "hopper" in backend.order("add_norm") and not _REFUSAL(rows, width, dtype, backend, mailboxes=rows)
