"""The probe: the new tokens run once over pasted KV, and what they focus on is noted. Its logits are not wanted.

It is a prefill of the fresh tokens alone in which every layer is looked at. All that it writes is theirs, and is thrown
away with their pages.
"""

from __future__ import annotations

import functools

import jax
from flax import struct
from jax import Array, lax
from jaxtyping import Int

from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.layers import ForwardPass, Mass, add_key_mass, run_layer
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables, Store

# A head that looks something up has nearly all of its attention there; what many heads glance at vanishes in a power.
FOCUS_POWER = 4


@struct.dataclass
class ProbeState:
    """A probe between two layers: all that changes while it runs, but for the store.

    Attributes:
      layer: the next one to run.
      hidden: the rows' hidden states at its input.
      focus: for each position of each request, the fourth powers of the attention that it got, summed over the rows,
        heads and layers so far.
    """

    layer: Int[Array, ""]
    hidden: Hidden
    focus: Mass


@functools.partial(jax.jit, static_argnames=("decoder", "layers", "chunk"), donate_argnames=("store", "state"))
def probe(
    params: Params,
    store: Store,
    page_tables: PageTables,
    rows: Rows,
    state: ProbeState,
    *,
    decoder: Decoder,
    layers: int,
    chunk: int,
) -> tuple[Store, ProbeState]:
    """Run the next `layers` layers.

    Args:
      store: donated and updated in place; what is pasted is there already (`align`).
      rows: the fresh tokens of each request.
      state: donated.
      layers: a number that is known when this is compiled: the loop then never asks the host whether it is done.
      chunk: rows that go through a layer at a time; divides the number of rows.
    """
    forward = ForwardPass(params, page_tables, decoder, chunk)

    def layer_step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        store, before, focus = carry
        layer = state.layer + i
        store, hidden = run_layer(forward, layer, store, rows, before)
        return store, hidden, add_key_mass(forward, layer, store, rows, before, focus, FOCUS_POWER)

    store, hidden, focus = lax.fori_loop(0, layers, layer_step, (store, state.hidden, state.focus))
    return store, decoder.ops.replicated(ProbeState(state.layer + layers, hidden, focus))
