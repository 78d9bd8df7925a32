"""What can score rows at a phase boundary. A new signal is one function and one entry in `SIGNALS`.

A signal is called with the boundary and the store, before the boundary's layer runs, and gives back the store
and a score for each row; the rows with the highest scores go on to the next phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_jax import model
from sparsex_jax.model import Decoder, Hidden
from sparsex_jax.plan import PrefillPlan, Rows, fold_chunks
from sparsex_jax.weights import Params
from sparsex_kernels.layout import Store


class Boundary(NamedTuple):
    """All that is known where a phase ends: the rows, and their hidden states at the input of `layer`."""

    decoder: Decoder
    params: Params
    plan: PrefillPlan
    layer: Int[Array, ""]
    rows: Rows
    hidden: Hidden
    chunk: int

    @property
    def weights(self) -> Params:
        """Of the boundary's layer. The number of layers itself is a boundary too (nothing is left to run)."""
        return model.layer_weights(self.params, self.layer)


Signal = Callable[[Boundary, Store], tuple[Store, Float[Array, "rows"]]]


def key_mass(boundary: Boundary, store: Store) -> tuple[Store, Float[Array, "rows"]]:
    """Attention that each row receives from all fresh rows, summed over heads: Sparse-Q (DESIGN.md, step 4).

    The hidden states at the boundary are as exact as the layers before it, so the keys and values of *every*
    row at this layer are computed from them first: the score then rests on true keys, and one more layer of
    KV is right, for the price of two small projections.
    """
    config, ops = boundary.decoder
    store = _refresh_kv(boundary, store)
    weights, tables = boundary.weights, boundary.plan.page_tables
    fresh, origin = boundary.rows.select(boundary.plan.fresh[boundary.rows.index] & boundary.rows.valid)
    hidden = boundary.hidden.at[origin].get(mode="fill", fill_value=0)

    def add(start: Array, part: Rows, mass: Array) -> Array:
        x = lax.dynamic_slice_in_dim(hidden, start, boundary.chunk)
        q = model.queries(weights, config, x, part)
        return mass + ops.key_mass(q, store, boundary.layer, part, tables)

    nothing = jnp.zeros((len(tables), tables.shape[1] * store.shape[4]))
    mass = fold_chunks(fresh, boundary.chunk, add, nothing)
    return store, mass.at[boundary.rows.request, boundary.rows.position].get(mode="clip")


def _refresh_kv(boundary: Boundary, store: Store) -> Store:
    """Write the K and V of all rows at the boundary's layer."""
    config, ops = boundary.decoder
    weights = boundary.weights

    def write(start: Array, part: Rows, store: Array) -> Array:
        x = lax.dynamic_slice_in_dim(boundary.hidden, start, boundary.chunk)
        keys, values = model.keys_values(weights, config, x, part)
        return ops.write_kv(store, boundary.layer, keys, values, part, boundary.plan.page_tables)

    return fold_chunks(boundary.rows, boundary.chunk, write, store)


SIGNALS: dict[str, Signal] = {"key_mass": key_mass}
