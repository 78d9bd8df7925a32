"""Products as kernels leave them that split the sum over the inputs.

What comes next adds the parts up as it reads them, which saves a launch between the two.
"""

from typing import Any

from jaxtyping import Array, Float

# float32, to be summed over the first axis and then rounded; or one part that was rounded already.
ProductParts = Float[Array, "parts rows width"]


def sum_parts(parts: ProductParts, dtype: Any) -> Float[Array, "rows width"]:
    """The product, rounded once."""
    return parts[0].astype(dtype) if len(parts) == 1 else parts.sum(0).astype(dtype)
