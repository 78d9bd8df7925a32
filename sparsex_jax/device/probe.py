"""The probe: the new tokens run once over pasted KV, and what the last of them focus on is noted. No logits are wanted.

It is a prefill of the fresh tokens alone, and ends behind the layers that are looked at. All that it writes is theirs,
and is thrown away with their pages.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Bool, Int

from sparsex_jax.device.compilation import WITH_STORE
from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.forward_pass import ForwardPass, Mass
from sparsex_jax.model.layers import add_vote, run_layer
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables

# A head that looks something up has nearly all of its attention there; what many heads glance at vanishes in a power.
FOCUS_POWER = 4


@struct.dataclass
class ProbeState:
    """A probe between two layers: all that changes while it runs, but for the store.

    Attributes:
      layer: the next one to run.
      hidden: the rows' hidden states at its input.
      focus: for each position of each request, the fourth powers of the attention that it got, summed over the rows
        that look, heads and layers so far. NaN for requests of which some row's hidden state is not finite: of
        attention weights that are NaN, kernels may make zeros.
    """

    layer: Int[Array, ""]
    hidden: Hidden
    focus: Mass


_STATIC = ("decoder", "layers", "watched", "chunk")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("store", "state"), compiler_options=WITH_STORE)
def probe(
    params: Params,
    store: AnyStore,
    page_tables: PageTables,
    rows: Rows,
    looking: Bool[Array, "rows"],
    state: ProbeState,
    *,
    decoder: Decoder,
    layers: int,
    watched: int,
    chunk: int,
) -> tuple[AnyStore, ProbeState]:
    """Run the next `layers` layers.

    Args:
      store: donated and updated in place; what is pasted is there already (`align`).
      rows: the fresh tokens of each request.
      looking: those whose attention is noted.
      state: donated.
      layers: a number that is known when this is compiled: the loops then never ask the host whether they are done.
      watched: attention is noted in the last `watched` of these layers.
      chunk: rows that go through a layer at a time; divides the number of rows.
    """
    forward = ForwardPass(params, page_tables, decoder, chunk)
    lookers, origin = rows.select(looking)
    among = state.layer + layers - watched, state.layer + layers

    def run(i: Array, carry: tuple[AnyStore, Array]) -> tuple[AnyStore, Array]:
        return run_layer(forward, state.layer + i, carry[0], rows, carry[1])

    def run_and_watch(i: Array, carry: tuple[AnyStore, Array, Array]) -> tuple[AnyStore, Array, Array]:
        store, before, focus = carry
        store, hidden = run(i, (store, before))
        theirs = before.at[origin].get(mode="fill", fill_value=0)
        number = state.layer + i
        return store, hidden, add_vote(forward, number, among, store, lookers, theirs, focus, FOCUS_POWER)

    store, hidden = lax.fori_loop(0, layers - watched, run, (store, state.hidden))
    store, hidden, focus = lax.fori_loop(layers - watched, layers, run_and_watch, (store, hidden, state.focus))
    focus = jnp.where(_broken(rows, hidden, len(page_tables))[:, None], jnp.nan, focus)
    return store, decoder.ops.replicated(ProbeState(state.layer + layers, hidden, focus))


def _broken(rows: Rows, hidden: Hidden, requests: int) -> Bool[Array, "requests"]:
    """Which requests have a row whose hidden state is not finite."""
    broken = rows.valid & ~jnp.isfinite(hidden).all(axis=-1)
    return jnp.zeros(requests, bool).at[rows.request].max(broken, mode="drop")
