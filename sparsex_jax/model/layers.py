"""A run of rows through consecutive layers: what a phase of the prefill does, and a signal that looks ahead."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows, fold_chunks
from sparsex_kernels.layout import PageTables, Store

Mass = Float[Array, "requests context"]


class Model(NamedTuple):
    """What every layer of one prefill needs. `chunk`: rows that go through a layer at a time."""

    decoder: Decoder
    params: Params
    tables: PageTables
    chunk: int

    def layer(self, number: Int[Array, ""]) -> model.OneLayer:
        return model.layer_of(self.decoder, self.params, number)

    def no_mass(self, store: Store) -> Mass:
        return jnp.zeros((len(self.tables), self.tables.shape[1] * store.shape[4]))


class Watch(NamedTuple):
    """Rows whose attention, raised to a power, is summed on the way; and where each stands among those that run."""

    rows: Rows
    origin: Int[Array, "rows"]
    power: int = 1

    def hidden(self, hidden: Hidden) -> Hidden:
        return hidden.at[self.origin].get(mode="fill", fill_value=0)


def run_layers(
    run: Model,
    store: Store,
    rows: Rows,
    hidden: Hidden,
    layers: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    watch: Watch | None = None,
) -> tuple[Store, Hidden, Mass | None]:
    """The layers from `layers[0]` up to `layers[1]`, a loop whose bounds are data.

    Rows go through a layer a chunk at a time, and a chunk's K and V are written before it attends: sorted by
    position, each row finds every earlier row's K and V of the same layer in the store.

    Returns:
      The store, the hidden states, and the key mass of the watched rows' queries, summed over the layers.
    """

    def run_layer(layer: Array, carry: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
        store, before, mass = carry
        store, hidden = _run_layer(run, layer, store, rows, before)
        if watch is not None and mass is not None:
            mass = add_key_mass(run, layer, store, watch, watch.hidden(before), mass)
        return store, hidden, mass

    mass = None if watch is None else run.no_mass(store)
    return lax.fori_loop(*layers, run_layer, (store, hidden, mass))


def _run_layer(run: Model, layer: Int[Array, ""], store: Store, rows: Rows, hidden: Hidden) -> tuple[Store, Hidden]:
    weights = run.layer(layer)

    def run_chunk(start: Array, part: Rows, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        store, hidden = carry
        x = lax.dynamic_slice_in_dim(hidden, start, len(part.token))
        store, x = model.decoder_layer(weights, store, x, part, run.tables)
        return store, lax.dynamic_update_slice_in_dim(hidden, x, start, 0)

    return fold_chunks(rows, run.chunk, run_chunk, (store, hidden))


def add_key_mass(run: Model, layer: Int[Array, ""], store: Store, watch: Watch, hidden: Hidden, mass: Mass) -> Mass:
    """Add the attention that each key of a layer receives from these rows, summed over heads (DESIGN.md, step 4).

    Args:
      hidden: of the watched rows, at the layer's input.
    """

    def add(start: Array, part: Rows, mass: Array) -> Array:
        x = lax.dynamic_slice_in_dim(hidden, start, len(part.token))
        q = model.queries(run.layer(layer), x, part)
        return mass + run.decoder.ops.key_mass(q, store, layer, part, run.tables, watch.power)

    return fold_chunks(watch.rows, run.chunk, add, mass)
