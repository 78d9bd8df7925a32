"""In which order blocks go, and how many bytes they have together."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

REMEMBERED = 4  # a remembered text may be unused for so many times as long as a chat before it goes


class _Item[Name](NamedTuple):
    nbytes: int
    before: Name | None
    remembered: bool
    used: int


class UseOrder[Name: Hashable]:
    """Names in the order of their last use, the least recent first; remembered ones age more slowly than others.

    Each may have one before it in its sequence. Using a name counts as using all before it, from the nearest to the
    first, so that a sequence loses its end first: its beginning is of use without its end, but not the other way round.

    Attributes:
      nbytes: of all together.
      clock: how many bytes of sequences were visited so far. Ages are differences of it.
    """

    def __init__(self) -> None:
        self._chats: OrderedDict[Name, _Item[Name]] = OrderedDict()
        self._remembered: OrderedDict[Name, _Item[Name]] = OrderedDict()
        self.nbytes = self.clock = 0

    def add(self, name: Name, nbytes: int, before: Name | None, *, remembered: bool = False) -> None:
        """As the most recently used, but for those before it."""
        self._place(remembered)[name] = _Item(nbytes, before, remembered, self.clock)
        self.nbytes += nbytes
        self.use(name)

    def use(self, name: Name) -> list[tuple[int, int]]:
        """Those before it follow as far as they are there without a gap.

        Returns:
          How old each of them had become, and its bytes.
        """
        at: Name | None = name
        used = []
        while at is not None and (item := self._item(at)) is not None:
            place = self._place(item.remembered)
            used.append((self.clock - item.used, item.nbytes))
            place[at] = item._replace(used=self.clock)
            place.move_to_end(at)
            at = item.before
        return used

    def last_use(self, name: Name) -> int:
        """The clock then."""
        return self._known(name).used

    def drop(self, name: Name) -> None:
        item = self._known(name)
        del self._place(item.remembered)[name]
        self.nbytes -= item.nbytes

    def remember(self, name: Name) -> None:
        """It is of a remembered text from now on, and was used now."""
        item = self._known(name)
        del self._place(item.remembered)[name]
        self._remembered[name] = item._replace(remembered=True, used=self.clock)

    def is_remembered(self, name: Name) -> bool:
        return name in self._remembered

    def ages(self) -> Iterator[tuple[Name, float, int]]:
        """Each with its age, a part of the real one where it is remembered, and its bytes. The oldest first."""
        parts = self._ages(self._chats, 1), self._ages(self._remembered, REMEMBERED)
        yield from heapq.merge(*parts, key=lambda each: -each[1])

    def _ages(self, place: OrderedDict[Name, _Item[Name]], slower: int) -> Iterator[tuple[Name, float, int]]:
        for name, item in place.items():
            yield name, (self.clock - item.used) / slower, item.nbytes

    def _item(self, name: Name) -> _Item[Name] | None:
        return self._chats.get(name) or self._remembered.get(name)

    def _known(self, name: Name) -> _Item[Name]:
        item = self._item(name)
        if item is None:
            raise KeyError(name)
        return item

    def _place(self, remembered: bool) -> OrderedDict[Name, _Item[Name]]:
        return self._remembered if remembered else self._chats

    def __contains__(self, name: Name) -> bool:
        return name in self._chats or name in self._remembered

    def __iter__(self) -> Iterator[Name]:
        return (name for name, _, _ in self.ages())

    def __len__(self) -> int:
        return len(self._chats) + len(self._remembered)
