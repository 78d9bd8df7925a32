"""The hybrid prefill: phases over the layers, each on fewer tokens than the one before (DESIGN.md, section 3).

One jitted program runs any schedule with the same signals: where the phases begin, which rows are forced and
how many the signal may choose are data. Within a phase, layers are a loop, and rows go through a layer
`chunk` at a time, so padding to the capacity costs nothing. Rows are sorted by position and a chunk's K and V
are written before it attends, so a row finds every earlier row's K and V of the same layer in the store.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax import model
from sparsex_jax.model import Decoder, Hidden
from sparsex_jax.plan import Copies, PrefillPlan, Rows, fold_chunks
from sparsex_jax.signals import SIGNALS, Boundary
from sparsex_jax.weights import Params
from sparsex_kernels.layout import PageTables, Store


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="store")
def align(store: Store, copies: Copies, *, decoder: Decoder) -> Store:
    """Make the plan's copies: cached KV into the requests' own pages, keys rotated to their new positions."""
    return decoder.ops.align_and_copy(store, copies, model.inv_freq(decoder.config))


@functools.partial(jax.jit, static_argnames=("decoder", "signals", "chunk"), donate_argnames="store")
def prefill(
    params: Params, store: Store, plan: PrefillPlan, *, decoder: Decoder, signals: tuple[str | None, ...], chunk: int
) -> tuple[Store, Float[Array, "requests vocab"], Bool[Array, "later_phases rows"]]:
    """Run the plan's phases and give the logits of each request's last token.

    Args:
      store: donated and updated in place; the plan's copies must have been made (`align`).
      signals: for each phase after the first, the name of what scores the rows (`sparsex_jax.signals`), or
        None where the forced rows are the phase.
      chunk: rows that go through a layer at a time; divides the number of rows.

    Returns:
      The store; float32 logits `[requests, vocab]`, meaningless for unused requests; and which of the plan's
      rows each later phase computed.
    """
    rows, hidden = plan.rows, model.embed(params, plan.rows.token)
    active = []
    for phase, signal in enumerate((None, *signals)):
        if phase > 0:
            boundary = Boundary(decoder, params, plan, plan.first_layer[phase], rows, hidden, chunk)
            store, keep = _choose(boundary, store, signal, plan.forced[phase - 1], plan.budget[phase - 1])
            rows, hidden = _narrow(rows, hidden, keep)
            active.append(jnp.zeros_like(plan.fresh).at[rows.index].max(rows.valid))
        layers = plan.first_layer[phase], plan.first_layer[phase + 1]
        store, hidden = _run_layers(decoder, params, store, rows, hidden, plan.page_tables, layers, chunk)
    last = jnp.searchsorted(rows.request, jnp.arange(len(plan.page_tables)), side="right") - 1
    out = model.logits(params, decoder.config, hidden[last])
    return store, out, jnp.array(active, bool).reshape(len(signals), plan.fresh.size)


def _run_layers(
    decoder: Decoder,
    params: Params,
    store: Store,
    rows: Rows,
    hidden: Hidden,
    tables: PageTables,
    layers: tuple[Int[Array, ""], Int[Array, ""]],
    chunk: int,
) -> tuple[Store, Hidden]:
    """One phase: the layers from `layers[0]` up to `layers[1]`, a loop whose bounds are data."""

    def run_layer(layer: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights = model.layer_weights(params, layer)

        def run_chunk(start: Array, part: Rows, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            store, hidden = carry
            x = lax.dynamic_slice_in_dim(hidden, start, chunk)
            store, x = model.decoder_layer(decoder, weights, layer, store, x, part, tables)
            return store, lax.dynamic_update_slice_in_dim(hidden, x, start, 0)

        return fold_chunks(rows, chunk, run_chunk, carry)

    return lax.fori_loop(*layers, run_layer, (store, hidden))


def _choose(
    boundary: Boundary,
    store: Store,
    signal: str | None,
    forced: Bool[Array, "rows"],
    budget: Int[Array, "requests"],
) -> tuple[Store, Bool[Array, "rows"]]:
    """Which of the boundary's rows go on: the forced ones, and of the others those the signal scores highest."""
    rows = boundary.rows
    forced = forced[rows.index] & rows.valid
    if signal is None:
        return store, forced
    with jax.named_scope(signal):
        store, scores = SIGNALS[signal](boundary, store)
    return store, forced | top_rows(scores, rows.valid & ~forced, rows.request, budget)


def top_rows(
    scores: Float[Array, "rows"],
    candidates: Bool[Array, "rows"],
    request: Int[Array, "rows"],
    budget: Int[Array, "requests"],
) -> Bool[Array, "rows"]:
    """The `budget[r]` candidates of highest score of each request r; the earlier row wins a tie.

    Args:
      request: sorted. A sort by (request, score) stands in for a top-k whose k is data.
    """
    order = jnp.lexsort((jnp.where(candidates, -scores, jnp.inf), request))
    rank = jnp.arange(len(order)) - jnp.searchsorted(request, request, side="left")
    allowed = rank < budget.at[request].get(mode="fill", fill_value=0)
    return jnp.zeros_like(candidates).at[order].set(allowed) & candidates


def _narrow(rows: Rows, hidden: Hidden, keep: Bool[Array, "rows"]) -> tuple[Rows, Hidden]:
    rows, origin = rows.select(keep)
    return rows, hidden.at[origin].get(mode="fill", fill_value=0)
