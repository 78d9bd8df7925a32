"""The pool of pages: how many references each page has, and which page is evicted next.

Every page is in exactly one state:

    free      it has no reference and no committed content
    active    sequences or matches hold references to it (refs > 0)
    frozen    it has no reference, but a frozen entry has it: it stays until the entry is forgotten
    pinned    it has neither, but a pin has it: it stays until the pin ends
    base      it has none of these and no lookup finds it, but derived pages rest on it: it stays until they are gone
    spare     it has none of these, but content that a derived page has too: it is evicted first, and nothing is lost
    cached    it has none of these, but other committed content: it is evicted when a sequence needs the page

*Derived pages* have the numbers behind those of the store. Each is content that the store can make of other pages, its
*bases* (`sparsex_jax.cache.derived`). It is held, committed and evicted as any page, but takes none of the store: of
the states above it is only active or cached. A spare or cached page on which derived pages rest is evicted after them,
and not while one of them is held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparsex_jax.cache.derived import Derived


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """How many pages are in each state."""

    free: int
    active: int
    frozen: int
    pinned: int
    base: int
    spare: int
    cached: int


class PageSums(NamedTuple):
    """How many pages there are of kinds that overlap.

    Attributes:
      active: with references.
      frozen: that frozen entries have, active or not.
      kept: that frozen entries or pins have, active or not.
      held: active or kept.
      occupied: held, or needed by a derived page that is active, so that evicting cached pages does not free them.
      resting: frozen and not active.
    """

    active: int
    frozen: int
    kept: int
    held: int
    occupied: int
    resting: int


class PagePool:
    """The state of every page, as arrays over the pages: those of the store, then the derived ones.

    Attributes:
      refs: how many sequences and matches hold the page.
      frozen: how many frozen entries have it.
      pinned: how many pins have it.
      committed: whether lookups can find its content.
      last_used: when it was last used, by a clock that counts uses. The evictable page with the smallest value is
        evicted first.
      rested_on: how many derived pages rest on it.
      needed: how many of those are active.
      spare: there is a derived page with the same content, so evicting it loses nothing. It counts in
        the state `spare` while nobody holds or keeps it.
      births: how often it was handed out.
      free: the free pages of the store. `take` hands out the last one first.
      derived: by their numbers, what derived pages are made of.
      patch_rows: in all of them together.
      sums: how many pages of the store there are of each kind.
    """

    def __init__(self, num_pages: int, num_derived: int = 0) -> None:
        """
        Args:
          num_pages: of the store.
          num_derived: how many derived pages there can be.
        """
        self._num_pages, size = num_pages, num_pages + num_derived
        self.refs: Int32[np.ndarray, "pages"] = np.zeros(size, np.int32)
        self.frozen: Int32[np.ndarray, "pages"] = np.zeros(size, np.int32)
        self.pinned: Int32[np.ndarray, "pages"] = np.zeros(size, np.int32)
        self.committed: Bool[np.ndarray, "pages"] = np.zeros(size, bool)
        self.last_used: Int64[np.ndarray, "pages"] = np.zeros(size, np.int64)
        self.rested_on: Int32[np.ndarray, "pages"] = np.zeros(size, np.int32)
        self.needed: Int32[np.ndarray, "pages"] = np.zeros(size, np.int32)
        self.spare: Bool[np.ndarray, "pages"] = np.zeros(size, bool)
        self.births: Int64[np.ndarray, "pages"] = np.zeros(size, np.int64)
        self.free: list[int] = list(range(num_pages))[::-1]
        self.derived: dict[int, Derived] = {}
        self.patch_rows = 0
        self._free_numbers = list(range(num_pages, size))[::-1]
        self.sums = PageSums(0, 0, 0, 0, 0, 0)
        self._clock = 0

    def __len__(self) -> int:
        """Pages of the store."""
        return self._num_pages

    @property
    def num_numbers(self) -> int:
        """Pages of the store, and numbers of derived ones."""
        return len(self.refs)

    def is_derived(self, page: int) -> bool:
        return page >= self._num_pages

    def evictable(self) -> Bool[np.ndarray, "pages"]:
        """Which pages are spare or cached."""
        return (self.refs == 0) & (self.frozen == 0) & (self.pinned == 0) & self.committed

    def counts(self) -> PageCounts:
        free, sums = len(self.free), self.sums
        pinned = sums.held - sums.active - sums.resting
        base = int(self._bases_alone().sum()) if self.derived else 0
        spare = int((self.spare & self.evictable()).sum()) if self.derived else 0
        cached = len(self) - free - sums.held - base - spare
        return PageCounts(free, sums.active, sums.resting, pinned, base, spare, cached)

    def _bases_alone(self) -> Bool[np.ndarray, "pages"]:
        """Which pages are in state `base`."""
        return (self.rested_on > 0) & ~self.committed & (self.refs == 0)

    @property
    def num_spares(self) -> int:
        """Pages of the store whose content derived pages have too, also those that are active or kept."""
        return int(np.count_nonzero(self.spare))

    def oldest_evictable(self, count: int) -> list[int]:
        """The `count` pages to evict first, unsorted: spare ones, then what was used longest ago. All if there are
        fewer. A page on which others rest is not among them."""
        pages = np.flatnonzero(self.evictable() & (self.rested_on == 0))
        if count < len(pages):
            age = np.where(self.spare[pages], self.last_used[pages] - self._clock, self.last_used[pages])
            pages = pages[np.argpartition(age, count)[:count]]
        return pages.tolist()

    def touch(self, pages: Sequence[int]) -> None:
        """Mark pages as used now. Later pages of the list count as older, so that a sequence is evicted from its end.

        With the clock at 10, `touch([4, 7, 2])` sets last_used[4, 7, 2] = 13, 12, 11 and the clock to 13.
        """
        self.last_used[np.array(pages, np.int64)] = self._clock + np.arange(len(pages), 0, -1)
        self._clock += len(pages)

    def take(self, count: int) -> list[int]:
        """Hand out free pages with one reference each."""
        left = len(self.free) - count
        pages = self.free[left:][::-1]
        del self.free[left:]
        self.births[pages] += 1
        self._step(self.refs, pages, 1)
        return pages

    def settle(self, pages: Sequence[int]) -> None:
        """Free those that nobody has any more, and then what they rested on alone."""
        gone = [page for page in self._unused(pages) if self.is_derived(page)]
        bases = [base for page in gone for base in self._forget_derived(page)]
        unused = self._unused([*pages, *bases])
        self.free.extend(reversed(dict.fromkeys(page for page in unused if not self.is_derived(page))))

    def _unused(self, pages: Sequence[int]) -> list[int]:
        """The pages that nothing refers to, in their order."""
        index = np.array(pages, np.int64)
        used = (self.refs[index] > 0) | self.committed[index] | (self.rested_on[index] > 0)
        return index[~used].tolist()

    # Derived pages ------------------------------------------------------------------------------------------

    def add_derived(self, derived: Derived) -> int | None:
        """Give content that is made of other pages a number. None if none is left."""
        if not self._free_numbers:
            return None
        page = self._free_numbers.pop()
        self.derived[page] = derived
        self.patch_rows += derived.num_rows
        self.births[page] += 1
        self.rested_on[list(derived.bases)] += 1
        return page

    def _forget_derived(self, page: int) -> tuple[int, ...]:
        """Returns the pages that it rested on."""
        derived = self.derived.pop(page)
        self.patch_rows -= derived.num_rows
        self.rested_on[list(derived.bases)] -= 1
        self._free_numbers.append(page)
        return derived.bases

    def _need(self, page: int, step: int) -> None:
        """A derived page became active, or is active no longer."""
        self._step(self.needed, self.derived[page].bases, step)

    # Holders ------------------------------------------------------------------------------------------------

    def hold(self, pages: Sequence[int]) -> None:
        self._step(self.refs, pages, 1)
        self.touch(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page. A page without references and committed content becomes free."""
        self.touch(pages)
        self._step(self.refs, pages, -1)
        self.settle(pages)

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
        """One holder more or less of each page, in `refs`, `frozen`, `pinned` or `needed`. The sums follow, page by
        page."""
        index = np.array(pages, np.int64)
        stored, derived = index[index < len(self)], index[index >= len(self)]
        before, active = self._sums_of(stored), self.refs[derived] > 0
        holders[index] += step
        after, changed = self._sums_of(stored), active != (self.refs[derived] > 0)
        moved = (now + new - old for now, new, old in zip(self.sums, after, before, strict=True))
        self.sums = PageSums(*moved)
        for page in derived[changed].tolist():
            self._need(page, step)

    def _sums_of(self, index: Int64[np.ndarray, "stored"]) -> PageSums:
        """Of these pages of the store."""
        active, frozen, pinned = self.refs[index] > 0, self.frozen[index] > 0, self.pinned[index] > 0
        kept = frozen | pinned
        held = active | kept
        kinds = (active, frozen, kept, held, held | (self.needed[index] > 0), frozen & ~active)
        return PageSums(*(int(np.count_nonzero(kind)) for kind in kinds))

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one state."""
        counts, everything = self.counts(), np.arange(len(self))
        assert self._sums_of(everything) == self.sums
        assert counts.cached + counts.spare == self.evictable()[: len(self)].sum()
        assert sum(dataclasses.astuple(counts)) == len(self)
        assert len(set(self.free)) == len(self.free)
        for holders in (self.refs, self.frozen, self.pinned, self.committed, self.rested_on, self.needed):
            assert not holders[self.free].any()
        assert (self.refs >= 0).all()
        assert (self.pinned >= 0).all()
        assert self.committed[(self.frozen > 0) | (self.pinned > 0)].all()
        self._check_derived()

    def _check_derived(self) -> None:
        numbers, stored = set(range(len(self), self.num_numbers)), len(self)
        assert self.derived.keys() == numbers - set(self._free_numbers)
        assert len(self.derived) + len(self._free_numbers) == len(numbers)
        assert self.patch_rows == sum(derived.num_rows for derived in self.derived.values())
        rested_on, needed = np.zeros_like(self.rested_on), np.zeros_like(self.needed)
        for page, derived in self.derived.items():
            assert self.refs[page] > 0 or self.committed[page]
            assert all(0 <= base < stored for base in derived.bases)
            rested_on[list(derived.bases)] += 1
            needed[list(derived.bases)] += self.refs[page] > 0
        assert np.array_equal(rested_on, self.rested_on)
        assert np.array_equal(needed, self.needed)
        for holders in (self.frozen, self.pinned, self.spare):
            assert not holders[stored:].any()
        assert self.committed[self.spare].all()
