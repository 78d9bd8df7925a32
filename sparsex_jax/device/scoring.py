"""Log-probabilities of a prompt's own tokens, from the hidden states that its prefill ends with.

A row's hidden state says how probable each token is in the place behind it. So row p scores token p + 1, and logits of
a few rows at a time are in memory: never those of the whole prompt.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from sparsex_jax.model.decoder import Decoder, logits
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import PrefillState, Rows, fold_chunks

ROWS_TOGETHER = 128  # their logits are 78 MB for a vocabulary of 152,000


@struct.dataclass
class Scores:
    """What each row of a plan says of the token behind it, on the device or as NumPy arrays.

    Attributes:
      chosen: the natural log-probability of that token, float32. NaN where none is asked for, or the row was dropped.
      rank: how many tokens are more probable, and 1. 0 where there is no log-probability.
      top: the log-probabilities of the most probable tokens, in descending order.
      top_ids: the ids of those tokens.
    """

    chosen: Float[Array | np.ndarray, "rows"]
    rank: Int[Array | np.ndarray, "rows"]
    top: Float[Array | np.ndarray, "rows number"]
    top_ids: Int[Array | np.ndarray, "rows number"]

    def of_rows(self, rows: slice | Bool[np.ndarray, "rows"]) -> Scores:
        """Those of some rows."""
        return jax.tree.map(lambda each: each[rows], self)


@functools.partial(jax.jit, static_argnames=("decoder", "number"))
def score(
    params: Params, state: PrefillState, following: Int[Array, "rows"], *, decoder: Decoder, number: int
) -> Scores:
    """Score the tokens behind rows.

    Args:
      state: of a prefill whose layers have all run.
      following: of each of the plan's own rows, the token that is to be scored; -1: none.
      number: how many of the most probable tokens are given.

    Returns:
      Scores in the order of the plan's own rows.
    """
    rows, size = state.rows, math.gcd(len(following), ROWS_TOGETHER)
    asked = jnp.where(rows.valid, following[rows.index], -1)

    def score_chunk(start: Array, part: Rows, scores: Scores) -> Scores:
        tokens = lax.dynamic_slice_in_dim(asked, start, size)
        hidden = lax.dynamic_slice_in_dim(state.hidden, start, size)
        return lax.cond(
            jnp.any(tokens >= 0),
            lambda: _put(scores, _scores_of(logits(params, decoder.config, hidden), tokens, number), start),
            lambda: scores,
        )

    scores = fold_chunks(rows, size, score_chunk, _nothing(len(following), number))
    place = jnp.where(rows.valid, rows.index, len(following))
    in_order = jax.tree.map(lambda to, each: to.at[place].set(each, mode="drop"), _nothing(len(place), number), scores)
    return decoder.ops.replicated(in_order)


def _nothing(rows: int, number: int) -> Scores:
    ids = jnp.zeros((rows, number), jnp.int32)
    return Scores(jnp.full(rows, jnp.nan), jnp.zeros(rows, jnp.int32), jnp.zeros(ids.shape), ids)


def _put(scores: Scores, part: Scores, start: Array) -> Scores:
    return jax.tree.map(lambda to, each: lax.dynamic_update_slice_in_dim(to, each, start, 0), scores, part)


def _scores_of(logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows"], number: int) -> Scores:
    """Scores of a few rows."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    top, top_ids = lax.top_k(logprobs, number)
    is_asked = tokens >= 0
    return Scores(jnp.where(is_asked, chosen[:, 0], jnp.nan), jnp.where(is_asked, rank, 0), top, top_ids)
