"""Pins: pages that stay for a time, because somebody said that he comes back. Each has a name in its namespace."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparsex_jax.cache.pages import PagePool
from sparsex_jax.errors import UnknownPinError


@dataclasses.dataclass(frozen=True)
class PinState:
    """A pin, as its owner sees it.

    Attributes:
      num_tokens: that lookups find in its pages.
      num_pages: that it has. Pins that begin alike share pages.
      seconds_left: until it ends.
    """

    namespace: str
    key: str
    num_tokens: int
    num_pages: int
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class Held:
    """What a pin has.

    Attributes:
      pages: each once, in the order of their sequences.
      ttl_s: how long it was made for.
      until: when it ends, on the clock of its book.
      owner: who made it.
    """

    pages: tuple[int, ...]
    ttl_s: float
    until: float
    owner: object = None


class PinBook:
    """All pins by namespace and key. The pool counts how many pins have each page."""

    def __init__(self, pool: PagePool, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
          clock: gives the time in seconds.
        """
        self._pool, self._clock = pool, clock
        self._pins: dict[tuple[str, str], Held] = {}
        self._on: dict[int, set[tuple[str, str]]] = {}  # the names of the pins on each page

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[tuple[tuple[str, str], Held]]:
        """Names and what they hold, oldest first."""
        return iter(list(self._pins.items()))

    def get(self, namespace: str, key: str) -> Held | None:
        return self._pins.get((namespace, key))

    def seconds_left(self, held: Held) -> float:
        return max(held.until - self._clock(), 0.0)

    def put(self, namespace: str, key: str, held: Held | None) -> Held | None:
        """Give a name these pages and no others; None: nothing. Returns what it had."""
        name = namespace, key
        before = self._pins.pop(name, None)
        if held is not None and held.pages:
            self._pins[name] = held
            self._take(name, held.pages)
        if before is not None:
            self._give_up(name, before.pages, held.pages if held else ())
        return before

    def make(self, pages: Sequence[int], ttl_s: float, owner: object) -> Held:
        """What a pin has that begins now."""
        return Held(tuple(dict.fromkeys(pages)), ttl_s, self._clock() + ttl_s, owner)

    def remove(self, namespace: str, key: str) -> Held:
        """Raises UnknownPinError if the namespace has no such pin."""
        held = self.put(namespace, key, None)
        if held is None:
            raise UnknownPinError(f"there is no pin {key!r:.60}: never made, released, or its time is over")
        return held

    def expire(self) -> bool:
        """End those whose time is over. Returns whether there were any."""
        now = self._clock()
        over = [name for name, held in self._pins.items() if held.until <= now]
        for name in over:
            self.put(*name, None)
        return bool(over)

    def move(self, pages: Sequence[int], to: int) -> None:
        """Other pages have the content of these now, or better: all on one page."""
        for name in {name for page in pages for name in self._on.get(page, ())}:
            held = self._pins[name]
            moved = tuple(dict.fromkeys(to if page in pages else page for page in held.pages))
            self._replace(name, held, moved)

    def drop(self, pages: Sequence[int]) -> None:
        """These pages can be found no longer. A pin that has no others ends."""
        gone = set(pages)
        for name in {name for page in pages for name in self._on.get(page, ())}:
            held = self._pins[name]
            self._replace(name, held, tuple(page for page in held.pages if page not in gone))

    def holds(self, page: int) -> bool:
        return page in self._on

    def _replace(self, name: tuple[str, str], held: Held, pages: tuple[int, ...]) -> None:
        """The pin keeps its time and its place among the others."""
        if not pages:
            self.put(*name, None)
            return
        self._pins[name] = dataclasses.replace(held, pages=pages)
        self._take(name, [page for page in pages if page not in held.pages])
        self._give_up(name, held.pages, pages)

    def _take(self, name: tuple[str, str], pages: Sequence[int]) -> None:
        self._pool.pin([page for page in pages if name not in self._on.get(page, ())])
        for page in pages:
            self._on.setdefault(page, set()).add(name)

    def _give_up(self, name: tuple[str, str], pages: Sequence[int], kept: Sequence[int]) -> None:
        """The pages of a pin that are not among those which it has now."""
        still = set(kept)
        gone = [page for page in pages if page not in still]
        self._pool.unpin(gone)
        for page in gone:
            self._on[page].discard(name)
            if not self._on[page]:
                del self._on[page]

    def check(self) -> None:
        """Raise AssertionError unless the pool counts what pins have."""
        counted = np.zeros_like(self._pool.pinned)
        for held in self._pins.values():
            assert held.pages
            assert len(set(held.pages)) == len(held.pages)
            counted[list(held.pages)] += 1
        assert np.array_equal(counted, self._pool.pinned)
        assert self._on == {
            page: {name for name, held in self._pins.items() if page in held.pages} for page in np.flatnonzero(counted)
        }
