"""Products as kernels leave them that split the sum over the inputs.

What comes next adds the parts up as it reads them, which saves a launch between the two.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FEW_ROWS = 64  # a decode step's: kernels that add parts have programs for each
MOST_ROWS = 2048  # that such kernels take


class ProductParts(NamedTuple):
    """Parts of a product's rows.

    Attributes:
      parts: float32, to be summed over the first axis and then rounded; or one part that was rounded already.
      used: how many of the parts there are, the first ones, at least 1. The others were not written and may be NaN.
        None: all.
    """

    parts: Float[Array, "parts rows width"]
    used: Int[Array, ""] | None = None

    @property
    def width(self) -> int:
        """Columns of the product."""
        return self.parts.shape[2]


def one_part(product: Float[Array, "rows width"]) -> ProductParts:
    """A product that was summed already."""
    return ProductParts(product[None])


def sum_parts(product: ProductParts, dtype: Any) -> Float[Array, "rows width"]:
    """The product, rounded once."""
    parts, used = product
    if used is not None:
        parts = jnp.where(jnp.arange(len(parts))[:, None, None] < used, parts, 0)
    return parts[0].astype(dtype) if len(parts) == 1 else parts.sum(0).astype(dtype)
