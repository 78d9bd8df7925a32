"""Rows through one layer, a chunk at a time: what the prefill does at every layer, and a signal that looks ahead."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from sparsex_jax.model.decoder import Hidden, OneLayer, Stream, chained_layer, decoder_layer, queries, stream_of
from sparsex_jax.model.forward_pass import ForwardPass, Mass
from sparsex_jax.model.halves import Halves, layer_of_halves
from sparsex_jax.model.hoisting import hoisted
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.turns import STAGES, HiddenSums, WholeLayers
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables, Power


def run_layers(
    forward: ForwardPass,
    first: Int[Array, ""],
    end: Int[Array, ""],
    store: AnyStore,
    rows: Rows,
    hidden: Hidden,
) -> tuple[AnyStore, Hidden]:
    """The layers from `first` up to `end` for these rows: a loop whose bounds are data."""
    ops, chunks = forward.decoder.ops, len(rows.token) // forward.chunk
    if ops.host_steers and chunks > 1:
        about = forward, rows, first, end, -(-rows.count // forward.chunk)
        whole, hidden_sums = WholeLayers(*about), HiddenSums(*about)
        if not ops.hides_sums or chunks < STAGES:
            return whole.run(store, hidden)
        return lax.cond(whole.chunks < STAGES, whole.run, hidden_sums.run, store, hidden)
    run = _layer_of(rows, forward, store, hidden)
    return lax.fori_loop(first, end, lambda layer, carry: run(forward.params, layer, *carry), (store, hidden))


def all_layers(
    forward: ForwardPass, store: AnyStore, rows: Rows, hidden: Hidden, first: Int[Array, ""] | None = None
) -> tuple[AnyStore, Hidden]:
    """All layers for rows of one chunk: a decode step's, or a prefill's. They ask a GPU's host nothing.

    Between two turns of a loop a GPU pauses for 5 us, where a layer of an 8B model takes 100 in decode. Without a loop,
    the layers' numbers are known as the program is compiled, and no launch computes them.

    Args:
      first: only the layers from this one on, in a loop, which asks before each. None: all.
    """
    if forward.decoder.ops.hides_sums and len(rows.token) > forward.decoder.ops.exchanged_rows:
        return _all_layers_of_halves(forward, store, rows, hidden, first)

    def any_layer(
        of_rows: tuple[Rows, PageTables], params: Params, layer: Array, store: AnyStore, stream: Stream
    ) -> tuple[AnyStore, Stream]:
        return chained_layer(OneLayer.of(forward.decoder, params, layer), store, stream, *of_rows)

    carry = store, stream_of(forward.layer(_number(first)), hidden)
    store, stream = _fold_layers(forward, any_layer, (rows, forward.page_tables), carry, first)
    return store, stream.hidden


def _all_layers_of_halves(
    forward: ForwardPass, store: AnyStore, rows: Rows, hidden: Hidden, first: Int[Array, ""] | None
) -> tuple[AnyStore, Hidden]:
    """The same on a mesh, where the sums of one half of the rows run beside the products of the other."""
    half = len(rows.token) // 2
    halves = rows.chunk(0, half), rows.chunk(half, half)

    def any_layer(
        of_rows: tuple[tuple[Rows, Rows], PageTables], params: Params, layer: Array, store: AnyStore, streams: Halves
    ) -> tuple[AnyStore, Halves]:
        return layer_of_halves(OneLayer.of(forward.decoder, params, layer), store, streams, *of_rows)

    carry = store, Halves.of(forward.layer(_number(first)), hidden[:half], hidden[half:])
    store, streams = _fold_layers(forward, any_layer, (halves, forward.page_tables), carry, first)
    return store, streams.hidden(forward.layer(jnp.int32(forward.decoder.config.num_layers - 1)))


def _number(first: Int[Array, ""] | None) -> Int[Array, ""]:
    return jnp.int32(0) if first is None else first


def _fold_layers(
    forward: ForwardPass,
    any_layer: Callable[..., tuple[AnyStore, Any]],
    of_rows: Any,
    carry: tuple[AnyStore, Any],
    first: Int[Array, ""] | None,
) -> tuple[AnyStore, Any]:
    """Fold `any_layer(of_rows, params, layer, *carry)` over layers. What it makes of the rows alone is made once."""
    layer_of_rows = hoisted(any_layer, of_rows, forward.params, jnp.int32(0), *carry)

    def run_layer(layer: Array, carry: tuple[AnyStore, Any]) -> tuple[AnyStore, Any]:
        return layer_of_rows(forward.params, layer, *carry)

    layers = forward.decoder.config.num_layers
    if first is not None:
        return lax.fori_loop(first, layers, run_layer, carry)
    unroll = layers if forward.decoder.ops.pays_for_launches else 1
    return lax.fori_loop(0, layers, run_layer, carry, unroll=unroll)


def _layer_of(
    rows: Rows, forward: ForwardPass, store: AnyStore, hidden: Hidden
) -> Callable[[Params, Array, AnyStore, Hidden], tuple[AnyStore, Hidden]]:
    """`run_layer` for these rows. Of one chunk on a GPU, what it makes of them alone is made now, once for all layers:
    that is half of a layer's launches."""

    def any_layer(
        of_rows: tuple[Rows, PageTables], params: Params, number: Array, store: AnyStore, hidden: Hidden
    ) -> tuple[AnyStore, Hidden]:
        rows, tables = of_rows
        return run_layer(dataclasses.replace(forward, params=params, page_tables=tables), number, store, rows, hidden)

    of_rows = rows, forward.page_tables
    if len(rows.token) == forward.chunk and forward.decoder.ops.pays_for_launches:
        return hoisted(any_layer, of_rows, forward.params, jnp.int32(0), store, hidden)
    return functools.partial(any_layer, of_rows)


@jax.jit
def run_layer(
    forward: ForwardPass, number: Int[Array, ""], store: AnyStore, rows: Rows, hidden: Hidden
) -> tuple[AnyStore, Hidden]:
    """One layer for these rows.

    A chunk's K and V are written before it attends: sorted by position, each row finds every earlier row's K and V of
    the same layer in the store.
    """
    layer = forward.layer(number)

    def run_chunk(start: Array, part: Rows, carry: tuple[AnyStore, Array]) -> tuple[AnyStore, Array]:
        store, hidden = carry
        x = lax.dynamic_slice_in_dim(hidden, start, len(part.token))
        store, x = decoder_layer(layer, store, x, part, forward.page_tables)
        return store, lax.dynamic_update_slice_in_dim(hidden, x, start, 0)

    return forward.fold_chunks(rows, run_chunk, (store, hidden))


def _once_a_program[**Arguments, Result](function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of its own in each program, of which the argument named `power` is static if it is a number."""
    of_fixed_power, of_any_power = jax.jit(function, static_argnames="power"), jax.jit(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        is_fixed = isinstance(options.get("power", 1), int)
        return (of_fixed_power if is_fixed else of_any_power)(*args, **options)

    return call


@_once_a_program
def add_key_mass(
    forward: ForwardPass,
    number: Int[Array, ""],
    store: AnyStore,
    rows: Rows,
    hidden: Hidden,
    mass: Mass,
    *,
    power: Power = 1,
) -> Mass:
    """Add the attention that each key of a layer receives from these rows, summed over heads and rows.

    `s_j = sum over heads h and rows i of softmax(q_i K^T / sqrt(d))_j ** power` over the keys that row i sees in the
    layer's window (SparseX, arXiv 2606.01751, Sparse-Q selection, where the power is 1).

    Args:
      hidden: of the rows, at the layer's input.
      power: a number is static. As data, a power of two.
    """

    def add(start: Array, part: Rows, mass: Array) -> Array:
        x = lax.dynamic_slice_in_dim(hidden, start, len(part.token))
        layer = forward.layer(number)
        about = number, part, forward.page_tables, power, layer.window
        return mass + forward.decoder.ops.key_mass(queries(layer, x, part), store, *about)

    return forward.fold_chunks(rows, add, mass)


def add_vote(
    forward: ForwardPass,
    number: Int[Array, ""],
    among: tuple[Int[Array, ""], Int[Array, ""]],
    store: AnyStore,
    rows: Rows,
    hidden: Hidden,
    mass: Mass,
    power: Power = 1,
) -> Mass:
    """`add_key_mass` of one of several layers, from the first of `among` up to the second, whose masses are summed.

    Where some of them have windows, those are passed over: they look at what is near, whatever is asked.
    """
    windows = forward.decoder.config.windows
    sees_all = np.array([window is None for window in windows])
    if sees_all.all() or not sees_all.any():
        return add_key_mass(forward, number, store, rows, hidden, mass, power=power)
    first, end = among
    numbers = np.arange(len(windows))
    some = jnp.any(sees_all & (numbers >= first) & (numbers < end))

    def add(mass: Array) -> Array:
        return add_key_mass(forward, number, store, rows, hidden, mass, power=power)

    return lax.cond(jnp.asarray(sees_all)[number] | ~some, add, lambda mass: mass, mass)
