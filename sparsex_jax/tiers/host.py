"""Blocks in host memory, as many as may be."""

from __future__ import annotations

from typing import Protocol

from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.order import UseOrder


class Kept(Protocol):
    """The KV of a block."""

    @property
    def nbytes(self) -> int: ...


class HostStore[T: Kept]:
    """Blocks by their keys. The least recently used goes first; a sequence loses its end first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[bytes, T] = {}
        self._order: UseOrder[bytes] = UseOrder()

    def put(self, block: Block, kept: T) -> list[bytes]:
        """Returns the keys of those that went for it; it may be among them."""
        self.remove(block.key)
        self._kept[block.key] = kept
        self._order.add(block.key, kept.nbytes, block.before or None)
        gone = []
        while self.nbytes > self.limit_bytes:
            gone.append(next(iter(self._order)))
            self.remove(gone[-1])
        return gone

    def use(self, key: bytes) -> T:
        """Raises KeyError if it is not there."""
        self._order.use(key)
        return self._kept[key]

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
