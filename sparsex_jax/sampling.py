"""Choosing the next token on the device. Every request has its own random stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32


@struct.dataclass
class Sampling:
    """`SamplingParams` of each request, as arrays."""

    temperature: Float[Array, "requests"]
    top_p: Float[Array, "requests"]
    top_k: Int[Array, "requests"]  # 0 keeps all
    seed: UInt32[Array, "requests"]


def sample(
    logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[Array, "requests"]
) -> Int[Array, "requests"]:
    """The next token of each request; the most probable one where its temperature is 0.

    The random number depends on the request's seed and the position alone, so a batch-mate changes nothing.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def drawn() -> Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
        kept = jnp.where(_kept(scaled, sampling), scaled, -jnp.inf)
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(sampling.seed, position)
        return jnp.where(sampling.temperature > 0, jax.vmap(jax.random.categorical)(keys, kept), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy).astype(jnp.int32)


def _kept(logits: Float[Array, "requests vocab"], sampling: Sampling) -> Bool[Array, "requests vocab"]:
    """Tokens within the request's top k, and within the nucleus of mass top_p (the most probable always).

    Tokens as probable as the last one kept are kept too: one sort of the values then is enough.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    rank = jnp.arange(logits.shape[-1])
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    within = (rank < top_k[:, None]) & ((before < sampling.top_p[:, None]) | (rank == 0))
    return logits >= jnp.min(ranked, axis=-1, where=within, initial=jnp.inf, keepdims=True)
