"""What every layer of one pass of rows through the model needs."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.model.decoder import Decoder, OneLayer
from sparsex_jax.model.store import AnyStore, kv_of
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows, fold_chunks
from sparsex_kernels.layout import PageTables

Mass = Float[Array, "requests context"]


@struct.dataclass
class ForwardPass:
    """What every layer of one prefill or decode step needs.

    Attributes:
      page_tables: `[requests, max_pages]`, the pages of each request in order.
      chunk: rows that go through a layer at a time; divides the number of rows.
      asks_nothing: chunks of padding go through a layer, too. Then a GPU does not wait for its host to say how many
        chunks there are, and where no row is wanted, kernels take little time.
    """

    params: Params
    page_tables: PageTables
    decoder: Decoder = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)
    asks_nothing: bool = struct.field(pytree_node=False, default=False)

    def layer(self, number: Int[Array, ""]) -> OneLayer:
        return OneLayer.of(self.decoder, self.params, number)

    def fold_chunks[Carry](self, rows: Rows, body: Callable[[Array, Rows, Carry], Carry], carry: Carry) -> Carry:
        """Fold `body(start, chunk, carry)` over the rows, a chunk at a time."""
        return fold_chunks(rows, self.chunk, body, carry, every=self.asks_nothing)

    def no_mass(self, store: AnyStore) -> Mass:
        return jnp.zeros((len(self.page_tables), self.page_tables.shape[1] * kv_of(store).shape[4]))
