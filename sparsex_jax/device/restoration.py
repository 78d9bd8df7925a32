"""A stored prefix on its way back into the store: which of its parts are there, and what is to be done next.

A part, or *cell*, is a chunk of tokens in a group of layers. It is loaded from its block in host memory, or computed.
A computed cell takes the chunk's hidden states out of the group before, so a chunk is computed from its first group up
to its *height*, and loaded above. It attends to all chunks before it in the same layers, so these have to be there.

    chunk      0  1  2  3  4  5
    group 3    3  .  .  .  .  .   <- loads come from the back, a chunk's last group first
    group 2    c  3  .  .  .  .
    group 1    c  c  3  .  .  .
    group 0    c  c  c  3  .  .
    height     3  2  1  0  0  0   c: computed, chunk by chunk. 3: what is loaded last, and computed if it is late
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from sparsex_jax.device.link import HostBlock
from sparsex_jax.device.runner import PrefillRun
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase


class Chunk(NamedTuple):
    """Consecutive tokens of a prefix, which lie in one block.

    Attributes:
      start, end: their positions. `start` is a multiple of the page size; so is `end`, but for the last chunk.
      block: where their KV is; a future of it, if something brings it into host memory; None if it is not stored. A
        future that fails, or gives None, is as if it were not stored.
      first_row: the page of the block that `start` is in.
      seconds: what it takes to bring the block into host memory, if that is still to be done; blocks of the same prefix
        come one after the other.
    """

    start: int
    end: int
    block: HostBlock | Future[HostBlock | None] | None
    first_row: int = 0
    seconds: float = 0.0

    def in_memory(self) -> HostBlock | None:
        """The block, if it is in host memory by now."""
        if not isinstance(self.block, Future):
            return self.block
        ready = self.block.done() and not self.block.cancelled() and self.block.exception() is None
        return self.block.result() if ready else None

    @property
    def is_coming(self) -> bool:
        """Whether something still brings the block into host memory."""
        return isinstance(self.block, Future) and not self.block.done()


class Cell(enum.IntEnum):
    ABSENT = 0
    COMING = 1  # on the link
    LOADED = 2
    COMPUTED = 3


class Step(NamedTuple):
    """To compute a chunk in the groups from `first` up to `end`."""

    chunk: int
    first: int
    end: int


@dataclasses.dataclass
class RestoreCounts:
    """What became of the cells of a prefix.

    Attributes:
      loaded_bytes: that were loaded and placed.
      loaded, computed: cells.
      overtaken: cells that were to be loaded, and are computed because they were late.
      failed: cells whose load failed.
    """

    loaded_bytes: int = 0
    loaded: int = 0
    computed: int = 0
    overtaken: int = 0
    failed: int = 0


class Restoration:
    """An exact prefix that is restored, or what is missing of it behind what the store has.

    Attributes:
      tokens: of the whole prefix, from position 0 on.
      pages: of these tokens, in order. Those before the first chunk are only read, and must be exact.
      chunks: what is restored, without gaps.
      predicted: seconds that computing each cell takes, as `Pace.predicted_cells`.
      nbytes: about what is loaded for each cell, of all devices.
      height: in how many groups, from the first on, each chunk is to be computed.
      cells: a `Cell` for each group and chunk.
      runs: of chunks that are computed in part, the prefill, which rests before a group.
      expected_seconds: until it is done, as planned when it began.
      patient_until: before this time, by the restorer's clock, nothing is computed that was not planned.
      counts: what became of the cells so far.
      turn: of the restorer's turns, the last one that computed for it.
      ended: whether nothing is done for it any more.
      error: why it ended without being done; None if it was cancelled.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        pages: Sequence[int],
        chunks: Sequence[Chunk],
        predicted: Float[np.ndarray, "groups chunks"],
        nbytes: Float[np.ndarray, "groups chunks"],
    ) -> None:
        self.tokens, self.pages, self.chunks = tokens, pages, chunks
        self.predicted, self.nbytes = predicted, nbytes
        self.cells = np.full(predicted.shape, Cell.ABSENT, np.uint8)
        self.stored = np.tile([chunk.block is not None for chunk in chunks], (len(predicted), 1))
        self.height: Int[np.ndarray, "chunks"] = np.zeros(len(chunks), int)
        self.runs: dict[int, PrefillRun] = {}
        self.progress = np.zeros(len(chunks), int)  # groups that the chunk's run, if it has one, is through with
        self.expected_seconds, self.patient_until, self.counts = 0.0, 0.0, RestoreCounts()
        self.turn, self.ended = 0, False
        self.error: Exception | None = None

    @property
    def here(self) -> Bool[np.ndarray, "groups chunks"]:
        return self.cells >= Cell.LOADED

    @property
    def done(self) -> bool:
        """Whether all of it is in the store, or on its way there in the devices' own order."""
        return bool(self.here.all())

    @property
    def to_compute(self) -> Bool[np.ndarray, "groups chunks"]:
        """Cells that are to be computed and not there yet."""
        return (np.arange(len(self.cells))[:, None] < self.height) & ~self.here

    @property
    def to_load(self) -> Bool[np.ndarray, "groups chunks"]:
        """Cells that are to be loaded, and not on the link yet."""
        return (np.arange(len(self.cells))[:, None] >= self.height) & (self.cells == Cell.ABSENT)

    @property
    def missing_tokens(self) -> int:
        """Tokens that are not there, counted in each group."""
        sizes = np.array([chunk.end - chunk.start for chunk in self.chunks])
        return int((~self.here).sum(axis=0) @ sizes)

    # What is next -------------------------------------------------------------------------------------------

    def next_load(self) -> tuple[int, list[int]] | None:
        """The last chunk that is to be loaded and whose block is in host memory, and its groups, the last one first."""
        to_load = self.to_load
        for chunk in np.flatnonzero(to_load.any(axis=0))[::-1]:
            if self.chunks[chunk].in_memory() is not None:
                return int(chunk), np.flatnonzero(to_load[:, chunk])[::-1].tolist()
            if not self.chunks[chunk].is_coming:
                self.lose(int(chunk), np.flatnonzero(to_load[:, chunk]).tolist())
        return None

    def next_step(self) -> Step | None:
        """The first chunk that is to be computed further and can be: all that it attends to is there."""
        to_compute, here = self.to_compute, self.here
        for chunk in np.flatnonzero(to_compute.any(axis=0)):
            first, end = int(self.progress[chunk]), int(np.flatnonzero(to_compute[:, chunk])[-1]) + 1
            ready = here[first:end, :chunk].all(axis=1)
            ready_end = end if ready.all() else first + int(ready.argmin())
            if ready_end > first:
                return Step(int(chunk), first, ready_end)
        return None

    def first_missing(self) -> Step | None:
        """What it would take to compute all that is missing of the first chunk that is not there."""
        missing = ~self.here
        chunks = np.flatnonzero(missing.any(axis=0))
        if len(chunks) == 0:
            return None
        chunk = int(chunks[0])
        return Step(chunk, int(self.progress[chunk]), int(np.flatnonzero(missing[:, chunk])[-1]) + 1)

    def last_to_compute(self) -> tuple[int, int] | None:
        """The last group and chunk that are to be computed, if they can be loaded as well."""
        chunks = np.flatnonzero(self.to_compute.any(axis=0))
        if len(chunks) == 0:
            return None
        chunk = int(chunks[-1])
        group = int(self.height[chunk]) - 1
        free = self.cells[group, chunk] == Cell.ABSENT and self.stored[group, chunk]
        return (group, chunk) if free and self.chunks[chunk].in_memory() is not None else None

    def seconds_of(self, step: Step) -> float:
        """As predicted."""
        return float(self.predicted[step.first : step.end, step.chunk].sum())

    def plan_of(self, chunk: int) -> RequestPlan:
        """The prefill of a chunk behind all that stands before it."""
        start, end = self.chunks[chunk].start, self.chunks[chunk].end
        kind = np.full(end, TokenKind.PREFIX, np.uint8)
        kind[start:] = TokenKind.FRESH
        prompt = PromptMap(self.tokens[:end], kind)
        return RequestPlan(prompt, (Phase(0, prompt.computed),), self.pages)

    # What was done ------------------------------------------------------------------------------------------

    def overtake(self, step: Step) -> None:
        """Cells of this step that were to be loaded are computed."""
        late = ~self.here[: step.end, step.chunk]
        self.counts.overtaken += int(late[self.height[step.chunk] :].sum())
        self.height[step.chunk] = max(self.height[step.chunk], step.end)

    def leave_to_link(self, group: int, chunk: int) -> None:
        """Load a cell that was to be computed: the last group of its chunk's."""
        self.height[chunk] = group

    def lose(self, chunk: int, groups: Sequence[int]) -> None:
        """These cells cannot be loaded, so they are computed. Some may have been computed meanwhile."""
        groups = [group for group in groups if self.cells[group, chunk] < Cell.LOADED]
        if not groups:
            return
        self.counts.failed += len(groups)
        self.patient_until = 0.0
        self.stored[groups, chunk], self.cells[groups, chunk] = False, Cell.ABSENT
        self.height[chunk] = max(self.height[chunk], max(groups) + 1)

    def computed(self, step: Step) -> None:
        """The step is on its way in the devices' order."""
        cells = self.cells[step.first : step.end, step.chunk]
        self.counts.computed += len(cells)
        cells[:] = Cell.COMPUTED
        self.progress[step.chunk] = step.end
        self._forget_run(step.chunk)

    def coming(self, chunk: int, groups: Sequence[int]) -> None:
        """These cells are on the link."""
        self.cells[groups, chunk] = Cell.COMING

    def loaded(self, chunk: int, groups: Sequence[int], nbytes: int) -> None:
        """These cells are placed. Some may have been computed meanwhile, and count as that."""
        groups = [group for group in groups if self.cells[group, chunk] < Cell.LOADED]
        self.counts.loaded_bytes += nbytes
        self.counts.loaded += len(groups)
        self.cells[groups, chunk] = Cell.LOADED
        self._forget_run(chunk)

    def wants(self, chunk: int, groups: Sequence[int]) -> bool:
        """Whether one of these cells has not been computed since it was on the link."""
        return not self.ended and bool((self.cells[groups, chunk] == Cell.COMING).any())

    def _forget_run(self, chunk: int) -> None:
        """Drop the hidden states of a chunk that is there."""
        if self.here[:, chunk].all():
            self.runs.pop(chunk, None)
