"""The hybrid prefill: one loop over the layers, in which rows stop being computed at boundaries.

    layer        0  ...  l*-1 |  l*  ...           L-1
    rows         all of them  |  fresh + key + overflow + tail
                              score, choose, narrow

Where the boundaries are, which signal scores there, which rows are forced and how many the signal may add are data.
Rows keep their bucket's shape when they narrow: those that go on move to the front, and chunks of padding are
skipped. So one compiled program a row bucket serves every method.

Between two boundaries the rows stay the same, and the loop says so: an outer loop crosses a boundary, an inner one
runs the layers up to the next. What layers derive from the rows alone (addresses, rotations, tiles of the kernels) is
then computed once a phase. A single scan whose every layer asks whether a boundary stands before it computes that
again for every layer and copies the hidden states through the question: up to 31 % slower on an H100, most where few
rows run (`scripts/results/scan-*.json`).

Behind the last boundary the order of chunks and layers may change, too. On a GPU, `prefill` ends with that boundary, or
before it where key mass chooses there: then `cross` does. `last_layers` takes the rows that went on through the layers
that are left, one chunk after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.device.compilation import WITH_STORE
from sparsex_jax.device.packed import Packed
from sparsex_jax.device.signals import Boundary, Scores, Signal, with_one_pass
from sparsex_jax.model.decoder import Decoder, Hidden, embed, inv_freq, logits
from sparsex_jax.model.forward_pass import ForwardPass
from sparsex_jax.model.layers import all_layers, run_layers
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Budget, Copies, PackedRows, PrefillPlan, PrefillState, Rows
from sparsex_jax.reuse.schedule import MAX_BOUNDARIES
from sparsex_kernels.layout import PageTables, Store

_WHOLE = 2**30  # units that the scores of a request are divided into, to be added


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="store", compiler_options=WITH_STORE)
def align(
    store: AnyStore, copies: Packed[Copies], layers: tuple[Int[Array, ""], Int[Array, ""]], *, decoder: Decoder
) -> AnyStore:
    """Make the plan's copies in the layers from the first up to the second: cached KV into the requests' own pages, its
    keys rotated to their new positions."""
    return decoder.ops.align_and_copy(store, copies.tree(), layers, inv_freq(decoder.config))


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="store", compiler_options=WITH_STORE)
def pack(store: Store, rows: Packed[PackedRows], *, decoder: Decoder) -> Store:
    """Move rows to where they are kept once the pages that they are in are gone."""
    return decoder.ops.pack_rows(store, rows.tree())


@functools.partial(jax.jit, static_argnames="decoder")
def begin(
    params: Params, laid_out: Packed[tuple[PrefillPlan, Rows]], *, decoder: Decoder
) -> tuple[PrefillPlan, PrefillState]:
    """A plan on the devices, and its prefill before layer 0."""
    plan, rows = laid_out.tree()
    state = embed_rows(params, rows, decoder=decoder, requests=len(plan.page_tables))
    return decoder.ops.replicated(plan), state


@functools.partial(jax.jit, static_argnames=("decoder", "requests"))
def embed_rows(params: Params, rows: Rows, *, decoder: Decoder, requests: int) -> PrefillState:
    """A prefill of these rows before layer 0, by a plan of this many requests."""
    active = jnp.zeros((MAX_BOUNDARIES, len(rows.token)), bool)
    covered = jnp.full((MAX_BOUNDARIES, requests), jnp.nan, jnp.float32)
    state = PrefillState(jnp.int32(0), rows, embed(params, decoder.config, rows.token), active, covered)
    return decoder.ops.replicated(state)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "signals", "chunk"),
    donate_argnames=("store", "state"),
    compiler_options=WITH_STORE,
)
def prefill(
    params: Params,
    store: AnyStore,
    plan: PrefillPlan,
    state: PrefillState,
    until: Int[Array, ""],
    crossing: Bool[Array, ""],
    *,
    decoder: Decoder,
    signals: tuple[Signal, ...],
    chunk: int,
) -> tuple[AnyStore, PrefillState, Float[Array, "requests vocab"]]:
    """Run the layers from `state.layer` up to `until`.

    Args:
      store: donated and updated in place; the plan's copies must have been made (`align`).
      state: donated.
      until: at most the number of layers.
      crossing: whether to cross the boundary that stands before layer `until`, too. It may not be crossed again.
      signals: what `plan.boundaries.signal` counts.
      chunk: rows that go through a layer at a time; divides the number of rows.

    Returns:
      The store; the state before layer `until`; and float32 logits `[requests, vocab]` of each request's last token,
      which mean something once all layers have run, in the lines of requests that the plan has.
    """
    forward = ForwardPass(params, plan.page_tables, decoder, chunk)

    def run_phase(carry: tuple[AnyStore, PrefillState, Array]) -> tuple[AnyStore, PrefillState, Array]:
        store, state, crosses = carry
        at_boundary = jnp.any(plan.boundaries.layer == state.layer)
        crosses &= state.layer < until  # else it is now
        enter = functools.partial(_enter, forward, plan, functools.partial(_score, signals))
        store, state = lax.cond(at_boundary, enter, lambda store, state: (store, state), store, state)
        end = jnp.minimum(until, _next_boundary(plan, state.layer, decoder.config.num_layers))
        store, hidden = run_layers(forward, state.layer, end, store, state.rows, state.hidden)
        return store, dataclasses.replace(state, layer=end, hidden=hidden), crosses

    def goes_on(carry: tuple[AnyStore, PrefillState, Array]) -> Array:
        _, state, crosses = carry
        return (state.layer < until) | crosses

    store, state, _ = lax.while_loop(goes_on, run_phase, (store, state, crossing))
    return store, decoder.ops.replicated(state), _last_logits(forward, state)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "signal", "chunk"),
    donate_argnames=("store", "state"),
    compiler_options=WITH_STORE,
)
def cross(
    params: Params,
    store: AnyStore,
    plan: PrefillPlan,
    state: PrefillState,
    *,
    decoder: Decoder,
    signal: Signal,
    chunk: int,
) -> tuple[AnyStore, PrefillState]:
    """Cross the boundary before layer `state.layer`, which has this signal. It asks a GPU's host nothing.

    `prefill` asks which signal it is, how many chunks have rows, and whether layers follow; and what is dispatched
    behind it waits for the answers. Arguments as there.
    """
    forward = ForwardPass(params, plan.page_tables, decoder, chunk, asks_nothing=True)
    store, state = _enter(forward, plan, lambda boundary, store, _: _by(signal, boundary, store), store, state)
    return store, decoder.ops.replicated(state)


@functools.partial(jax.jit, static_argnames=("decoder", "unit", "size"))
def chunk_of(
    state: PrefillState, number: Int[Array, ""], *, decoder: Decoder, unit: int, size: int
) -> tuple[Rows, Hidden]:
    """`size` rows of a prefill and their hidden states, from row `number * unit` on."""
    chunk = state.rows.chunk(number * unit, size), lax.dynamic_slice_in_dim(state.hidden, number * unit, size)
    return decoder.ops.replicated(chunk)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames=("store", "hidden"), compiler_options=WITH_STORE)
def last_layers(
    params: Params,
    store: AnyStore,
    tables: PageTables,
    rows: Rows,
    hidden: Hidden,
    first: Int[Array, ""] | None,
    *,
    decoder: Decoder,
) -> tuple[AnyStore, Hidden]:
    """A chunk of rows through the layers from `first` on, where none of them is dropped any more.

    A prefill may then run chunk by chunk: a row reads what those before it wrote, and nothing of those behind it. What
    layers make of a chunk's rows alone is made once, not in every layer.

    Args:
      first: None: all layers, which ask a GPU's host nothing on the way.
    """
    store, hidden = all_layers(ForwardPass(params, tables, decoder, len(rows.token)), store, rows, hidden, first)
    return store, decoder.ops.replicated(hidden)


@functools.partial(jax.jit, static_argnames=("decoder", "unit"), donate_argnames="state")
def with_chunk(
    state: PrefillState, number: Int[Array, ""], hidden: Hidden, *, decoder: Decoder, unit: int
) -> PrefillState:
    """The state with the hidden states of a chunk, from row `number * unit` on, behind the last layer."""
    hidden = lax.dynamic_update_slice_in_dim(state.hidden, hidden, number * unit, 0)
    return decoder.ops.replicated(dataclasses.replace(state, hidden=hidden, layer=jnp.int32(decoder.config.num_layers)))


@functools.partial(jax.jit, static_argnames="decoder")
def last_logits(
    params: Params, plan: PrefillPlan, state: PrefillState, *, decoder: Decoder
) -> Float[Array, "requests vocab"]:
    """The logits that `prefill` returns, of a state behind the last layer."""
    return _logits_of_last(ForwardPass(params, plan.page_tables, decoder, chunk=len(state.rows.token)), state)


def _next_boundary(plan: PrefillPlan, layer: Int[Array, ""], num_layers: int) -> Int[Array, ""]:
    """The first boundary behind this layer's own, or the number of layers."""
    boundaries = plan.boundaries.layer
    return jnp.min(jnp.where(boundaries > layer, boundaries, num_layers))


def _enter(
    forward: ForwardPass,
    plan: PrefillPlan,
    score: Callable[[Boundary, AnyStore, Int[Array, ""]], tuple[AnyStore, Scores]],
    store: AnyStore,
    state: PrefillState,
) -> tuple[AnyStore, PrefillState]:
    """Cross the boundary that stands here: score the rows, choose those that go on, and drop the others.

    Args:
      score: takes the boundary, the store, and the number of the boundary's signal.
    """
    at = jnp.argmax(plan.boundaries.layer == state.layer)
    probe_layers = plan.boundaries.probe_layers[at]
    boundary = Boundary(forward, state.layer, state.rows, state.hidden, plan.fresh, plan.scores, probe_layers)
    store, scores = score(boundary, store, plan.boundaries.signal[at])
    budget = jax.tree.map(lambda lines: lines[at], plan.boundaries.budget)
    keep = _choose(boundary, plan, plan.boundaries.forced[at], budget, scores)
    rows, hidden = _narrow(state.rows, state.hidden, keep)
    went_on = jnp.zeros_like(plan.fresh).at[rows.index].max(rows.valid)
    share = covered_share(scores, boundary.reused_rows(), keep, state.rows.request, len(plan.page_tables))
    active, covered = state.active.at[at].set(went_on), state.covered.at[at].set(share)
    return store, dataclasses.replace(state, rows=rows, hidden=hidden, active=active, covered=covered)


def _score(
    signals: tuple[Signal, ...], boundary: Boundary, store: AnyStore, number: Int[Array, ""]
) -> tuple[AnyStore, Scores]:
    """What the signal of this number says of the rows; zeros for -1. Probes share a branch."""

    def no_signal(store: AnyStore) -> tuple[AnyStore, Array]:
        return store, jnp.zeros(len(boundary.hidden))

    signals = with_one_pass(signals, number)
    branches = list(dict.fromkeys(signals))
    branch = jnp.array([0, *(1 + branches.index(signal) for signal in signals)])[number + 1]
    return lax.switch(branch, [no_signal, *(functools.partial(_by, each, boundary) for each in branches)], store)


def _by(signal: Signal, boundary: Boundary, store: AnyStore) -> tuple[AnyStore, Scores]:
    """What a signal says of the rows; a score that is NaN is the lowest."""
    store, scores = signal(boundary, store)
    num_rows = len(boundary.hidden)
    if jnp.shape(scores) != (num_rows,):
        name = getattr(signal, "__name__", repr(signal))
        raise TypeError(
            f"signal {name} returned scores of shape {jnp.shape(scores)}; it must be ({num_rows},), a row each"
        )
    return store, jnp.nan_to_num(scores.astype(jnp.float32), nan=jnp.finfo(jnp.float32).min)


def _choose(
    boundary: Boundary,
    plan: PrefillPlan,
    forced: Bool[Array, "plan_rows"],
    budget: Budget,
    scores: Scores,
) -> Bool[Array, "rows"]:
    """Which of the boundary's rows go on: the forced ones, and of the other reused ones those of highest score.

    Where layers have windows, rows that the fresh ones do not see have the score 0: those stay as they are.
    """
    rows = boundary.rows
    stays = forced[rows.index] & rows.valid
    candidates = boundary.reused_rows() & ~stays
    block = plan.block[rows.index]
    scores = pool_scores(scores, candidates, rows.request, block)
    if boundary.forward.decoder.config.layer_windows is not None:
        candidates &= scores > 0
    return stays | top_rows(scores, candidates, rows.request, block, budget)


def pool_scores(
    scores: Scores,
    candidates: Bool[Array, "rows"],
    request: Int[Array, "rows"],
    block: Int[Array, "rows"],
) -> Scores:
    """Candidates of the same request and block get their mean score.

    request      0  0  0  0  1  1
    block        0  0  1  1  1  1      rises within a request; a block never spans two requests
    candidate    x  x  x        x
    scores       2  4  1  9  5  7
    returns      3  3  1  9  5  7      rows that are no candidates keep their score and count in no mean
    """
    starts = jnp.diff(request, prepend=-1).astype(bool) | jnp.diff(block, prepend=-1).astype(bool)
    number = jnp.cumsum(starts) - 1
    total = jax.ops.segment_sum(jnp.where(candidates, scores, 0), number, len(scores), indices_are_sorted=True)
    count = jax.ops.segment_sum(candidates.astype(jnp.float32), number, len(scores), indices_are_sorted=True)
    mean = jnp.maximum(total[number], jnp.finfo(jnp.float32).min) / jnp.maximum(count[number], 1)
    return jnp.where(candidates, mean, scores)


def top_rows(
    scores: Scores,
    candidates: Bool[Array, "rows"],
    request: Int[Array, "rows"],
    block: Int[Array, "rows"],
    budget: Budget,
) -> Bool[Array, "rows"]:
    """The blocks of candidates of highest score of each request, as many as its budget begins; the earlier wins a tie.

    A sort by (request, falling score) stands in for a top-k whose k is data. With a budget of at least 3 rows for
    request 0 and of 1 for request 1, and a coverage of 0.9 and of 0:

        row          0  1  2  3  4  5 | 6  7
        request      0  0  0  0  0  0 | 1  1
        block        0  0  1  1  2  2 | 3  4
        scores       1  1  5  5  3  3 | 2  8
        candidate    x  x  x  x  x  x | x  x

        order        2  3  4  5  0  1 | 7  6    rows by (request, falling score)
        begin        0  0  2  2  4  4 | 6  7    place in `order` at which the row's block begins
        first        0  0  0  0  0  0 | 6  6    place at which its request begins
        begin-first  0  0  2  2  4  4 | 0  1    rows of its request that were chosen before its block
        < least      x  x  x  x       | x       a block that is begun is finished: 4 rows for a budget of 3
        held         0  0 10 10 16 16 | 0  8    scores before its block; of 18 and 10 in all
        < coverage   x  x  x  x  x  x |         as 16 is less than 0.9 of 18

    Args:
      request, block: rising; the candidates of one block have one score. Scores below 0 hold nothing.
      budget: no block of a request is begun once `least` of its rows are chosen, unless these are fewer than `most` and
        hold less than its coverage.
    """
    order = jnp.lexsort((jnp.where(candidates, -scores, jnp.inf), request))
    place = jnp.arange(len(order))
    begins = jnp.diff(request, prepend=-1).astype(bool) | jnp.diff(block[order], prepend=-1).astype(bool)
    begin = lax.cummax(jnp.where(begins, place, 0))
    first = lax.cummax(jnp.where(jnp.diff(request, prepend=-1).astype(bool), place, 0))
    held = _held_before(jnp.where(candidates, scores, 0)[order], request, begin, first)
    least, coverage, most = (each.at[request].get(mode="fill", fill_value=0) for each in _parts(budget))
    allowed = (begin - first < least) | ((begin - first < most) & (held < coverage))
    return jnp.zeros_like(candidates).at[order].set(allowed) & candidates


def _parts(budget: Budget) -> tuple[Array, Array, Array]:
    return budget.least, budget.coverage, budget.most


def _held_before(
    scores: Scores, request: Int[Array, "rows"], begin: Int[Array, "rows"], first: Int[Array, "rows"]
) -> Scores:
    """The share of its request's scores that stands from place `first` to before place `begin`.

    0 where all are 0. Shares are added as integers: the sums never fall, and no request's depends on those before it.
    """
    scores = jnp.maximum(scores, 0)
    total = jax.ops.segment_sum(scores, request, len(scores), indices_are_sorted=True)
    share = scores / total.at[request].get(mode="fill", fill_value=1)
    units = jnp.nan_to_num(share * _WHOLE).astype(jnp.int32)
    running = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(units)])  # wraps, and so do differences
    return (running[begin] - running[first]) / _WHOLE


def covered_share(
    scores: Scores,
    reused: Bool[Array, "rows"],
    keep: Bool[Array, "rows"],
    request: Int[Array, "rows"],
    num_requests: int,
) -> Float[Array, "requests"]:
    """Of the scores of each request's reused rows, the share of those that are kept; NaN where all are 0."""

    def total(mask: Bool[Array, "rows"]) -> Float[Array, "requests"]:
        values = jnp.where(mask, jnp.maximum(scores, 0), 0)
        return jax.ops.segment_sum(values, request, num_requests, indices_are_sorted=True)

    return jnp.minimum(total(reused & keep) / total(reused), 1)


def _narrow(rows: Rows, hidden: Hidden, keep: Bool[Array, "rows"]) -> tuple[Rows, Hidden]:
    rows, origin = rows.select(keep)
    return rows, hidden.at[origin].get(mode="fill", fill_value=0)


def _last_logits(forward: ForwardPass, state: PrefillState) -> Float[Array, "requests vocab"]:
    """Logits of each request's last row once the last layer has run, and zeros before."""
    config = forward.decoder.config

    def nothing() -> Array:
        return jnp.zeros((len(forward.page_tables), config.vocab_size), jnp.float32)

    return lax.cond(state.layer == config.num_layers, lambda: _logits_of_last(forward, state), nothing)


def _logits_of_last(forward: ForwardPass, state: PrefillState) -> Float[Array, "requests vocab"]:
    requests = jnp.arange(len(forward.page_tables))
    last = jnp.searchsorted(state.rows.request, requests, side="right", method="compare_all") - 1
    return logits(forward.params, forward.decoder.config, state.hidden[last])
