"""Choosing the next token on the device. Every request has its own random stream."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from sparsex_jax.config import MAX_LOGPROBS

NON_FINITE = -2  # instead of a token: the request's logits have NaN or infinities


@struct.dataclass
class Adjustment:
    """What changes the logits themselves. Carried through decode only where some request asks for it.

    Attributes:
      repetition, presence, frequency: the penalties; 1, 0 and 0 change nothing.
      bias: what is added to the logits first.
      in_prompt: whether a token is in the prompt.
      counts: how often it is in the answer so far.
    """

    repetition: Float[Array, "requests"]
    presence: Float[Array, "requests"]
    frequency: Float[Array, "requests"]
    bias: Float[Array, "requests vocab"]
    in_prompt: Bool[Array, "requests vocab"]
    counts: Int[Array, "requests vocab"]

    def apply(self, logits: Float[Array, "requests vocab"]) -> Float[Array, "requests vocab"]:
        logits = logits + self.bias
        factor = jnp.where(self.in_prompt | (self.counts > 0), self.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / factor, logits * factor)
        return logits - self.frequency[:, None] * self.counts - self.presence[:, None] * (self.counts > 0)

    def count(self, token: Int[Array, "requests"], running: Bool[Array, "requests"]) -> Adjustment:
        """With one more token in the answer of each running request."""
        lines = jnp.arange(len(token))
        return dataclasses.replace(self, counts=self.counts.at[lines, token].add(running & (token >= 0)))


@struct.dataclass
class Sampling:
    """`SamplingParams` of each request, as arrays. A step is compiled for each structure of it: four at most."""

    temperature: Float[Array, "requests"]
    top_p: Float[Array, "requests"]
    top_k: Int[Array, "requests"]  # 0 keeps all
    min_p: Float[Array, "requests"]
    seed: UInt32[Array, "requests"]
    adjustment: Adjustment | None = None  # None: no request asks for any
    logprobs: bool = struct.field(pytree_node=False, default=False)  # whether some request asks for them

    def count(self, token: Int[Array, "requests"], running: Bool[Array, "requests"]) -> Sampling:
        """For the token after this one."""
        if self.adjustment is None:
            return self
        return dataclasses.replace(self, adjustment=self.adjustment.count(token, running))


@struct.dataclass
class Logprobs:
    """Log-probabilities of the chosen tokens and of the most probable ones, best first."""

    chosen: Float[Array | np.ndarray, "*lines"]
    top: Float[Array | np.ndarray, "*lines number"]
    top_ids: Int[Array | np.ndarray, "*lines number"]


@struct.dataclass
class Sampled:
    """Tokens of one or several steps; on the device, or as NumPy arrays.

    Attributes:
      token: -1 where a request was done already, `NON_FINITE` where it failed.
      logprobs: lines are `[requests, steps]`; None where no request asks for them.
    """

    token: Int[Array | np.ndarray, "requests steps"]
    logprobs: Logprobs | None


def nothing_sampled(sampling: Sampling, steps: int, vocab_size: int) -> Sampled:
    """Room for so many steps."""
    shape = (len(sampling.seed), steps)
    token = jnp.full(shape, -1, jnp.int32)
    if not sampling.logprobs:
        return Sampled(token, None)
    top = (*shape, min(MAX_LOGPROBS, vocab_size))
    return Sampled(token, Logprobs(jnp.zeros(shape), jnp.zeros(top), jnp.zeros(top, jnp.int32)))


def sample_step(
    logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[Array, "requests"]
) -> Sampled:
    """`sample` as one step, with log-probabilities of the logits as they came if some request asks for them."""
    token = sample(logits, sampling, position)[:, None]
    if not sampling.logprobs:
        return Sampled(token, None)
    scores = jax.nn.log_softmax(logits, axis=-1)[:, None]
    chosen = jnp.take_along_axis(scores, jnp.maximum(token, 0)[..., None], axis=-1)[..., 0]
    return Sampled(token, Logprobs(chosen, *jax.lax.top_k(scores, min(MAX_LOGPROBS, logits.shape[-1]))))


def sample(
    logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[Array, "requests"]
) -> Int[Array, "requests"]:
    """The next token of each request; the most probable one where its temperature is 0.

    The random number depends on the request's seed and the position alone, so a batch-mate changes nothing. A request
    whose logits are not all finite gets `NON_FINITE`, and the others their tokens.
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if sampling.adjustment is not None:
        logits = sampling.adjustment.apply(logits)
    greedy = jnp.argmax(logits, axis=-1)

    def drawn() -> Array:
        scaled = _filtered(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(sampling.seed, position)
        return jnp.where(sampling.temperature > 0, jax.vmap(jax.random.categorical)(keys, scaled), greedy)

    token = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)
    return jnp.where(finite, token, NON_FINITE).astype(jnp.int32)


def _filtered(logits: Float[Array, "requests vocab"], sampling: Sampling) -> Float[Array, "requests vocab"]:
    """The logits of the tokens that may be drawn, -inf elsewhere. Sorts where some request needs it."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
    ranks = (sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))

    def best() -> Array:
        return jnp.where(_within_rank(logits, sampling), logits, -jnp.inf)

    return jax.lax.cond(jnp.any(ranks), best, lambda: logits)


def _within_rank(logits: Float[Array, "requests vocab"], sampling: Sampling) -> Bool[Array, "requests vocab"]:
    """Tokens within the request's top k, and within the nucleus of mass top_p of those (the most probable always).

    Tokens as probable as the last one kept are kept too: one sort of the values then is enough.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])[:, None]
    probs = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)[:, None]  # rounded sums may reach 1 early
    within = (rank < top_k) & ((before < top_p) | (rank == 0))
    return logits >= jnp.min(ranked, axis=-1, where=within, initial=jnp.inf, keepdims=True)
