"""The hybrid prefill: phases over the layers, each on fewer tokens than the one before (DESIGN.md, section 3).

One jitted program runs any schedule with the same signals: where the phases begin, which rows are forced and
how many the signal may choose are data. Within a phase, layers are a loop, and rows go through a layer
a chunk at a time, so padding to the capacity costs nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.device.signals import Boundary, find_signal, fresh_among
from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.layers import Model, run_layers
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import PADDING_REQUEST, Copies, PrefillPlan, Rows
from sparsex_kernels.layout import Store


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="store")
def align(store: Store, copies: Copies, *, decoder: Decoder) -> Store:
    """Make the plan's copies: cached KV into the requests' own pages, keys rotated to their new positions."""
    return decoder.ops.align_and_copy(store, copies, model.inv_freq(decoder.config))


@functools.partial(jax.jit, static_argnames=("decoder", "signals", "chunk"), donate_argnames="store")
def prefill(
    params: Params,
    store: Store,
    plan: PrefillPlan,
    *,
    decoder: Decoder,
    signals: tuple[str | None, ...],
    chunk: int,
) -> tuple[Store, Float[Array, "requests vocab"], Bool[Array, "later_phases rows"]]:
    """Run the plan's phases and give the logits of each request's last token.

    Args:
      store: donated and updated in place; the plan's copies must have been made (`align`).
      signals: for each phase after the first, the name of what scores the rows (`sparsex_jax.device.signals`), or
        None where the forced rows are the phase.
      chunk: rows that go through a layer at a time; divides the number of rows.

    Returns:
      The store; float32 logits `[requests, vocab]`, meaningless for unused requests; and which of the plan's
      rows each later phase computed.
    """
    run = Model(decoder, params, plan.page_tables, chunk)
    rows, hidden, mass = plan.rows, model.embed(params, plan.rows.token), None
    active = []
    for phase, (signal, upcoming) in enumerate(zip((None, *signals), (*signals, None), strict=True)):
        if phase > 0:
            choice = plan.choices[phase - 1]
            boundary = Boundary(run, plan.first_layer[phase], rows, hidden, plan.fresh, choice, mass)
            store, keep = _choose(boundary, store, signal)
            rows, hidden = _narrow(rows, hidden, keep)
            active.append(jnp.zeros_like(plan.fresh).at[rows.index].max(rows.valid))
        layers = plan.first_layer[phase], plan.first_layer[phase + 1]
        power = find_signal(upcoming).watches if upcoming else 0
        watch = fresh_among(rows, plan.fresh, power) if power else None
        store, hidden, mass = run_layers(run, store, rows, hidden, layers, watch)
    last = jnp.searchsorted(rows.request, jnp.arange(len(plan.page_tables)), side="right") - 1
    out = model.logits(params, decoder.config, hidden[last])
    return store, out, jnp.array(active, bool).reshape(len(signals), plan.fresh.size)


def _choose(boundary: Boundary, store: Store, signal: str | None) -> tuple[Store, Bool[Array, "rows"]]:
    """Which of the boundary's rows go on: the forced ones, and of the others those the signal scores highest."""
    rows, choice = boundary.rows, boundary.choice
    forced = choice.forced[rows.index] & rows.valid
    if signal is None:
        return store, forced
    with jax.named_scope(signal):
        store, scores = find_signal(signal).score(boundary, store)
    reused = rows.valid & ~boundary.fresh[rows.index]
    candidates = reused & ~forced
    group = jnp.where(rows.valid, choice.group[rows.index], PADDING_REQUEST)
    scores = pool_scores(scores, candidates, group, choice.block[rows.index])
    need = lacking_score(scores, reused, forced, group, choice.coverage)
    return store, forced | top_rows(scores, candidates, group, choice.block[rows.index], choice.budget, need)


def pool_scores(
    scores: Float[Array, "rows"],
    candidates: Bool[Array, "rows"],
    group: Int[Array, "rows"],
    block: Int[Array, "rows"],
) -> Float[Array, "rows"]:
    """Candidates of the same group and block get their mean score, which leaves each group's sum as it was."""
    starts = jnp.diff(group, prepend=-1).astype(bool) | jnp.diff(block, prepend=-1).astype(bool)
    number = jnp.cumsum(starts) - 1
    total = jax.ops.segment_sum(jnp.where(candidates, scores, 0), number, len(scores), indices_are_sorted=True)
    count = jax.ops.segment_sum(candidates.astype(jnp.float32), number, len(scores), indices_are_sorted=True)
    return jnp.where(candidates, total[number] / jnp.maximum(count[number], 1), scores)


def lacking_score(
    scores: Float[Array, "rows"],
    reused: Bool[Array, "rows"],
    forced: Bool[Array, "rows"],
    group: Int[Array, "rows"],
    coverage: Float[Array, "groups"],
) -> Float[Array, "groups"]:
    """How much score the candidates must add for the computed rows to hold `coverage` of all reused rows' score."""
    number = jnp.minimum(group, len(coverage) - 1)  # padding is not reused
    total, held = (
        jax.ops.segment_sum(jnp.where(mask, scores, 0), number, len(coverage), indices_are_sorted=True)
        for mask in (reused, reused & forced)
    )
    return jnp.where(jnp.isinf(coverage), jnp.inf, coverage * total - held)


def top_rows(
    scores: Float[Array, "rows"],
    candidates: Bool[Array, "rows"],
    group: Int[Array, "rows"],
    block: Int[Array, "rows"],
    budget: Int[Array, "groups"],
    need: Float[Array, "groups"] | None = None,
) -> Bool[Array, "rows"]:
    """The blocks of candidates of highest score of each group, as few as its need allows; the earlier one wins a tie.

    Args:
      group, block: sorted; candidates of one block have one score. A sort by (group, score) stands in for a top-k
        whose k is data.
      budget: no block of group g is begun once so many rows are chosen.
      need: nor once those chosen have this score together. None: no such limit.
    """
    order = jnp.lexsort((jnp.where(candidates, -scores, jnp.inf), group))
    place = jnp.arange(len(order))
    begins = jnp.diff(group, prepend=-1).astype(bool) | jnp.diff(block[order], prepend=-1).astype(bool)
    begin = lax.cummax(jnp.where(begins, place, 0))  # of each row's block, in the order of scores
    first = jnp.searchsorted(group, group, side="left")
    allowed = begin - first < budget.at[group].get(mode="fill", fill_value=0)
    if need is not None:
        before = jnp.cumsum(jnp.where(candidates, scores, 0)[order]) - jnp.where(candidates, scores, 0)[order]
        allowed &= before[begin] - before[first] < need.at[group].get(mode="fill", fill_value=0)
    return jnp.zeros_like(candidates).at[order].set(allowed) & candidates


def _narrow(rows: Rows, hidden: Hidden, keep: Bool[Array, "rows"]) -> tuple[Rows, Hidden]:
    rows, origin = rows.select(keep)
    return rows, hidden.at[origin].get(mode="fill", fill_value=0)
