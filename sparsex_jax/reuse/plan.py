"""The plan: what the host tells the jitted steps, as a small pytree of integer arrays.

It is the seam between host and device. Full, sparse and prefix-hit prefills are the same thing to the device:
rows, the phases they take part in, copies to make first, page tables. Shapes depend on the capacity bucket
alone, never on the lengths, so a few compilations serve any mix of requests.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

PADDING_REQUEST = np.iinfo(np.int32).max


@struct.dataclass
class Rows:
    """Tokens being computed, sorted by (request, position), padding at the end.

    Attributes:
      token: token ids.
      position: position in the request; -1 is padding.
      request: line of the plan's page tables; `PADDING_REQUEST` for padding, so that it sorts last.
      index: where the row stands in the plan's own rows, which its masks refer to.
    """

    token: Int[Array, "rows"]
    position: Int[Array, "rows"]
    request: Int[Array, "rows"]
    index: Int[Array, "rows"]

    @property
    def valid(self) -> Bool[Array, "rows"]:
        return self.position >= 0

    @property
    def count(self) -> Int[Array, ""]:
        return self.valid.sum()

    def chunk(self, start: Int[Array, ""] | int, size: int) -> Rows:
        """`size` rows from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), self)

    def select(self, keep: Bool[Array, "rows"]) -> tuple[Rows, Int[Array, "rows"]]:
        """The kept rows moved to the front, in order, and where each came from (past the end for padding)."""
        (origin,) = jnp.nonzero(keep, size=keep.size, fill_value=keep.size)

        def take(x: Array, fill: int) -> Array:
            return x.at[origin].get(mode="fill", fill_value=fill)

        rows = Rows(
            take(self.token, 0), take(self.position, -1), take(self.request, PADDING_REQUEST), take(self.index, 0)
        )
        return rows, origin


def fold_chunks[Carry](rows: Rows, size: int, body: Callable[[Array, Rows, Carry], Carry], carry: Carry) -> Carry:
    """Fold `body(start, chunk, carry)` over the rows, `size` at a time, as far as there are valid ones.

    Args:
      size: divides the number of rows.
    """
    if len(rows.token) == size:
        return body(jnp.int32(0), rows, carry)

    def step(i: Array, carry: Carry) -> Carry:
        return body(i * size, rows.chunk(i * size, size), carry)

    return jax.lax.fori_loop(0, -(-rows.count // size), step, carry)


@struct.dataclass
class Copies:
    """KV to move before the prefill (`align_and_copy`): slots, and by how much the position changes."""

    source: Int[Array, "copies"]
    target: Int[Array, "copies"]  # -1 is padding
    shift: Int[Array, "copies"]


@struct.dataclass
class Choice:
    """How the rows of a phase are chosen among those of the phase before. Rows are the plan's own.

    Attributes:
      forced: rows that are in it whatever their score.
      scores: what the host knows better than the model (the signal `given`); not negative.
      block: number of the row's block, whose candidates share their mean score. Rising.
      group: number of the row's group, which has a budget of its own: a request, or a segment of one. Rising.
      budget: for each group, at most how many more rows the signal adds.
      coverage: for each group, the share of its reused rows' score at which adding stops; infinity is never.
    """

    forced: Bool[Array, "rows"]
    scores: Float[Array, "rows"]
    block: Int[Array, "rows"]
    group: Int[Array, "rows"]
    budget: Int[Array, "groups"]
    coverage: Float[Array, "groups"]


@struct.dataclass
class PrefillPlan:
    """One prefill of up to `requests` requests.

    Attributes:
      rows: the tokens of the first phase.
      page_tables: pages of each request in order.
      fresh: rows whose queries are the Sparse-Q.
      first_layer: layer at which each phase begins, and the number of layers at the end.
      choices: for each phase after the first, how its rows are chosen.
    """

    rows: Rows
    page_tables: Int[Array, "requests max_pages"]
    fresh: Bool[Array, "rows"]
    first_layer: Int[Array, "bounds"]
    choices: tuple[Choice, ...]
