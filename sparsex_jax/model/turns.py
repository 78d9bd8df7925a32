"""Chunks of rows through layers on GPUs: a loop whose every turn takes a chunk through a layer, or a part of one.

How many turns there are is data, so before each turn of a loop a GPU asks the host whether to go on, and idles until it
answers. Here one loop is over all chunks of all layers, and it takes several turns between two questions.

On a mesh a layer has two sums over the devices: behind attention, and behind the MLP. A chunk waits for both. The next
chunk does not: its attention needs the keys of those before it, which are written before any sum. So a turn has three
chunks at three stages: a sum that the last turn left runs beside the attention of a new chunk, another beside an MLP.

    turn             t              t + 1             t + 2
    chunk c          attention      | sum    MLP      |              sum, residual
    chunk c + 1                     | attention       | sum          MLP
    chunk c + 2                                       | attention

Chunks of a layer follow those of the layer before it, so only the first and the last turns have less to do. A chunk's
attention in the next layer comes at least three turns behind that in this one, when its residual is complete. So there
must be three chunks; fewer go through whole layers, and wait.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.model.decoder import (
    Hidden,
    OneLayer,
    attention_addend,
    attention_product,
    decoder_layer,
    mlp_product,
    mlp_sum,
    stream_of,
)
from sparsex_jax.model.forward_pass import ForwardPass
from sparsex_jax.model.ops import DeviceParts
from sparsex_jax.model.store import AnyStore
from sparsex_jax.reuse.plan import PADDING_REQUEST, Rows
from sparsex_kernels.product_parts import one_part

TOGETHER = 4  # turns of whole layers between two questions to the host
STAGES = 3  # of a chunk on a mesh

AllHidden = Float[Array, "all_rows hidden"]  # of the rows, and behind them of a chunk that turns without one change


class Turn(NamedTuple):
    """A chunk in a layer.

    Attributes:
      layer: the layer's number.
      start: the chunk's first row; the first behind all rows if there is no such chunk.
      valid: whether there is one. The first turns may look back at some that there are not, and the last ones ahead.
    """

    layer: Int[Array, ""]
    start: Int[Array, ""]
    valid: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Turns(abc.ABC):
    """Layers from `first` up to `end` for these rows.

    Attributes:
      chunks: how many a layer has. Known before the first turn, they are not counted in each.
      together: turns between two questions to the host.
      unrolled: whether they are written out and not a loop, which saves a few launches in each.
    """

    together: ClassVar[int]
    unrolled: ClassVar[bool]

    forward: ForwardPass
    rows: Rows
    first: Int[Array, ""]
    end: Int[Array, ""]
    chunks: Int[Array, ""]

    def run(self, store: AnyStore, hidden: AllHidden) -> tuple[AnyStore, AllHidden]:
        """The store, and the rows' hidden states behind the layers."""
        spare = jnp.zeros((self.size, hidden.shape[1]), hidden.dtype)

        step = jax.jit(self.step)  # traced once

        def steps(number: Array, carry: Any) -> Any:
            def one(k: Array, carry: Any) -> Any:
                return step(number * self.together + k, carry)

            return lax.fori_loop(0, self.together, one, carry, unroll=self.unrolled)  # asks nothing

        carry = store, jnp.concatenate([hidden, spare]), self.nothing_in_flight(spare)
        store, after, _ = lax.fori_loop(0, -(-self.number // self.together), steps, carry)
        return store, after[: len(hidden)]

    @property
    def size(self) -> int:
        """Rows of a chunk."""
        return self.forward.chunk

    @property
    @abc.abstractmethod
    def number(self) -> Int[Array, ""]:
        """How many turns there are. More do no harm."""

    @abc.abstractmethod
    def nothing_in_flight(self, chunk: Hidden) -> Any:
        """What the first turn finds of those before it; `chunk` is like all chunks."""

    @abc.abstractmethod
    def step(self, number: Int[Array, ""], carry: tuple[AnyStore, AllHidden, Any]) -> tuple[AnyStore, AllHidden, Any]:
        """One turn."""

    def turn(self, number: Int[Array, ""]) -> Turn:
        layer = self.first + number // self.chunks
        valid = (number >= 0) & (layer < self.end)
        start = jnp.where(valid, number % self.chunks * self.size, len(self.rows.token))
        return Turn(jnp.clip(layer, self.first, self.end - 1), start, valid)

    def rows_of(self, turn: Turn) -> Rows:
        """The turn's rows; padding if it has none."""
        rows = self.rows.chunk(turn.start, self.size)
        position = jnp.where(turn.valid, rows.position, -1)
        request = jnp.where(turn.valid, rows.request, PADDING_REQUEST)
        return dataclasses.replace(rows, position=position, request=request)

    def chunk_of(self, hidden: AllHidden, turn: Turn) -> Hidden:
        return lax.dynamic_slice_in_dim(hidden, turn.start, self.size)

    def with_chunk(self, hidden: AllHidden, turn: Turn, chunk: Hidden) -> AllHidden:
        return lax.dynamic_update_slice_in_dim(hidden, chunk, turn.start, 0)


class WholeLayers(Turns):
    """A turn takes its chunk through a whole layer."""

    together = TOGETHER
    unrolled = True

    @property
    def number(self) -> Int[Array, ""]:
        return (self.end - self.first) * self.chunks

    def nothing_in_flight(self, chunk: Hidden) -> tuple[()]:
        return ()

    def step(self, number: Int[Array, ""], carry: tuple[AnyStore, AllHidden, Any]) -> tuple[AnyStore, AllHidden, Any]:
        (store, hidden, nothing), turn = carry, self.turn(number)
        about = self.chunk_of(hidden, turn), self.rows_of(turn), self.forward.page_tables
        store, chunk = decoder_layer(self.forward.layer(turn.layer), store, *about)
        return store, self.with_chunk(hidden, turn, chunk), nothing


class InFlight(NamedTuple):
    """What a turn of a mesh leaves to the next one.

    Attributes:
      attended: products behind the attention of the newest chunk, in the parts of the devices.
      added: products behind the MLP of the chunk before it, in parts.
    """

    attended: DeviceParts
    added: DeviceParts


class HiddenSums(Turns):
    """A turn of a mesh has three chunks at three stages; a layer has at least as many."""

    together = 2 * TOGETHER
    unrolled = False  # XLA would begin the sums of a turn when those of the turn before end, and products would wait

    @property
    def number(self) -> Int[Array, ""]:
        return jnp.where(self.end > self.first, (self.end - self.first) * self.chunks + STAGES - 1, 0)

    def nothing_in_flight(self, chunk: Hidden) -> InFlight:
        nothing = self.forward.decoder.ops.no_parts(chunk.shape, chunk.dtype)
        return InFlight(nothing, nothing)

    def step(self, number: Int[Array, ""], carry: tuple[AnyStore, AllHidden, Any]) -> tuple[AnyStore, AllHidden, Any]:
        store, hidden, before = carry
        newest, middle, oldest = (self.turn(number - age) for age in range(STAGES))
        sum_of = self.forward.decoder.ops.summed
        # One sum runs beside the attention, which does not need it, and the other beside the MLP. Left to itself, XLA
        # would begin with what needs the sums, beside nothing.
        attended = sum_of(before.attended)
        store, parts = self._attention(newest, store, hidden)
        attended, parts, waiting = lax.optimization_barrier((attended, parts, before.added))
        added = sum_of(waiting)
        hidden, mlp = self._mlp(middle, attended, hidden)
        added, mlp = lax.optimization_barrier((added, mlp))
        return store, self._finish(oldest, added, hidden), InFlight(parts, mlp)

    def _layer(self, turn: Turn) -> OneLayer:
        """The turn's layer, whose products stay in parts."""
        return self.forward.layer(turn.layer).leaving_parts

    def _attention(self, turn: Turn, store: AnyStore, hidden: AllHidden) -> tuple[AnyStore, DeviceParts]:
        layer = self._layer(turn)
        normed = stream_of(layer, self.chunk_of(hidden, turn)).normed
        return attention_product(layer, store, normed, self.rows_of(turn), self.forward.page_tables)

    def _mlp(self, turn: Turn, attended: Hidden, hidden: AllHidden) -> tuple[AllHidden, DeviceParts]:
        """The rows with what attention adds, and the products behind their MLP."""
        layer = self._layer(turn)
        addend = attention_addend(layer, one_part(attended), hidden.dtype)
        rows, before = self.rows_of(turn), self.chunk_of(hidden, turn)
        residual, normed = layer.add_norm(addend, before, layer.layers.mlp_norm, rows)
        return self.with_chunk(hidden, turn, residual), mlp_product(layer, normed, rows)

    def _finish(self, turn: Turn, added: Hidden, hidden: AllHidden) -> AllHidden:
        """The rows with what the MLP adds."""
        addend = mlp_sum(self._layer(turn), one_part(added), hidden.dtype)
        return self.with_chunk(hidden, turn, self.chunk_of(hidden, turn) + addend)
