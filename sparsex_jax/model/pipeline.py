"""Chunks of rows through the layers of a mesh, each chunk's sums over the mesh hidden behind the next one's attention.

A layer has two sums over the mesh: behind attention, and behind the MLP. A chunk waits for both. The next chunk does
not: its attention needs the keys of those before it, which are written before any sum. So a turn of the loop has three
chunks at three stages: a sum that the last turn left runs beside the attention of a new chunk, another beside an MLP.

    turn             t              t + 1             t + 2
    chunk c          attention      | sum    MLP      |              sum, residual
    chunk c + 1                     | attention       | sum          MLP
    chunk c + 2                                       | attention

Chunks of a layer follow those of the layer before it, so only the first and the last turns of a phase have less to do.
A chunk's attention in the next layer comes at least three turns behind that in this one, when its residual is complete:
where there are fewer chunks than three, chunks of padding take the place of others, and kernels skip them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.model.decoder import (
    Decoder,
    Hidden,
    OneLayer,
    attention_addend,
    attention_product,
    mlp_addend,
    mlp_product,
    stream_of,
)
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import PADDING_REQUEST, Rows
from sparsex_kernels.layout import PageTables
from sparsex_kernels.product_parts import sum_parts

STAGES = 3

Parts = Float[Array, "devices rows hidden"]  # of a chunk
AllHidden = Float[Array, "all_rows hidden"]


class Turn(NamedTuple):
    """A chunk in a layer.

    Attributes:
      layer: the layer's number.
      start: the chunk's first row.
      valid: whether there is such a chunk; the first turns look back at some that there are not, and the last ones ahead.
    """

    layer: Int[Array, ""]
    start: Int[Array, ""]
    valid: Bool[Array, ""]


class InFlight(NamedTuple):
    """What a turn leaves to the next one.

    Attributes:
      attended: products behind the attention of the newest chunk, in the parts of the devices.
      added: products behind the MLP of the chunk before it, in parts.
    """

    attended: Parts
    added: Parts


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Layers from `first` up to `end` for these rows, `size` rows at a time.

    Attributes:
      chunks: how many a layer has, at least `STAGES`; the rows have room for as many.
    """

    params: Params
    tables: PageTables
    decoder: Decoder
    rows: Rows
    size: int
    chunks: Int[Array, ""]
    first: Int[Array, ""]
    end: Int[Array, ""]

    def run(self, store: AnyStore, hidden: AllHidden) -> tuple[AnyStore, AllHidden]:
        """The store, and the rows' hidden states behind the layers."""
        shape = (self.size, hidden.shape[1])
        nothing = self.decoder.ops.no_parts(shape, hidden.dtype)
        begin = InFlight(nothing, nothing)
        turns = (self.end - self.first) * self.chunks
        turns = jnp.where(turns > 0, turns + STAGES - 1, 0)
        store, hidden, _ = lax.fori_loop(0, turns, self._step, (store, hidden, begin))
        return store, hidden

    def _step(self, number: Array, carry: tuple[AnyStore, AllHidden, InFlight]) -> tuple[AnyStore, AllHidden, InFlight]:
        store, hidden, before = carry
        newest, middle, oldest = (self._turn(number - age) for age in range(STAGES))
        sum_of = self.decoder.ops.summed
        # One sum runs beside the attention, which does not need it, and the other beside the MLP. Left to itself, XLA
        # would begin with what needs the sums, beside nothing.
        attended = sum_of(before.attended)
        store, parts = self._attention(newest, store, hidden)
        attended, parts, waiting = lax.optimization_barrier((attended, parts, before.added))
        added = sum_of(waiting)
        hidden, mlp = self._mlp(middle, attended, hidden)
        added, mlp = lax.optimization_barrier((added, mlp))
        return store, self._finish(oldest, added, hidden), InFlight(parts, mlp)

    def _turn(self, number: Array) -> Turn:
        layer = self.first + number // self.chunks
        valid = (number >= 0) & (layer < self.end)
        return Turn(jnp.clip(layer, self.first, self.end - 1), number % self.chunks * self.size, valid)

    def _layer(self, turn: Turn) -> OneLayer:
        """The turn's layer, whose products stay in parts."""
        decoder = dataclasses.replace(self.decoder, ops=self.decoder.ops.later)
        return OneLayer.of(decoder, self.params, turn.layer)

    def _rows(self, turn: Turn) -> Rows:
        """The turn's rows; padding where there is no such turn."""
        rows = self.rows.chunk(turn.start, self.size)
        position = jnp.where(turn.valid, rows.position, -1)
        request = jnp.where(turn.valid, rows.request, PADDING_REQUEST)
        return dataclasses.replace(rows, position=position, request=request)

    def _chunk_of(self, hidden: AllHidden, turn: Turn) -> Hidden:
        return lax.dynamic_slice_in_dim(hidden, turn.start, self.size)

    def _attention(self, turn: Turn, store: AnyStore, hidden: AllHidden) -> tuple[AnyStore, Parts]:
        layer = self._layer(turn)
        normed = stream_of(layer, self._chunk_of(hidden, turn)).normed
        return attention_product(layer, store, normed, self._rows(turn), self.tables)

    def _mlp(self, turn: Turn, attended: Hidden, hidden: AllHidden) -> tuple[AllHidden, Parts]:
        """The rows with what attention adds, and the products behind their MLP."""
        layer = self._layer(turn)
        addend = attention_addend(layer, attended[None], hidden.dtype)
        residual, normed = layer.add_norm(addend, self._chunk_of(hidden, turn), layer.layers.mlp_norm)
        return self._with_chunk(hidden, turn, residual), mlp_product(layer, normed, self._rows(turn))

    def _finish(self, turn: Turn, added: Hidden, hidden: AllHidden) -> AllHidden:
        """The rows with what the MLP adds."""
        addend = sum_parts(mlp_addend(self._layer(turn), added[None], hidden.dtype), hidden.dtype)
        return self._with_chunk(hidden, turn, self._chunk_of(hidden, turn) + addend)

    def _with_chunk(self, hidden: AllHidden, turn: Turn, chunk: Hidden) -> AllHidden:
        """The rows with the turn's chunk, if there is such a turn."""
        kept = jnp.where(turn.valid, chunk, self._chunk_of(hidden, turn))
        return lax.dynamic_update_slice_in_dim(hidden, kept, turn.start, 0)
