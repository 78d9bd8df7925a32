"""The plan: what the host tells the jitted steps, as a small pytree of integer arrays.

It is the seam between host and device, and the host makes it of NumPy arrays. Full, sparse and prefix-hit prefills are
the same thing to the device: rows, the layers at which some of them stop, copies to make first, page tables. Shapes
depend on the row bucket alone, never on the lengths or the method, so one compiled program a bucket serves any mix of
requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from sparsex_jax.reuse.adapters import NO_SLOT
from sparsex_kernels.arguments import Patch

PADDING_REQUEST = np.iinfo(np.int32).max
ROW_MULTIPLES = {"gpu": 8}  # that rows of a decode step are padded to, by platform; on others, they are not

# The host makes plans of NumPy arrays. On their way to the devices (`device.packed`) they become arrays there, which is
# what all code that computes with them sees.
if TYPE_CHECKING:
    type Anywhere = Array
else:
    Anywhere = Array | np.ndarray


@struct.dataclass
class Rows:
    """Tokens being computed, sorted by (request, position), padding at the end.

    Attributes:
      token: token ids.
      position: position in the request; -1 is padding.
      request: line of the plan's page tables; `PADDING_REQUEST` for padding, so that it sorts last.
      index: where the row stands in the plan's own rows, which its masks refer to.
      adapter: the slot of the adapter that acts on the row; -1: none. None: the engine has no adapters.
      unseen: whether K and V of the row are in the store, and it runs only for what its adapter adds to values: that
        alone is written. None: no row does.
    """

    token: Int[Anywhere, "rows"]
    position: Int[Anywhere, "rows"]
    request: Int[Anywhere, "rows"]
    index: Int[Anywhere, "rows"]
    adapter: Int[Anywhere, "rows"] | None = None
    unseen: Bool[Anywhere, "rows"] | None = None

    @property
    def valid(self) -> Bool[Array, "rows"]:
        return self.position >= 0

    @property
    def written(self) -> Int[Array, "rows"]:
        """The positions of those rows whose K and V are written; -1 for the others."""
        return self.position if self.unseen is None else jnp.where(self.unseen, -1, self.position)

    @property
    def count(self) -> Int[Array, ""]:
        """Rows up to the last that is no padding. In a decode step sequences end anywhere, so some of these may be."""
        return jnp.max(jnp.where(self.valid, jnp.arange(1, len(self.position) + 1), 0))

    def chunk(self, start: Int[Array, ""] | int, size: int) -> Rows:
        """`size` rows from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), self)

    def select(self, keep: Bool[Array, "rows"]) -> tuple[Rows, Int[Array, "rows"]]:
        """The kept rows moved to the front, in order, and where each came from (past the end for padding)."""
        (origin,) = jnp.nonzero(keep, size=keep.size, fill_value=keep.size)

        def take(x: Array, fill: int) -> Array:
            return x.at[origin].get(mode="fill", fill_value=fill)

        rows = Rows(
            take(self.token, 0),
            take(self.position, -1),
            take(self.request, PADDING_REQUEST),
            take(self.index, 0),
            None if self.adapter is None else take(self.adapter, NO_SLOT),
            None if self.unseen is None else take(self.unseen, False),
        )
        return rows, origin


def fold_chunks[Carry](
    rows: Rows, size: int, body: Callable[[Array, Rows, Carry], Carry], carry: Carry, *, every: bool = False
) -> Carry:
    """Fold `body(start, chunk, carry)` over the rows, `size` at a time, up to the last chunk that has a valid row.

    Args:
      size: divides the number of rows.
      every: chunks of padding, too.
    """
    if len(rows.token) == size:
        return body(jnp.int32(0), rows, carry)

    def step(i: Array, carry: Carry) -> Carry:
        return body(i * size, rows.chunk(i * size, size), carry)

    return jax.lax.fori_loop(0, len(rows.token) // size if every else -(-rows.count // size), step, carry)


@struct.dataclass
class Copies:
    """KV to move before the prefill (`align_and_copy`): slots, and by how much the position changes.

    Attributes:
      target: -1 is padding.
      patch: rows of first layers that come from elsewhere. None: there are none, and the program knows of none.
    """

    source: Int[Anywhere, "copies"]
    target: Int[Anywhere, "copies"]
    shift: Int[Anywhere, "copies"]
    patch: Patch | None = None


@struct.dataclass
class PackedRows:
    """Rows to move as they are (`pack_rows`): layers [0, depth) of `source` to `target`, from `layer` on.

    Attributes:
      target: -1 is padding.
    """

    source: Int[Anywhere, "rows"]
    target: Int[Anywhere, "rows"]
    layer: Int[Anywhere, "rows"]
    depth: Int[Anywhere, "rows"]


@struct.dataclass
class Budget:
    """How many rows of each request a signal chooses: those of highest score.

    Attributes:
      least: how many rows are chosen in any case.
      coverage: more are chosen until the chosen rows hold this share of all candidates' scores. 0: none are. Where all
        scores are 0, nothing holds a share of them.
      most: how many rows are chosen at most.
    """

    least: Int[Anywhere, "*boundaries requests"]
    coverage: Float[Anywhere, "*boundaries requests"]
    most: Int[Anywhere, "*boundaries requests"]


@struct.dataclass
class Boundaries:
    """Where a prefill goes on with fewer rows, and which ones: a line for each of `schedule.MAX_BOUNDARIES`.

    Attributes:
      layer: the boundary stands before this layer; -1 in a line that is not used.
      signal: number of the signal that scores the rows, in the order of the signals that the program was compiled
        with; -1 where the forced rows are all that go on.
      forced: rows that go on whatever their score. Rows are the plan's own.
      budget: how many more rows go on, by their scores; its arrays have a line for each boundary.
      probe_layers: how many layers the signal's own pass runs, for signals that have one.
    """

    layer: Int[Anywhere, "boundaries"]
    signal: Int[Anywhere, "boundaries"]
    forced: Bool[Anywhere, "boundaries rows"]
    budget: Budget
    probe_layers: Int[Anywhere, "boundaries"]


@struct.dataclass
class PrefillPlan:
    """One prefill of up to `requests` requests: all that stays the same while it runs.

    Attributes:
      page_tables: pages of each request in order.
      fresh: rows whose queries are the Sparse-Q.
      scores: what the host knows better than the model (the signal `given`); not negative.
      block: number of the row's block, rising within a request. Rows of a block that are candidates share their mean
        score, and go on or stay behind together.
      boundaries: where rows narrow.
    """

    page_tables: Int[Anywhere, "requests max_pages"]
    fresh: Bool[Anywhere, "rows"]
    scores: Float[Anywhere, "rows"]
    block: Int[Anywhere, "rows"]
    boundaries: Boundaries


@struct.dataclass
class PrefillState:
    """A prefill between two layers: all that changes while it runs, but for the store.

    Attributes:
      layer: the next one to run.
      rows: the tokens that are computed now; at layer 0 the plan's own rows.
      hidden: their hidden states at the input of `layer`.
      active: which of the plan's rows went on at each boundary that was passed.
      covered: of the scores of each request's reused rows at each of these boundaries, the share of those that went on.
        NaN where no signal looked, or where it saw nothing.
    """

    layer: Int[Array, ""]
    rows: Rows
    hidden: Float[Array, "rows hidden"]
    active: Bool[Array, "boundaries rows"]
    covered: Float[Array, "boundaries requests"]
