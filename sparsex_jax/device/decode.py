"""Decode: the next tokens of a batch of requests.

`decode` computes several in one dispatch, stopping early where all are done. Where the host says which tokens may come
next, `forward` and `choose` are dispatched by turns, so that it can say so while the forward pass runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

from sparsex_jax.device.compilation import SUMS_IN_GRAPHS, WITH_STORE
from sparsex_jax.device.sampling import Sampled, Sampling, nothing_sampled, sample_step
from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.forward_pass import ForwardPass
from sparsex_jax.model.layers import all_layers
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.adapters import NO_SLOT
from sparsex_jax.reuse.plan import PADDING_REQUEST, Anywhere, Rows

# Tokens that one program makes of each request where it cannot stop early. With one, what the host does for a program
# would show between steps of 5 ms.
_STEPS_TOGETHER = 2
# Sums of more requests over several GPUs are quicker by XLA's own kernel, which cannot be in CUDA graphs. Of two H200s
# with an 8B model, a step of one request takes 4.18 ms in graphs and 4.28 by that kernel; of 32, 8.60 and 8.46. With
# mailboxes few sums are left, and nothing was measured anew.
_FEW_REQUESTS = 8


def steps_together(most: int, *, host_steers: bool) -> int:
    """Tokens of each request that one program makes. Where it asks nothing, it cannot stop early, and makes few.

    Args:
      most: of a dispatch.
    """
    return min(_STEPS_TOGETHER, most) if host_steers else most


@struct.dataclass
class DecodeState:
    """Requests being decoded.

    Attributes:
      token: the last token of each, whose KV is not in the store yet.
      position: its position; -1 where the request is done or the line unused.
      remaining: how many tokens it may still generate.
      stops: tokens that end it, padded with -1.
      sampling: how its tokens are chosen, and what the answer holds so far where that matters.
      adapter: the slot of the adapter that acts on its new tokens; -1: none. None: the engine has no adapters.
    """

    token: Int[Anywhere, "requests"]
    position: Int[Anywhere, "requests"]
    remaining: Int[Anywhere, "requests"]
    stops: Int[Anywhere, "requests stops"]
    page_tables: Int[Anywhere, "requests max_pages"]
    sampling: Sampling
    adapter: Int[Anywhere, "requests"] | None = None


def _decode(
    params: Params,
    store: AnyStore,
    state: DecodeState,
    limit: Int[Array, ""] | int | None = None,
    *,
    decoder: Decoder,
    steps: int,
    stops_early: bool = True,
) -> tuple[AnyStore, DecodeState, Sampled]:
    """Generate up to `steps` tokens for each request.

    Args:
      limit: how many this time, if fewer. It is data: any number runs the same program.
      stops_early: whether no step runs behind the limit, nor once all requests are done. Before each step of such a
        loop a GPU asks the host whether to go on, and the call returns only behind the last answer. Otherwise all
        `steps` run, the superfluous ones on no request.

    Returns:
      The store, the state after, and what was sampled, `[requests, steps]`: -1 where a request was done already,
      `sampling.NON_FINITE` where it failed, which ends it.
    """

    def body(carry: tuple[Array, AnyStore, DecodeState, Sampled]) -> tuple[Array, AnyStore, DecodeState, Sampled]:
        step, store, state, out = carry
        store, scores = _forward(params, store, state, decoder=decoder)
        state, new = choose(scores, state)
        out = jax.tree.map(lambda all_steps, one: lax.dynamic_update_slice_in_dim(all_steps, one, step, 1), out, new)
        return step + 1, store, state, out

    def running(carry: tuple[Array, AnyStore, DecodeState, Sampled]) -> Array:
        return (carry[0] < last) & jnp.any(carry[2].position >= 0)

    def always(step: Array, carry: tuple[Array, AnyStore, DecodeState, Sampled]) -> Any:
        counter, store, before, out = carry
        counter, store, after, out = body((counter, store, _running_if(step < last, before), out))
        return counter, store, _first_if(step < last, after, before), out

    last = steps if limit is None else jnp.minimum(limit, steps)
    out = nothing_sampled(state.sampling, steps, decoder.config.vocab_size)
    carry = (jnp.int32(0), store, state, out)
    _, store, state, out = (
        lax.while_loop(running, body, carry) if stops_early else lax.fori_loop(0, steps, always, carry)
    )
    return store, state, out


_static: Any = {"static_argnames": ("decoder", "steps", "stops_early"), "donate_argnames": "store"}
decode = jax.jit(_decode, **_static, compiler_options=WITH_STORE)
decode_in_graphs = jax.jit(_decode, **_static, compiler_options=WITH_STORE | SUMS_IN_GRAPHS)


def is_for_graphs(decoder: Decoder, requests: int) -> bool:
    """Whether `decode_in_graphs` is quicker than `decode`."""
    return decoder.ops.hides_sums and requests <= _FEW_REQUESTS


def _running_if(goes_on: Array, state: DecodeState) -> DecodeState:
    """The state, or one in which no request runs."""
    return dataclasses.replace(state, position=jnp.where(goes_on, state.position, -1))


def _first_if(goes_on: Array, after: DecodeState, before: DecodeState) -> DecodeState:
    """The state after a step, or that before it where no request ran, or not this one: it counted no token.

    Args:
      goes_on: bool, `[]` or `[requests]`.
    """
    names = ("token", "position", "remaining")
    chosen: dict[str, Any] = {name: jnp.where(goes_on, getattr(after, name), getattr(before, name)) for name in names}
    return dataclasses.replace(after, **chosen)


@jax.jit
def choose(
    scores: Float[Array, "requests vocab"],
    state: DecodeState,
    allowed: UInt32[Anywhere, "requests words"] | None = None,
) -> tuple[DecodeState, Sampled]:
    """Sample from what `forward` gave.

    Args:
      allowed: as in `Sampling`.

    Returns:
      The state after, and what was sampled, `[requests, 1]`, as `decode` has it.
    """
    sampled = sample_step(scores, dataclasses.replace(state.sampling, allowed=allowed), state.position + 1)
    token = jnp.where(state.position >= 0, sampled.token[:, 0], -1)
    return advance(state, token), dataclasses.replace(sampled, token=token[:, None])


def behind_prefill(state: DecodeState, first: Int[Array, "lines 1"], line: Int[Anywhere, "requests"]) -> DecodeState:
    """The state once those requests have their first tokens that a prefill gives them.

    Args:
      first: what was sampled behind the prefill.
      line: where each request's token is in it; -1: its last token is in the state.
    """
    gets = jnp.asarray(line) >= 0
    return _first_if(gets, advance(state, jnp.where(gets, first[line, 0], -1)), state)


def advance(state: DecodeState, token: Int[Array, "requests"]) -> DecodeState:
    """The state after each running request has got `token`."""
    running, remaining = state.position >= 0, state.remaining - 1
    ended = (remaining <= 0) | (token < 0) | jnp.any(token[:, None] == state.stops, axis=1)
    return dataclasses.replace(
        state,
        token=token,
        position=jnp.where(running & ~ended, state.position + 1, -1),
        remaining=remaining,
        sampling=state.sampling.count(token, running),
    )


def _forward(
    params: Params, store: AnyStore, state: DecodeState, *, decoder: Decoder
) -> tuple[AnyStore, Float[Array, "requests vocab"]]:
    """The last token of each request through all layers: what follows it, as logits in float32."""
    lines, more = len(state.token), -len(state.token) % decoder.ops.row_multiple
    token, position, tables = (
        jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        for x, fill in ((state.token, 0), (state.position, -1), (state.page_tables, 0))
    )
    index = jnp.arange(lines + more)
    request = jnp.where(position >= 0, index, PADDING_REQUEST)
    adapter = None if state.adapter is None else jnp.pad(state.adapter, (0, more), constant_values=NO_SLOT)
    rows = Rows(token=token, position=position, request=request, index=index, adapter=adapter)

    about = ForwardPass(params, tables, decoder, chunk=len(token))
    hidden = decoder.ops.replicated(model.embed(params, decoder.config, rows.token))
    store, hidden = all_layers(about, store, rows, hidden)
    return store, model.logits(params, decoder.config, hidden[:lines])


forward = jax.jit(_forward, static_argnames="decoder", donate_argnames="store", compiler_options=WITH_STORE)
