"""An online softmax over blocks of keys (FlashAttention-2, algorithm 1) in plain JAX."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class Softmax(NamedTuple):
    """What the blocks so far came to, for each row."""

    acc: Float[Array, "*rows head_dim"]  # weighted sum of values, float32
    top: Float[Array, "*rows"]  # largest score
    total: Float[Array, "*rows"]  # sum of `exp(score - top)`

    def result(self) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
        """The output and the log-sum-exp; 0 and -inf for rows that saw no key."""
        out = self.acc / jnp.maximum(self.total, jnp.finfo(jnp.float32).tiny)[..., None]
        return out, self.top + jnp.log(self.total)


def no_keys(query: Float[Array, "*rows head_dim"], more: int = 0) -> Softmax:
    """The softmax of rows that have seen no key yet, over values of the queries' width and some `more` columns."""
    *rows, head_dim = query.shape
    return Softmax(jnp.zeros((*rows, head_dim + more), jnp.float32), jnp.full(rows, -jnp.inf), jnp.zeros(rows))


def add_block(
    state: Softmax, scores: Float[Array, "*heads rows keys"], values: Float[Array, "*heads keys head_dim"]
) -> Softmax:
    """Add a block of keys.

    Args:
      state: of rows `[*heads, rows]`.
      scores: -inf where a row does not see a key.
      values: finite where some row sees the key.
    """
    acc, top, total = state
    most = scores.max(-1)
    new_top = jnp.maximum(top, most)
    finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0)  # rows that have seen no key yet
    weights = jnp.exp(scores - finite_top[..., None])
    decay = jnp.exp(top - finite_top)
    update = jnp.einsum("...rk,...kd->...rd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # Rows that see no key of the block must not get its 0 * NaN: another request's NaN stays with that request.
    update = jnp.where((most == -jnp.inf)[..., None], 0, update)
    return Softmax(acc * decay[..., None] + update, new_top, total * decay + weights.sum(-1))
