"""What the next tokens of requests can be where an answer has a structure, as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int, UInt32

from sparsex_jax.text.matcher import Matcher

MOST_FORCED = 16  # tokens of a request whose draw is left out, in one dispatch


@struct.dataclass
class Constraint:
    """For each request, tokens that are forced, and behind them one that is drawn among those allowed. What is drawn
    after that is free, and the host takes of it what the request's structure allows.

    Attributes:
      start: the position of the first forced token.
      forced: the forced tokens; -1 where there are no more.
      masked: the position of the token that is drawn among those allowed; -1 if that comes in a later dispatch, or the
        request has no structure, or is in a part of the answer that stands before it.
      allowed: which tokens those are: 32 in a word, the lowest bit first.
    """

    start: Int[Array | np.ndarray, "requests"]
    forced: Int[Array | np.ndarray, "requests most"]
    masked: Int[Array | np.ndarray, "requests"]
    allowed: UInt32[Array | np.ndarray, "requests words"]

    def apply(
        self, logits: Float[Array, "requests vocab"], position: Int[Array, "requests"]
    ) -> Float[Array, "requests vocab"]:
        """The logits, with minus infinity for tokens that are not allowed at this position."""
        bits = (self.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] > 0
        return jnp.where(allowed | (position != self.masked)[:, None], logits, -jnp.inf)

    def force(self, token: Int[Array, "requests"], position: Int[Array, "requests"]) -> Int[Array, "requests"]:
        """The forced tokens of this position, and `token` where none is."""
        number, most = position - self.start, self.forced.shape[1]
        forced = jnp.take_along_axis(self.forced, jnp.clip(number, 0, most - 1)[:, None], axis=1)[:, 0]
        return jnp.where((number >= 0) & (number < most) & (forced >= 0), forced, token)


def constraint_arrays(
    matchers: Sequence[Matcher | None], starts: Sequence[int], size: int, vocab_size: int
) -> Constraint:
    """The constraint of a batch of `size` slots, in NumPy arrays.

    Args:
      matchers: of the requests in the first slots; None: nothing is asked of the answer.
      starts: the positions of their next tokens.

    Raises:
      StructureError: a grammar got too complex.
    """
    start, masked = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    forced = np.full((size, MOST_FORCED), -1, np.int32)
    allowed = np.zeros((size, -(-vocab_size // 32)), np.uint32)
    for slot, (matcher, first) in enumerate(zip(matchers, starts, strict=True)):
        if matcher is None:
            continue
        start[slot], number = first, len(matcher.forced)
        forced[slot, : min(number, MOST_FORCED)] = list(matcher.forced)[:MOST_FORCED]
        if number < MOST_FORCED and matcher.masks:
            masked[slot], allowed[slot] = first + number, matcher.allowed()
    return Constraint(start, forced, masked, allowed)
