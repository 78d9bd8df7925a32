"""In which order blocks were used, and how many bytes they have together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple


class _Item[Name](NamedTuple):
    nbytes: int
    before: Name | None


class UseOrder[Name: Hashable]:
    """Names in the order of their last use, the least recent first.

    Each may have one before it in its sequence. Using a name counts as using all before it, from the nearest to the
    first, so that a sequence loses its end first: its beginning is of use without its end, but not the other way round.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[Name, _Item[Name]] = OrderedDict()
        self.nbytes = 0

    def add(self, name: Name, nbytes: int, before: Name | None) -> None:
        """As the most recently used, but for those before it."""
        self._items[name] = _Item(nbytes, before)
        self.nbytes += nbytes
        self.use(name)

    def use(self, name: Name) -> None:
        """Those before it follow as far as they are there without a gap."""
        at: Name | None = name
        while at is not None and at in self._items:
            self._items.move_to_end(at)
            at = self._items[at].before

    def drop(self, name: Name) -> None:
        self.nbytes -= self._items.pop(name).nbytes

    def __contains__(self, name: Name) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[Name]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
