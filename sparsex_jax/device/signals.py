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

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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
from sparsex_jax.reuse.plan import Rows

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
    about = boundary.forward, boundary.layer, store, rows, hidden, boundary.forward.no_mass(store)
    power = jnp.int32(1)  # as data, so that this is the same function of a program as in a probe
    return store, boundary.at_rows(add_key_mass(*about, power=power))


Watched = tuple[Int[Array, ""], Int[Array, ""]]  # the first of the layers, and the first behind them


def _every_layer(layers: Int[Array, ""]) -> Watched:
    return jnp.zeros_like(layers), layers


def _middle_third(layers: Int[Array, ""]) -> Watched:
    """Of fewer than three layers, the first."""
    first = layers // 3
    return first, jnp.maximum(2 * layers // 3, first + 1)


def _last_layer(layers: Int[Array, ""]) -> Watched:
    return layers - 1, layers


@dataclasses.dataclass(frozen=True)
class Probe:
    """A signal with a pass of its own: the fresh rows alone run through layers from the boundary on, and the attention
    that each row gets is summed over those of the layers that are watched. Layers with windows count where no other
    layer does (`add_vote`).

    ProphetKV's first stage (arXiv 2602.02579). The pass attends over the pasted KV and writes the fresh rows' K and V.
    Those that go on are written again before anything else reads them.

    Attributes:
      power: of the attention; a power of two, which multiplies queries exactly.
      watched: says which layers are watched, given how many the pass has.

    Raises:
      InvalidRequestError: `power` is no power of two.
    """

    power: int = 1
    watched: Callable[[Int[Array, ""]], Watched] = _every_layer

    def __post_init__(self) -> None:
        if self.power < 1 or self.power & (self.power - 1):
            raise InvalidRequestError(f"power={self.power} must be a power of two, such as 1, 2 or 4")

    def __call__(self, boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
        return _run_probe(boundary, store, jnp.int32(self.power), self.watched(boundary.probe_layers))


def with_one_pass(signals: Sequence[Signal], number: Int[Array, ""]) -> tuple[Signal, ...]:
    """These signals, with one and the same in place of every probe: it runs the probe of this number.

    The pass holds all kernels of a layer. With what probes differ in looked up, a program has them once.
    """
    table = [each if isinstance(each, Probe) else Probe() for each in signals]

    def run_one(boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
        power = jnp.array([probe.power for probe in table])[number]
        firsts, ends = zip(*(probe.watched(boundary.probe_layers) for probe in table), strict=True)
        return _run_probe(boundary, store, power, (jnp.stack(firsts)[number], jnp.stack(ends)[number]))

    return tuple(run_one if isinstance(each, Probe) else each for each in signals)


def _run_probe(boundary: Boundary, store: AnyStore, power: Int[Array, ""], watched: Watched) -> tuple[AnyStore, Scores]:
    forward, (rows, hidden) = boundary.forward, boundary.fresh_rows()
    first, until = among = boundary.layer + watched[0], boundary.layer + watched[1]

    def run(layer: Array, carry: tuple[AnyStore, Array, Array]) -> tuple[AnyStore, Array, Array]:
        store, before, mass = carry
        store, hidden = run_layer(forward, layer, store, rows, before)

        def vote(mass: Array) -> Array:
            return add_vote(forward, layer, among, store, rows, before, mass, power)

        # Loops of their own for layers that are not watched would be two more copies of a layer to compile.
        return store, hidden, lax.cond((first <= layer) & (layer < until), vote, lambda mass: mass, mass)

    end = boundary.layer + boundary.probe_layers
    store, _, mass = lax.fori_loop(boundary.layer, end, run, (store, hidden, forward.no_mass(store)))
    return store, boundary.at_rows(mass)


# The attention itself.
probe_mass = Probe()

# Key mass adds up many heads' glances, of which what stands near and what opens a segment get most. A head that looks
# something up has nearly all of its attention on it.
probe_focus = Probe(power=4)

# Between the two: where something is looked up, its row has most of the sum, and where nothing is, the sum spreads over
# all that is glanced at. So the share that some rows hold says what is left beside them. Few rows hold most of the
# fourth powers whatever is asked, and no few hold most of the plain sum. In the first and last layers heads look at
# what is near, or at the same rows for any prompt.
probe_square = Probe(power=2, watched=_middle_third)

# QCFuse's critical layer (arXiv 2606.05875).
probe_last = Probe(watched=_last_layer)


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
    return boundary.forward.fold_chunks(boundary.rows, measure, (store, nothing))


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
# For which there is a program that crosses a last boundary and nothing else: the one that most prefills ask for.
CROSSED_ALONE = ("key_mass",)
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

    return boundary.forward.fold_chunks(boundary.rows, write, store)


def _write(boundary: Boundary, store: AnyStore, new: NewKV, part: Rows) -> AnyStore:
    forward = boundary.forward
    return forward.decoder.ops.write_kv(store, boundary.layer, new, part, forward.page_tables)


def _stored_kv(boundary: Boundary, store: AnyStore, part: Rows) -> Float[Array, "rows 2 kv_heads head_dim"]:
    forward = boundary.forward
    return forward.decoder.ops.read_kv(store, boundary.layer, part, forward.page_tables)


def _squared_distance(a: Float[Array, "rows *rest"], b: Float[Array, "rows *rest"]) -> Scores:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(axis=tuple(range(1, a.ndim)))
