"""Adding to products by products of their own, where the kernel of the first cannot go on with what is added."""

from collections.abc import Callable, Sequence

from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import Added


def plus(
    products: Sequence[Float[Array, "rows _"]],
    added: Sequence[Added | None],
    multiply: Callable[[Added], Float[Array, "rows _"]],
) -> tuple[Float[Array, "rows _"], ...]:
    """Products, each with what is added to it, which `multiply` computes."""
    pairs = zip(products, added or [None] * len(products), strict=True)
    return tuple(product if more is None else product + multiply(more) for product, more in pairs)
