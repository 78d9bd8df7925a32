"""The pool of pages: how many references each page has, and which page is evicted next.

Every page is in exactly one state:

    free      it has no reference and no committed content
    active    sequences or matches hold references to it (refs > 0)
    frozen    it has no reference, but a frozen entry has it: it stays until the entry is forgotten
    pinned    it has neither, but a pin has it: it stays until the pin ends
    cached    it has none of these, but committed content: it is evicted when a sequence needs the page
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """How many pages are in each state."""

    free: int
    active: int
    frozen: int
    pinned: int
    cached: int


class PageSums(NamedTuple):
    """How many pages there are of kinds that overlap.

    Attributes:
      active: with references.
      frozen: that frozen entries have, active or not.
      kept: that frozen entries or pins have, active or not.
      occupied: active or kept, so that evicting cached pages does not free them.
      resting: frozen and not active.
    """

    active: int
    frozen: int
    kept: int
    occupied: int
    resting: int


class PagePool:
    """The state of every page, as arrays over the pages.

    Attributes:
      refs: how many sequences and matches hold the page.
      frozen: how many frozen entries have it.
      pinned: how many pins have it.
      committed: whether lookups can find its content.
      last_used: when it was last used, by a clock that counts uses. The cached page with the smallest value is
        evicted first.
      free: the free pages. `take` hands out the last one first.
      sums: how many pages there are of each kind.
    """

    def __init__(self, num_pages: int) -> None:
        self.refs: Int32[np.ndarray, "pages"] = np.zeros(num_pages, np.int32)
        self.frozen: Int32[np.ndarray, "pages"] = np.zeros(num_pages, np.int32)
        self.pinned: Int32[np.ndarray, "pages"] = np.zeros(num_pages, np.int32)
        self.committed: Bool[np.ndarray, "pages"] = np.zeros(num_pages, bool)
        self.last_used: Int64[np.ndarray, "pages"] = np.zeros(num_pages, np.int64)
        self.free: list[int] = list(range(num_pages))[::-1]
        self.sums = PageSums(0, 0, 0, 0, 0)
        self._clock = 0

    def __len__(self) -> int:
        return len(self.refs)

    def cached(self) -> Bool[np.ndarray, "pages"]:
        return (self.refs == 0) & (self.frozen == 0) & (self.pinned == 0) & self.committed

    def counts(self) -> PageCounts:
        free, sums = len(self.free), self.sums
        pinned = sums.occupied - sums.active - sums.resting
        return PageCounts(free, sums.active, sums.resting, pinned, len(self) - free - sums.occupied)

    def oldest_cached(self, count: int) -> list[int]:
        """The `count` cached pages that were used longest ago, unsorted. All cached pages if there are fewer."""
        cached = np.flatnonzero(self.cached())
        if count < len(cached):
            cached = cached[np.argpartition(self.last_used[cached], count)[:count]]
        return cached.tolist()

    def touch(self, pages: Sequence[int]) -> None:
        """Mark pages as used now. Later pages of the list count as older, so that a sequence is evicted from its end.

        With the clock at 10, `touch([4, 7, 2])` sets last_used[4, 7, 2] = 13, 12, 11 and the clock to 13.
        """
        self.last_used[list(pages)] = self._clock + np.arange(len(pages), 0, -1)
        self._clock += len(pages)

    def take(self, count: int) -> list[int]:
        """Hand out free pages with one reference each."""
        pages = [self.free.pop() for _ in range(count)]
        self._step(self.refs, pages, 1)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        self.free.extend(reversed(pages))

    def hold(self, pages: Sequence[int]) -> None:
        self._step(self.refs, pages, 1)
        self.touch(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page. A page without references and committed content becomes free."""
        self.touch(pages)
        self._step(self.refs, pages, -1)
        self.give_back([page for page in pages if self.refs[page] == 0 and not self.committed[page]])

    def freeze(self, pages: Sequence[int]) -> None:
        """One frozen entry more has each page."""
        self._step(self.frozen, pages, 1)

    def thaw(self, pages: Sequence[int]) -> None:
        """One frozen entry less has each page."""
        self._step(self.frozen, pages, -1)

    def pin(self, pages: Sequence[int]) -> None:
        """One pin more has each page."""
        self._step(self.pinned, pages, 1)

    def unpin(self, pages: Sequence[int]) -> None:
        """One pin less has each page."""
        self._step(self.pinned, pages, -1)

    def _step(self, holders: Int32[np.ndarray, "pages"], pages: Sequence[int], step: int) -> None:
        """One holder more or less of each page, in `refs`, `frozen` or `pinned`. The sums follow, page by page."""
        index = list(pages)
        before = self._sums_of(index)
        holders[index] += step
        after = self._sums_of(index)
        changed = (now + new - old for now, new, old in zip(self.sums, after, before, strict=True))
        self.sums = PageSums(*changed)

    def _sums_of(self, index: list[int]) -> PageSums:
        active, frozen, pinned = self.refs[index] > 0, self.frozen[index] > 0, self.pinned[index] > 0
        kept = frozen | pinned
        kinds = (active, frozen, kept, active | kept, frozen & ~active)
        return PageSums(*(int(np.count_nonzero(kind)) for kind in kinds))

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one state."""
        counts, everything = self.counts(), list(range(len(self)))
        assert self._sums_of(everything) == self.sums
        assert counts.cached == self.cached().sum()
        assert sum(dataclasses.astuple(counts)) == len(self)
        assert len(set(self.free)) == len(self.free)
        assert not (self.refs[self.free].any())
        assert not (self.frozen[self.free].any())
        assert not (self.pinned[self.free].any())
        assert not (self.committed[self.free].any())
        assert (self.refs >= 0).all()
        assert (self.pinned >= 0).all()
        assert self.committed[(self.frozen > 0) | (self.pinned > 0)].all()
