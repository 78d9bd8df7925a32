"""Blocks in host memory, as many as may be."""

from __future__ import annotations

from typing import Protocol

from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.demand import Demand
from sparsex_jax.tiers.order import UseOrder


class Kept(Protocol):
    """The KV of a block."""

    @property
    def nbytes(self) -> int: ...


class HostStore[T: Kept]:
    """Blocks by their keys. The least recently used goes first; a sequence loses its end first.

    Attributes:
      demand: says which blocks should be put here. Whatever is put here is taken.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[bytes, T] = {}
        self._order: UseOrder[bytes] = UseOrder()
        self.demand = Demand(self._order, limit_bytes)

    def put(self, block: Block, kept: T, *, remembered: bool = False) -> list[tuple[bytes, int]]:
        """Returns the keys of those that went for it, and when they were used last; it may be among them."""
        self.remove(block.key)
        self._kept[block.key] = kept
        self._order.add(block.key, kept.nbytes, block.before or None, remembered=remembered)
        gone = []
        while self.nbytes > self.limit_bytes:
            key = next(iter(self._order))
            gone.append((key, self._order.last_use(key)))
            self.remove(key)
        return gone

    def use(self, key: bytes) -> T:
        """Raises KeyError if it is not there."""
        kept = self._kept[key]
        self.demand.use(key)
        return kept

    def find(self, key: bytes) -> T | None:
        """As `use`, but it does not count as one. None if it is not there."""
        return self._kept.get(key)

    def remember(self, key: bytes) -> None:
        """It is of a remembered text from now on, if it is there."""
        if key in self._kept:
            self._order.remember(key)

    def is_remembered(self, key: bytes) -> bool:
        return key in self._kept and self._order.is_remembered(key)

    def remove(self, key: bytes) -> None:
        if key in self._kept:
            del self._kept[key]
            self._order.drop(key)

    @property
    def nbytes(self) -> int:
        return self._order.nbytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def check(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert sorted(self._order) == sorted(self._kept)
        assert self.nbytes == sum(kept.nbytes for kept in self._kept.values()) <= self.limit_bytes
