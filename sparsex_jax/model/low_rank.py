"""The adapters of all slots on the devices, and what they add to a product.

The matrices of all slots lie side by side, `A = [A_0 A_1 ...]` over `B = [B_0; B_1; ...]`, with zeros where a slot or a
layer has none. A product computes `x A` for all of them at once, keeps of each row the columns of its own slot, and
multiplies those with B:

    slot 0 1 2      x A | 1 2 | 3 4 | 5 6 |      a row of slot 1
                        | 0 0 | 3 4 | 0 0 |      times B: what adapter 1 adds to it, and exactly that

So rows of different adapters need not be sorted, nothing is gathered, and shapes do not depend on what is loaded. It
costs as much as one adapter of the rank of all slots together. To a row of no adapter exact zeros are added.

One operation computes `x A` for all weights that read the same rows, and that of the weights themselves adds `(x A) B`
(`kernels.linear`): beside a layer's 4 products there are 4 narrow ones, and 4 masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import jax.numpy as jnp
import numpy as np
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
      rank: columns of a slot; `ranks` is this times the number of slots, and on GPUs columns of zeros behind them.
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
      a: of all slots side by side, and on GPUs columns of zeros behind them.
      b: of each slot. Attention takes it head by head.
    """

    a: Float[Array, "layers inputs ranks"]
    b: Float[Array, "layers slots kv_heads rank head_dim"]


class Adapting(NamedTuple):
    """What adapters add to products of the same rows with several weights.

    Attributes:
      a, b: of each weight, as in `LowRank`; None where adapters add nothing to it.
      slot: of each row; -1: nothing is added to it. None: nothing is added to any.
      apart: A of a `ValuesApart` whose Y is wanted, or None.
    """

    a: tuple[Float[Array, "layers inputs ranks"] | None, ...] = ()
    b: tuple[Float[Array, "layers ranks _"] | None, ...] = ()
    slot: Int[Array, "rows"] | None = None
    apart: Float[Array, "layers inputs ranks"] | None = None

    @classmethod
    def of(
        cls, stacks: Sequence[LowRank | None], slot: Int[Array, "rows"] | None, apart: ValuesApart | None
    ) -> Adapting:
        a = tuple(None if each is None else each.a for each in stacks)
        b = tuple(None if each is None else each.b for each in stacks)
        return cls(a, b, slot, None if apart is None else apart.a)


def narrow_products(
    x: Float[Array, "rows inputs"],
    adapting: Adapting,
    layer: Int[Array, ""] | int,
    count: Int[Array, ""],
    *,
    rank: int,
    backend: Backend,
) -> tuple[tuple[kernels.Added | None, ...], Float[Array, "rows ranks"] | None]:
    """What adapters add to each of the products of x, and Y where it is wanted: one operation makes all `x A`.

    Each `x A` is summed in float32, and rounded.

    Args:
      count: as in `kernels.linear`. Products of other rows are undefined.
      rank: columns of a slot.
    """
    wanted = [a for a in (*adapting.a, adapting.apart) if a is not None]
    made = list(kernels.linear(x, wanted, layer, count, backend=backend) if wanted else ())
    y = made.pop() if adapting.apart is not None else None
    return _added(made, adapting, rank) if made else (), y


def _added(
    made: Sequence[Float[Array, "rows ranks"]], adapting: Adapting, rank: int
) -> tuple[kernels.Added | None, ...]:
    """What is added to each product. All are masked at once, side by side: that is one pass over few columns."""
    assert adapting.slot is not None, "rows that adapters add to say which one does"
    slots = np.concatenate([np.arange(narrow.shape[1]) // rank for narrow in made])
    # Columns of other slots may hold what is not finite.
    own = jnp.where(slots == adapting.slot[:, None], jnp.concatenate(made, axis=1), 0)
    begins = itertools.accumulate((0 if b is None else b.shape[1] for b in adapting.b), initial=0)
    return tuple(b if b is None else kernels.Added(own, b, at) for b, at in zip(adapting.b, begins, strict=False))
