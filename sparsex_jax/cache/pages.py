"""Who holds a page, and which one goes next.

Every page is in exactly one state:

    free      nobody holds it and nothing of use is in it
    active    requests or matches hold it (refs > 0)
    frozen    no request holds it, but a frozen entry does: it stays until told, or until pressure
    cached    nobody holds it, its content may be of use: it goes when its memory is needed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """How many pages are in each state."""

    free: int
    active: int
    frozen: int
    cached: int


class PageTable:
    """The facts about every page, as arrays over pages.

    Attributes:
      refs: requests and matches that hold the page.
      frozen: frozen entries that hold it.
      committed: it has content that lookups can find.
      last_used: a logical clock; of two cached pages the one with the smaller value goes first.
      free: the free pages, the next one to hand out last.
    """

    def __init__(self, num_pages: int) -> None:
        self.refs: Int32[np.ndarray, "pages"] = np.zeros(num_pages, np.int32)
        self.frozen: Int32[np.ndarray, "pages"] = np.zeros(num_pages, np.int32)
        self.committed: Bool[np.ndarray, "pages"] = np.zeros(num_pages, bool)
        self.last_used: Int64[np.ndarray, "pages"] = np.zeros(num_pages, np.int64)
        self.free: list[int] = list(range(num_pages))[::-1]
        self._clock = 0

    def __len__(self) -> int:
        return len(self.refs)

    def cached(self) -> Bool[np.ndarray, "pages"]:
        return (self.refs == 0) & (self.frozen == 0) & self.committed

    def occupied(self) -> int:
        """Pages that ordinary eviction cannot free: active and frozen ones."""
        return int(((self.refs > 0) | (self.frozen > 0)).sum())

    def counts(self) -> PageCounts:
        active = self.refs > 0
        frozen = (self.frozen > 0) & ~active
        return PageCounts(len(self.free), int(active.sum()), int(frozen.sum()), int(self.cached().sum()))

    def oldest_cached(self, count: int) -> list[int]:
        """The `count` cached pages that were used longest ago, in no order; all if there are no more."""
        cached = np.flatnonzero(self.cached())
        if count < len(cached):
            cached = cached[np.argpartition(self.last_used[cached], count)[:count]]
        return cached.tolist()

    def touch(self, pages: Sequence[int]) -> None:
        """Mark as used now. Later pages of the list count as older, so that a sequence is evicted from its end."""
        self.last_used[list(pages)] = self._clock + np.arange(len(pages), 0, -1)
        self._clock += len(pages)

    def take(self, count: int) -> list[int]:
        """Hand out free pages, held once."""
        pages = [self.free.pop() for _ in range(count)]
        self.refs[pages] = 1
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        self.free.extend(reversed(pages))

    def hold(self, pages: Sequence[int]) -> None:
        self.refs[list(pages)] += 1
        self.touch(pages)

    def let_go(self, pages: Sequence[int]) -> None:
        """Drop one reference of each; what nobody holds and nobody committed is free again."""
        index = list(pages)
        self.touch(pages)
        self.refs[index] -= 1
        self.give_back([page for page in index if self.refs[page] == 0 and not self.committed[page]])

    def check(self) -> None:
        """Raise AssertionError unless every page is in one state."""
        counts = self.counts()
        assert counts.free + counts.active + counts.frozen + counts.cached == len(self)
        assert len(set(self.free)) == len(self.free)
        assert not (self.refs[self.free].any())
        assert not (self.frozen[self.free].any())
        assert not (self.committed[self.free].any())
        assert (self.refs >= 0).all()
        assert self.committed[self.frozen > 0].all()
