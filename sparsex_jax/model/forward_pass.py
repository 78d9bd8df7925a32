"""What every layer of one pass of rows through the model needs."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.model.decoder import Decoder, OneLayer
from sparsex_jax.model.store import AnyStore, kv_of
from sparsex_jax.model.weights import Params
from sparsex_kernels.layout import PageTables

Mass = Float[Array, "requests context"]


@struct.dataclass
class ForwardPass:
    """What every layer of one prefill or decode step needs.

    Attributes:
      page_tables: `[requests, max_pages]`, the pages of each request in order.
      chunk: rows that go through a layer at a time; divides the number of rows.
    """

    params: Params
    page_tables: PageTables
    decoder: Decoder = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)

    def layer(self, number: Int[Array, ""]) -> OneLayer:
        return OneLayer.of(self.decoder, self.params, number)

    def no_mass(self, store: AnyStore) -> Mass:
        return jnp.zeros((len(self.page_tables), self.page_tables.shape[1] * kv_of(store).shape[4]))
