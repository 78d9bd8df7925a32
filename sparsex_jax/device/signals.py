"""What can score rows at a phase boundary. A new signal is one function: see `scripts/new_method.py`.

A signal is called with the boundary and the store, before the boundary's layer runs, and gives back the store
and a score for each row; the rows with the highest scores go on to the next phase. Scores of rows that the host
forces are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Heads, Hidden
from sparsex_jax.model.layers import Mass, Model, Watch, add_key_mass, run_layers
from sparsex_jax.reuse.plan import Choice, Rows, fold_chunks
from sparsex_kernels.layout import Store, row_addresses

Scores = Float[Array, "rows"]
FOCUS = 4  # the power of `key_focus` and `probe_focus`


class Boundary(NamedTuple):
    """All that is known where a phase ends.

    Attributes:
      rows, hidden: the rows of the phase, and their hidden states at the input of `layer`.
      fresh: which of the plan's own rows are fresh.
      choice: what the host says of the choice, for the plan's own rows.
      mass: key mass of the fresh rows over the phase's layers, if the signal asked for it (`watches`).
    """

    run: Model
    layer: Int[Array, ""]
    rows: Rows
    hidden: Hidden
    fresh: Bool[Array, "plan_rows"]
    choice: Choice
    mass: Mass | None

    def fresh_rows(self, power: int = 1) -> Watch:
        return fresh_among(self.rows, self.fresh, power)

    def chunk_of(self, start: Int[Array, ""], part: Rows) -> tuple[Heads, Heads]:
        """K and V of one chunk of the rows at the boundary's layer."""
        x = lax.dynamic_slice_in_dim(self.hidden, start, len(part.token))
        return model.keys_values(self.run.layer(self.layer), x, part)

    def at_rows(self, mass: Mass) -> Scores:
        return mass.at[self.rows.request, self.rows.position].get(mode="clip")


class Signal(NamedTuple):
    """A scoring function, and the power of the attention that the layers before the boundary sum for it, if any."""

    score: Callable[[Boundary, Store], tuple[Store, Scores]]
    watches: int = 0


SIGNALS: dict[str, Signal] = {}


def signal(name: str, *, watches: int = 0) -> Callable[..., Callable[[Boundary, Store], tuple[Store, Scores]]]:
    """Register a scoring function under a name that `Phase.signal` can take."""

    def register(
        score: Callable[[Boundary, Store], tuple[Store, Scores]],
    ) -> Callable[[Boundary, Store], tuple[Store, Scores]]:
        SIGNALS[name] = Signal(score, watches)
        return score

    return register


def find_signal(name: str) -> Signal:
    """Raises InvalidRequestError for a name that no signal has; the message lists those there are."""
    if name not in SIGNALS:
        raise InvalidRequestError(f"signal={name!r} is unknown; there are: {', '.join(SIGNALS)}")
    return SIGNALS[name]


def fresh_among(rows: Rows, fresh: Bool[Array, "plan_rows"], power: int = 1) -> Watch:
    """The fresh ones of some rows of the plan."""
    return Watch(*rows.select(fresh[rows.index] & rows.valid), power)


@signal("key_mass")
def key_mass(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """Attention that each row receives from all fresh rows, summed over heads: Sparse-Q (DESIGN.md, step 4).

    The hidden states at the boundary are as exact as the layers before it, so the keys and values of *every*
    row at this layer are computed from them first: the score then rests on true keys, and one more layer of
    KV is right, for the price of two small projections.
    """
    return _key_mass(boundary, store, boundary.run.no_mass(store))


@signal("key_focus")
def key_focus(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """The fourth powers of that attention, summed: who looks firmly at what.

    Key mass adds up many heads' glances, of which what stands near and what opens a segment get most. A head that
    looks something up has nearly all of its attention on it.
    """
    return _key_mass(boundary, store, boundary.run.no_mass(store), FOCUS)


@signal("key_mass_sum", watches=1)
def key_mass_sum(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """Key mass summed over the layers of the phase before and the boundary's own."""
    assert boundary.mass is not None
    return _key_mass(boundary, store, boundary.mass)


@signal("key_focus_sum", watches=FOCUS)
def key_focus_sum(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """The same of the fourth powers."""
    assert boundary.mass is not None
    return _key_mass(boundary, store, boundary.mass, FOCUS)


def _key_mass(boundary: Boundary, store: Store, mass: Mass, power: int = 1) -> tuple[Store, Scores]:
    store = _refresh_kv(boundary, store)
    fresh = boundary.fresh_rows(power)
    mass = add_key_mass(boundary.run, boundary.layer, store, fresh, fresh.hidden(boundary.hidden), mass)
    return store, boundary.at_rows(mass)


@signal("probe_mass")
def probe_mass(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """Key mass summed over all layers from the boundary on, from a first pass of the fresh rows alone.

    ProphetKV's first stage. The pass attends over the pasted KV, and writes the fresh rows' K and V; they are
    written again when the phase runs, before anything else reads them.
    """
    return _probe(boundary, store, power=1)


@signal("probe_focus")
def probe_focus(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """The same pass; the fourth powers of the attention are summed."""
    return _probe(boundary, store, power=FOCUS)


def _probe(boundary: Boundary, store: Store, power: int) -> tuple[Store, Scores]:
    fresh = boundary.fresh_rows()
    hidden = fresh.hidden(boundary.hidden)
    everything = Watch(fresh.rows, jnp.arange(len(hidden)), power)
    layers = boundary.layer, boundary.run.decoder.config.num_layers
    store, _, mass = run_layers(boundary.run, store, fresh.rows, hidden, layers, everything)
    assert mass is not None
    return store, boundary.at_rows(mass)


@signal("kv_deviation")
def kv_deviation(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """Squared distance of each row's K and V at this layer from what the store has for it, summed over heads.

    CacheBlend's signal (section 4.2). Reused rows hold their aligned copies until now; the new K and V replace
    them. What a fresh row holds means nothing, and neither does its score.
    """

    def measure(start: Array, part: Rows, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        store, deviation = carry
        new = boundary.chunk_of(start, part)
        # Read before written: without the barrier XLA reads late, from a copy of the whole store.
        old, store = lax.optimization_barrier((_stored_kv(boundary, store, part), store))
        moved = _squared_distance(jnp.stack(new, 1), old)
        store = _write(boundary, store, new, part)
        return store, lax.dynamic_update_slice_in_dim(deviation, moved, start, 0)

    nothing = jnp.zeros(len(boundary.hidden))
    return fold_chunks(boundary.rows, boundary.run.chunk, measure, (store, nothing))


@signal("given")
def given(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """The scores that the host gave (`Phase.scores`): random tokens, and the oracle's."""
    return store, boundary.choice.scores[boundary.rows.index]


def _refresh_kv(boundary: Boundary, store: Store) -> Store:
    """Write the K and V of all rows at the boundary's layer."""

    def write(start: Array, part: Rows, store: Array) -> Array:
        return _write(boundary, store, boundary.chunk_of(start, part), part)

    return fold_chunks(boundary.rows, boundary.run.chunk, write, store)


def _write(boundary: Boundary, store: Store, kv: tuple[Heads, Heads], part: Rows) -> Store:
    run = boundary.run
    return run.decoder.ops.write_kv(store, boundary.layer, *kv, part, run.tables)


def _stored_kv(boundary: Boundary, store: Store, part: Rows) -> Float[Array, "rows 2 kv_heads head_dim"]:
    """What the store holds for some rows at the boundary's layer. Anything for padding."""
    page, offset = row_addresses(store, part.position, part.request, boundary.run.tables)
    return store.at[boundary.layer, page, :, :, offset].get(mode="clip")


def _squared_distance(a: Float[Array, "rows *rest"], b: Float[Array, "rows *rest"]) -> Scores:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(axis=tuple(range(1, a.ndim)))
