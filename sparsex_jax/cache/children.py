"""The nodes that may follow a node, found by their tokens at a cost that does not grow with their number."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Protocol

TOKEN_BYTES = 4
# So many children are looked at for the one that shares most with a prompt: many may share equally much.
MOST_TIES = 16


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading tokens `a` and `b` share.

    Read as little-endian integers, they first differ at the lowest bit of their exclusive or:

    >>> common_prefix(np.int32([7, 8, 9]).tobytes(), np.int32([7, 8, 5]).tobytes())
    2
    """
    size = min(len(a), len(b))
    differ = int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")
    return ((differ & -differ).bit_length() - 1) // 32 if differ else size // TOKEN_BYTES


class Keyed(Protocol):
    """A node, as far as its place among others depends on it.

    Attributes:
      key: its tokens, int32 as bytes.
      sharable: whether it comes first among those of its key.
    """

    key: bytes
    sharable: bool


class Children[Node: Keyed]:
    """Nodes by key. Under one key a sharable node comes first, then the others, oldest first.

    The keys are also kept in order. Among sorted strings, those that share most leading characters with a given one
    are its neighbours, so the nodes closest to a text are found without looking at the others.
    """

    __slots__ = ("_by_key", "_keys")

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Node]] = {}
        self._keys: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __iter__(self) -> Iterator[Node]:
        return (node for same_key in self._by_key.values() for node in same_key)

    def of(self, key: bytes) -> list[Node]:
        """The nodes with exactly these tokens."""
        return self._by_key.get(key, [])

    def add(self, node: Node) -> None:
        if node.key not in self._by_key:
            self._by_key[node.key] = []
            insort(self._keys, node.key)
        same_key = self._by_key[node.key]
        same_key.insert(0 if node.sharable else len(same_key), node)

    def remove(self, node: Node) -> None:
        same_key = self._by_key[node.key]
        same_key.remove(node)
        if not same_key:
            del self._by_key[node.key]
            del self._keys[bisect_left(self._keys, node.key)]

    def near(self, row: bytes) -> Iterator[tuple[int, Node]]:
        """Yield how many leading tokens a node shares with `row`, and the node: most first, and none that shares none.

        keys in order:  [1 2 3 9]  [1 2 7 7]  [1 4 4 4]  [5 5 5 5]
        row [1 2 5 5] belongs here ^          and shares 2, 2, 1 and 0 tokens with them
        """
        right = bisect_left(self._keys, row)
        left = right - 1
        before, behind = self._shared(left, row), self._shared(right, row)
        while before or behind:
            if before >= behind:
                yield from ((before, node) for node in self.of(self._keys[left]))
                left -= 1
                before = self._shared(left, row)
            else:
                yield from ((behind, node) for node in self.of(self._keys[right]))
                right += 1
                behind = self._shared(right, row)

    def _shared(self, number: int, row: bytes) -> int:
        return common_prefix(self._keys[number], row) if 0 <= number < len(self._keys) else 0

    def check(self) -> None:
        """Raise AssertionError unless the parts agree with each other."""
        assert self._keys == sorted(self._by_key)
        for key, same_key in self._by_key.items():
            assert same_key
            assert all(node.key == key for node in same_key)
            assert not any(node.sharable for node in same_key[1:])
