"""The adapters of all slots on the devices, and what they add to a product.

The matrices of all slots lie side by side, `A = [A_0 A_1 ...]` over `B = [B_0; B_1; ...]`, with zeros where a slot or a
layer has none. A product computes `x A` for all of them at once, keeps of each row the columns of its own slot, and
multiplies those with B:

    slot 0 1 2      x A | 1 2 | 3 4 | 5 6 |      a row of slot 1
                        | 0 0 | 3 4 | 0 0 |      times B: what adapter 1 adds to it, and exactly that

So rows of different adapters need not be sorted, nothing is gathered, and shapes do not depend on what is loaded. It
costs as much as one adapter of the rank of all slots together. To a row of no adapter exact zeros are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels import api as kernels
from sparsex_kernels.backend import Backend


@no_type_check  # trees with its structure also hold shapes
@struct.dataclass
class LowRank:
    """What the adapters of all slots add to one weight of each layer.

    Attributes:
      rank: columns of a slot; `ranks` is this times the number of slots.
    """

    a: Float[Array, "layers inputs ranks"]
    b: Float[Array, "layers ranks outputs"]
    rank: int = struct.field(pytree_node=False)


@no_type_check  # trees with its structure also hold shapes
@struct.dataclass
class ValuesApart:
    """What adapters add to values, where that is kept apart from them (`model.store.SharedStore`): `Y = x A` is written
    for each row, and attention multiplies what it reads of Y with B.

    Attributes:
      a: of all slots side by side.
      b: of each slot. Attention takes it head by head.
    """

    a: Float[Array, "layers inputs ranks"]
    b: Float[Array, "layers slots kv_heads rank head_dim"]


class Added(NamedTuple):
    """What is added to several products of the same rows.

    Attributes:
      a, b: of each weight, as in `LowRank`.
      slot: of each row; -1: nothing is added to it.
    """

    a: tuple[Float[Array, "layers inputs ranks"], ...]
    b: tuple[Float[Array, "layers ranks _"], ...]
    slot: Int[Array, "rows"]

    @classmethod
    def of(cls, stacks: Sequence[LowRank], slot: Int[Array, "rows"]) -> Added:
        return cls(tuple(each.a for each in stacks), tuple(each.b for each in stacks), slot)


def add_low_rank(
    products: Sequence[Float[Array, "rows _"]],
    x: Float[Array, "rows inputs"],
    added: Added,
    layer: Int[Array, ""] | int,
    count: Int[Array, ""],
    *,
    rank: int,
    backend: Backend,
) -> tuple[Float[Array, "rows _"], ...]:
    """Products with what adapters add to them. `x A`, `(x A) B` and the sum are each summed in float32, and rounded.

    Args:
      x: what the products are of.
      count: as in `kernels.linear`. Products of other rows are undefined.
    """
    narrow = kernels.linear(x, added.a, layer, count, backend=backend)
    own = (jnp.arange(narrow[0].shape[1]) // rank)[None] == added.slot[:, None]
    kept = [jnp.where(own, each, 0) for each in narrow]  # also where another slot's columns are not finite
    parts = [kernels.linear(each, [b], layer, count, backend=backend)[0] for each, b in zip(kept, added.b, strict=True)]
    return tuple(product + part for product, part in zip(products, parts, strict=True))
