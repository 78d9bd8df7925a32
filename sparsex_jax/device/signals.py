"""What can score rows at a boundary. A new signal is one function: see `scripts/new_method.py`.

A signal is called with the boundary and the store, before the boundary's layer runs, and returns the store and a
score for each row, float32. The rows of highest score go on. Scores of rows that the host forces are never looked at,
and neither are those of fresh rows and padding.

A signal may write K and V into the store: at the boundary's layer for any of its rows, at later layers for fresh rows
only. What it writes for rows that do not go on stays, so it must be at least as near to the truth as what it replaces.
Mirrors keep what is written for reused rows, and take it that a new signal writes all that it may
(`sparsex_jax.reuse.schedule.written_depth`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.model.decoder import Hidden, keys_values
from sparsex_jax.model.forward_pass import ForwardPass, Mass
from sparsex_jax.model.layers import add_key_mass, add_vote, run_layer
from sparsex_jax.model.ops import NewKV
from sparsex_jax.model.store import AnyStore
from sparsex_jax.reuse.plan import Rows, fold_chunks

Scores = Float[Array, "rows"]


class Boundary(NamedTuple):
    """All that is known where rows are chosen.

    Attributes:
      layer: the boundary stands before it.
      rows, hidden: the rows that came so far, and their hidden states at the input of `layer`.
      fresh: which of the plan's own rows are fresh; `rows.index` says which of those each row is.
      given: scores that the host gave for the plan's own rows (`Phase.scores`).
      probe_layers: how many layers, from `layer` on, a signal's own pass of the fresh rows runs (`Phase.probe_layers`).
    """

    forward: ForwardPass
    layer: Int[Array, ""]
    rows: Rows
    hidden: Hidden
    fresh: Bool[Array, "plan_rows"]
    given: Float[Array, "plan_rows"]
    probe_layers: Int[Array, ""]

    def fresh_rows(self) -> tuple[Rows, Hidden]:
        """The fresh ones among the rows, in the same shape with padding at the end, and their hidden states."""
        return self.select(self.fresh[self.rows.index] & self.rows.valid)

    def select(self, keep: Bool[Array, "rows"]) -> tuple[Rows, Hidden]:
        """These of the rows, in the same shape with padding at the end, and their hidden states."""
        rows, origin = self.rows.select(keep)
        return rows, self.hidden.at[origin].get(mode="fill", fill_value=0)

    def reused_rows(self) -> Bool[Array, "rows"]:
        """Which of the rows are reused ones: neither fresh nor padding."""
        return self.rows.valid & ~self.fresh[self.rows.index]

    def chunk_of(self, start: Int[Array, ""], part: Rows) -> NewKV:
        """K and V of one chunk of the rows at the boundary's layer."""
        x = lax.dynamic_slice_in_dim(self.hidden, start, len(part.token))
        return keys_values(self.forward.layer(self.layer), x, part)

    def at_rows(self, mass: Mass) -> Scores:
        return mass.at[self.rows.request, self.rows.position].get(mode="clip")


Signal = Callable[[Boundary, AnyStore], tuple[AnyStore, Scores]]


def key_mass(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """Attention that each row receives from all fresh rows, summed over heads: Sparse-Q (SparseX, arXiv 2606.01751).

    The hidden states at the boundary are as exact as the layers before it, so the keys and values of *every*
    row at this layer are computed from them first: the score then rests on true keys, and one more layer of
    KV is right, for the price of two small projections.
    """
    return _mass_of_fresh(boundary, _refresh_kv(boundary, store))


def key_mass_of_copies(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """The same, but at layer 0 reused rows keep what was copied, which is as right there, up to rounding.

    For stores with mirrors: they would have to keep every row that is written in place of a copy.
    """
    rows = boundary.rows
    written, hidden = boundary.select(rows.valid & (boundary.fresh[rows.index] | (boundary.layer > 0)))
    return _mass_of_fresh(boundary, _refresh_kv(boundary._replace(rows=written, hidden=hidden), store))


def _mass_of_fresh(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    rows, hidden = boundary.fresh_rows()
    mass = boundary.forward.no_mass(store)
    return store, boundary.at_rows(add_key_mass(boundary.forward, boundary.layer, store, rows, hidden, mass))


def probe_mass(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """Key mass summed over the layers of a first pass of the fresh rows alone, which begins at the boundary. Layers
    with windows count where no other layer does (`add_vote`).

    ProphetKV's first stage (arXiv 2602.02579). The pass attends over the pasted KV and writes the fresh rows' K and V.
    Those that go on are written again before anything else reads them.
    """
    return _probe(boundary, store, power=1)


def probe_focus(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """The same pass; the fourth powers of the attention are summed.

    Key mass adds up many heads' glances, of which what stands near and what opens a segment get most. A head that
    looks something up has nearly all of its attention on it.
    """
    return _probe(boundary, store, power=4)


def probe_square(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """The same pass; the squares of the attention in the middle third of its layers are summed.

    Between the two: where something is looked up, its row has most of the sum, and where nothing is, the sum spreads
    over all that is glanced at. So the share that some rows hold says what is left beside them. Few rows hold most of
    the fourth powers whatever is asked, and no few hold most of the plain sum. In the first and last layers heads look
    at what is near, or at the same rows for any prompt.
    """
    return _probe(boundary, store, power=2, middle=True)


def probe_last(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """The same pass; the key mass of its last layer alone: QCFuse's critical layer (arXiv 2606.05875)."""
    return _probe(boundary, store, only_last=True)


def _probe(
    boundary: Boundary, store: AnyStore, power: int = 1, *, only_last: bool = False, middle: bool = False
) -> tuple[AnyStore, Scores]:
    forward, (rows, hidden) = boundary.forward, boundary.fresh_rows()
    end = boundary.layer + boundary.probe_layers

    def layer_step(layer: Array, carry: tuple[AnyStore, Array, Array]) -> tuple[AnyStore, Array, Array]:
        store, before, mass = carry
        store, hidden = run_layer(forward, layer, store, rows, before)
        return store, hidden, add_vote(forward, layer, (watched, until), store, rows, before, mass, power)

    def skip_mass(layer: Array, carry: tuple[AnyStore, Array]) -> tuple[AnyStore, Array]:
        return run_layer(forward, layer, carry[0], rows, carry[1])

    watched, until = boundary.layer, end
    if only_last:
        watched = end - 1
    if middle:
        watched, until = (boundary.layer + part * boundary.probe_layers // 3 for part in (1, 2))
        until = jnp.maximum(until, watched + 1)  # of fewer than three layers, the first
    if only_last or middle:
        store, hidden = lax.fori_loop(boundary.layer, watched, skip_mass, (store, hidden))
    store, hidden, mass = lax.fori_loop(watched, until, layer_step, (store, hidden, forward.no_mass(store)))
    if middle:
        store, _ = lax.fori_loop(until, end, skip_mass, (store, hidden))
    return store, boundary.at_rows(mass)


def kv_deviation(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """Squared distance of each row's K and V at this layer from what the store has for it, summed over heads.

    CacheBlend's signal (arXiv 2405.16444, section 4.2). Reused rows hold their aligned copies until now; the new K and
    V replace them. What a fresh row holds means nothing, and neither does its score.
    """

    def measure(start: Array, part: Rows, carry: tuple[AnyStore, Array]) -> tuple[AnyStore, Array]:
        store, deviation = carry
        new = boundary.chunk_of(start, part)
        # Read before written: without the barrier XLA reads late, from a copy of the whole store.
        old, store = lax.optimization_barrier((_stored_kv(boundary, store, part), store))
        moved = _squared_distance(jnp.stack([new.keys, new.values], 1), old)
        store = _write(boundary, store, new, part)
        return store, lax.dynamic_update_slice_in_dim(deviation, moved, start, 0)

    nothing = jnp.zeros(len(boundary.hidden))
    return fold_chunks(boundary.rows, boundary.forward.chunk, measure, (store, nothing))


def given(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """The scores that the host gave (`Phase.scores`): random tokens, and the oracle's."""
    return store, boundary.given[boundary.rows.index]


# By the name that a method's `Phase.signal` uses. These are part of every compiled prefill.
BUILT_IN: dict[str, Signal] = {
    "key_mass": key_mass,
    "probe_mass": probe_mass,
    "probe_focus": probe_focus,
    "probe_square": probe_square,
    "probe_last": probe_last,
    "kv_deviation": kv_deviation,
    "given": given,
}
# What stands for some of them where the store has mirrors.
WITH_MIRRORS: dict[str, Signal] = {"key_mass": key_mass_of_copies}
SIGNALS = dict(BUILT_IN)  # and those that `signal` registers


def signal(name: str) -> Callable[[Signal], Signal]:
    """Register a signal of one's own under a name. It is part of those prefills only that ask for it.

    Raises:
      InvalidRequestError: a signal of this package has the name.
    """
    if name in BUILT_IN:
        raise InvalidRequestError(f"name={name!r} is a signal of this package; another one needs a name of its own")

    def register(score: Signal) -> Signal:
        SIGNALS[name] = score
        return score

    return register


def signals_for(names: Iterable[str | None], mirrors: bool = False) -> dict[str, Signal]:
    """The signals to compile a prefill with that asks for these: those of this package, and others among them.

    Args:
      mirrors: the store has mirrors.
    """
    own = {name: SIGNALS[name] for name in sorted(filter(None, names)) if name in SIGNALS and name not in BUILT_IN}
    return BUILT_IN | (WITH_MIRRORS if mirrors else {}) | own


def _refresh_kv(boundary: Boundary, store: AnyStore) -> AnyStore:
    """Write the K and V of all rows at the boundary's layer."""

    def write(start: Array, part: Rows, store: AnyStore) -> AnyStore:
        return _write(boundary, store, boundary.chunk_of(start, part), part)

    return fold_chunks(boundary.rows, boundary.forward.chunk, write, store)


def _write(boundary: Boundary, store: AnyStore, new: NewKV, part: Rows) -> AnyStore:
    forward = boundary.forward
    return forward.decoder.ops.write_kv(store, boundary.layer, new, part, forward.page_tables)


def _stored_kv(boundary: Boundary, store: AnyStore, part: Rows) -> Float[Array, "rows 2 kv_heads head_dim"]:
    forward = boundary.forward
    return forward.decoder.ops.read_kv(store, boundary.layer, part, forward.page_tables)


def _squared_distance(a: Float[Array, "rows *rest"], b: Float[Array, "rows *rest"]) -> Scores:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(axis=tuple(range(1, a.ndim)))
