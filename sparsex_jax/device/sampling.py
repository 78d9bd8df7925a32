"""Samples the next token of each request on the device. Every request has a random stream of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from sparsex_jax.config import MAX_LOGPROBS
from sparsex_jax.reuse.plan import Anywhere

NON_FINITE = -2  # sampled in place of a token where the request's logits have NaN or infinities


@struct.dataclass
class Adjustment:
    """What changes the logits: penalties, biases, and bans. Decode carries it only if some request asks for it.

    Attributes:
      repetition: the logit of each token in the prompt or the answer is divided by it if positive, else multiplied
        (Keskar et al., CTRL, section 4.1). 1 changes nothing.
      presence: subtracted from the logit of each token in the answer. 0 changes nothing.
      frequency: subtracted from a token's logit for each time it is in the answer. 0 changes nothing.
      bias: added to the logits before the penalties. Minus infinity for tokens that the request does not allow.
      ends: whether each token of the vocabulary ends the answer.
      may_end: the first position of the sequence at which such a token can be drawn.
      in_prompt: whether each token of the vocabulary is in the prompt.
      counts: how often each token of the vocabulary is in the answer so far.
    """

    repetition: Float[Anywhere, "requests"]
    presence: Float[Anywhere, "requests"]
    frequency: Float[Anywhere, "requests"]
    bias: Float[Anywhere, "requests vocab"]
    ends: Bool[Anywhere, "requests vocab"]
    may_end: Int[Anywhere, "requests"]
    in_prompt: Bool[Anywhere, "requests vocab"]
    counts: Int[Anywhere, "requests vocab"]

    def apply(
        self, logits: Float[Array, "requests vocab"], position: Int[Array, "requests"]
    ) -> Float[Array, "requests vocab"]:
        """The logits with bias and penalties, and minus infinity for tokens that cannot be drawn at this position."""
        logits = jnp.where(self.ends & (position < self.may_end)[:, None], -jnp.inf, logits + self.bias)
        factor = jnp.where(self.in_prompt | (self.counts > 0), self.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / factor, logits * factor)
        return logits - self.frequency[:, None] * self.counts - self.presence[:, None] * (self.counts > 0)

    def count(self, token: Int[Array, "requests"], running: Bool[Array, "requests"]) -> Adjustment:
        """The adjustment of the next step, after each running request got `token`. Negative tokens are not counted."""
        lines = jnp.arange(len(token))
        return dataclasses.replace(self, counts=self.counts.at[lines, token].add(running & (token >= 0)))


@struct.dataclass
class Sampling:
    """The `SamplingParams` of each request, as arrays.

    What samples is compiled for a few kinds of batches, so that all can be compiled ahead: with and without
    `adjustment` and `logprobs`, which come together, with and without `allowed`, and by `ranks` where it is decided.

    Attributes:
      temperature: 0 takes the most probable token.
      top_p: the mass of the nucleus, in [0, 1]; 1 keeps all tokens, 0 the most probable one.
      top_k: how many tokens are kept; 0 keeps all.
      min_p: the least probability of a token, as a share of the most probable one's.
      seed: of the request's random stream.
      adjustment: penalties, biases and bans. None if no request has one, or asks for log-probabilities.
      allowed: which tokens the structure of a request allows: 32 in a word, the lowest bit first; all bits are set for
        a request without one. None if no request has one.
      logprobs: whether log-probabilities are computed.
      ranks: whether the tokens of all requests are ranked, for those that ask for the best k or a nucleus; the others
        come out the same. None: each step finds out whether some request asks for that, and whether any draws at all.
    """

    temperature: Float[Anywhere, "requests"]
    top_p: Float[Anywhere, "requests"]
    top_k: Int[Anywhere, "requests"]
    min_p: Float[Anywhere, "requests"]
    seed: UInt32[Anywhere, "requests"]
    adjustment: Adjustment | None = None
    allowed: UInt32[Anywhere, "requests words"] | None = None
    logprobs: bool = struct.field(pytree_node=False, default=False)
    ranks: bool | None = struct.field(pytree_node=False, default=None)

    def decided(self) -> Sampling:
        """The same, of NumPy arrays, with `ranks` decided on the host.

        Requests with an adjustment are ranked always: so there is one kind of batches more, and not two.
        """
        return dataclasses.replace(self, ranks=self.adjustment is not None or bool(np.any(self.asks_for_ranks)))

    @property
    def asks_for_ranks(self) -> Bool[Anywhere, "requests"]:
        """Which requests draw from the best k or from a nucleus."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))

    def count(self, token: Int[Array, "requests"], running: Bool[Array, "requests"]) -> Sampling:
        """The sampling of the next step, after each running request got `token`."""
        if self.adjustment is None:
            return self
        return dataclasses.replace(self, adjustment=self.adjustment.count(token, running))


@struct.dataclass
class Logprobs:
    """Natural log-probabilities of the sampled tokens and of the most probable ones.

    Attributes:
      chosen: of the sampled token.
      top: of the most probable tokens, in descending order; at most MAX_LOGPROBS of them.
      top_ids: the ids of those tokens.
    """

    chosen: Float[Array | np.ndarray, "*lines"]
    top: Float[Array | np.ndarray, "*lines number"]
    top_ids: Int[Array | np.ndarray, "*lines number"]


@struct.dataclass
class Sampled:
    """The tokens of one or several steps, on the device or as NumPy arrays.

    Attributes:
      token: -1 where the request had finished before the step, `NON_FINITE` where its logits were not finite.
      logprobs: the lines of its arrays are `[requests, steps]`. None if no request asks for log-probabilities.
    """

    token: Int[Array | np.ndarray, "requests steps"]
    logprobs: Logprobs | None


def nothing_sampled(sampling: Sampling, steps: int, vocab_size: int) -> Sampled:
    """Arrays to write the tokens of `steps` steps into. Every token is -1."""
    shape = (len(sampling.seed), steps)
    token = jnp.full(shape, -1, jnp.int32)
    if not sampling.logprobs:
        return Sampled(token, None)
    top = (*shape, min(MAX_LOGPROBS, vocab_size))
    return Sampled(token, Logprobs(jnp.zeros(shape), jnp.zeros(top), jnp.zeros(top, jnp.int32)))


def sample_step(
    logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[Array, "requests"]
) -> Sampled:
    """Sample one step. Log-probabilities are those of the logits before penalties, bias and temperature."""
    token = sample(logits, sampling, position)[:, None]
    if not sampling.logprobs:
        return Sampled(token, None)
    scores = jax.nn.log_softmax(logits, axis=-1)[:, None]
    chosen = jnp.take_along_axis(scores, jnp.maximum(token, 0)[..., None], axis=-1)[..., 0]
    return Sampled(token, Logprobs(chosen, *jax.lax.top_k(scores, min(MAX_LOGPROBS, logits.shape[-1]))))


def sample(
    logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[Array, "requests"]
) -> Int[Array, "requests"]:
    """The next token of each request, int32. Where its temperature is 0, this is the most probable one.

    The random number depends on the request's seed and the position alone, so other requests of the batch do not
    change it. A request whose logits are not all finite gets `NON_FINITE`; the other requests get tokens all the same.

    Args:
      position: of the new token in its sequence.
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if sampling.adjustment is not None:
        logits = sampling.adjustment.apply(logits, position)
    if sampling.allowed is not None:
        logits = jnp.where(_unpacked(sampling.allowed, logits.shape[1]), logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1)

    def drawn() -> Array:
        scaled = _filtered(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(sampling.seed, position)
        return jnp.where(sampling.temperature > 0, jax.vmap(jax.random.categorical)(keys, scaled), greedy)

    # On some devices, a GPU among them, the host looks at each condition before the step goes on.
    if sampling.ranks is not None:
        token = drawn()
    else:
        token = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)
    return jnp.where(finite, token, NON_FINITE).astype(jnp.int32)


def _unpacked(words: UInt32[Array | np.ndarray, "requests words"], number: int) -> Bool[Array, "requests number"]:
    bits = (jnp.asarray(words)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :number] > 0


def _filtered(logits: Float[Array, "requests vocab"], sampling: Sampling) -> Float[Array, "requests vocab"]:
    """The logits of the tokens that may be drawn, and -inf for the others. Sorts only if some request needs it, or
    `ranks` says so."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
    logits = jnp.where(logits >= least, logits, -jnp.inf)

    def best() -> Array:
        return jnp.where(_within_rank(logits, sampling), logits, -jnp.inf)

    if sampling.ranks is not None:
        return best() if sampling.ranks else logits
    return jax.lax.cond(jnp.any(sampling.asks_for_ranks), best, lambda: logits)


def _within_rank(logits: Float[Array, "requests vocab"], sampling: Sampling) -> Bool[Array, "requests vocab"]:
    """Whether each token is among the request's top k, and of these in the nucleus of mass top_p.

    The most probable token always is. Tokens as probable as the last one kept are kept too, so that sorting the
    values is enough and no permutation of ids is needed.

        logits of probabilities  0.1  0.4  0.2  0.3     top_k=3, top_p=0.7
        ranked                   0.4  0.3  0.2  0.1
        probs of the top 3       4/9  3/9  2/9  0
        before                   0    4/9  7/9  1
        within                   yes  yes  no   no      7/9 is more than 0.7, and rank 3 is not among the top 3
        the result               no   yes  no   yes     at least 0.3, the least one within
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])[:, None]
    probs = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)[
        :, None
    ]  # because rounded sums may reach 1 before the last token
    within = (rank < top_k) & ((before < top_p) | (rank == 0))
    return logits >= jnp.min(ranked, axis=-1, where=within, initial=jnp.inf, keepdims=True)
