"""The window index: it tells which places of the store may hold the 8 tokens from any offset of a prompt on.

This is rsync's idea. Stored pages are cut into windows of 8 tokens on a fixed grid, and every window is indexed by
its hash. A prompt is hashed at *every* offset, so stored text is found wherever it comes back. Any 15 tokens in a row
contain one whole window of the grid:

    stored   |0 1 2 3 4 5 6 7|8 9 . . . . . 15|16 ...
    run            3 . . . . . . . . . . . . . 17        15 tokens, with window 8..15 inside

Equal hashes do not prove equal tokens. `segments` compares the tokens of every place that this index gives.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from sparsex_jax.cache.tree import Node

WINDOW = 8
MAX_CANDIDATES = 16  # places tried for each window, however often its text is stored
_MULTIPLIER = 0x9E3779B97F4A7C15


def mix(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """splitmix64's finaliser: neighbouring token ids become unrelated 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def window_hashes(tokens: Int32[np.ndarray, "*rows tokens"], salt: int) -> UInt64[np.ndarray, "*rows windows"]:
    """The polynomial hash of the 8 tokens from every offset on: `tokens - 7` hashes, or none for fewer than 8 tokens.

    h[i] = sum over j < 8 of mix(tokens[i + j] + salt) * B ** (7 - j), modulo 2 ** 64. Two neighbouring hashes of
    n tokens make one of 2n, so three steps do what Horner's rule does in seven. With m[i] = mix(tokens[i] + salt):

        10 tokens   width 1: m[0] .. m[9]
        9 pairs     width 2: m[0] B + m[1]                    .. m[8] B + m[9]
        7 fours     width 4: m[0] B^3 + .. + m[3]             .. m[6] B^3 + .. + m[9]
        3 eights    width 8: m[0] B^7 + .. + m[7]             .. m[2] B^7 + .. + m[9]
    """
    hashes = mix(tokens.astype(np.uint64) + np.uint64(salt))
    power, width = _MULTIPLIER, 1
    while width < WINDOW:
        hashes = hashes[..., :-width] * np.uint64(power) + hashes[..., width:]
        power, width = power * power % 2**64, 2 * width
    return hashes


def run_around(
    tokens: Int32[np.ndarray, "tokens"], place: int, text: Int32[np.ndarray, "text"], offset: int
) -> tuple[int, int]:
    """From where to where a prompt and a text are equal around a window: `place` in the prompt, `offset` in the text.

    Returns:
      Two indices of the prompt; equal ones if the hash lied.
    """
    before, behind = min(place, offset), min(len(tokens) - place, len(text) - offset)
    equal = tokens[place - before : place + behind] == text[offset - before : offset + behind]
    if not equal[before : before + WINDOW].all():
        return place, place
    begin = place - int(equal[:before][::-1].cumprod().sum())
    return begin, place + int(equal[before:].cumprod().sum())


@runtime_checkable  # tests check argument types while they run
class Observer(Protocol):
    """Hears which content lookups can find. It is called on the cache's thread, between two of its changes, so it must
    be quick and must not raise."""

    def stored(self, nodes: Sequence[Node]) -> None:
        """These can be found from now on."""

    def removed(self, nodes: Sequence[Node]) -> None:
        """These were told of as stored, and cannot be found any more."""

    def cleared(self) -> None:
        """Nothing can be found any more: the store is lost."""


class WindowIndex:
    """Maps a window's hash to its places: the nodes and offsets where it is stored.

    A table of counts, indexed by the hashes' leading bits, tells for all offsets of a prompt at once which ones are
    worth a dictionary lookup. The memory is bounded by the store, with one dictionary entry for each window.

    Attributes:
      num_windows: windows that are indexed now.
      observer: hears of nodes that come and go. None: nobody does.
    """

    def __init__(self, max_windows: int) -> None:
        """
        Args:
          max_windows: windows in a full store.
        """
        bits = max(10, (8 * max_windows - 1).bit_length())  # 8 counts for each window, so few collide
        self._shift = np.uint64(64 - bits)
        self._counts = np.zeros(1 << bits, np.int32)
        # `candidates` gives 16 places at most. Exact places are kept apart from approximate ones and given first, so
        # that many approximate copies of a document do not hide the original.
        self._exact: dict[int, dict[tuple[Node, int], None]] = {}
        self._approximate: dict[int, dict[tuple[Node, int], None]] = {}
        self._secret = secrets.token_bytes(16)  # so that clients cannot construct texts whose hashes collide
        self.num_windows = 0
        self.observer: Observer | None = None

    def _salt(self, namespace: str) -> int:
        return int.from_bytes(hashlib.blake2b(namespace.encode(), key=self._secret, digest_size=8).digest(), "little")

    def _windows_of(self, node: Node) -> list[tuple[int, int]]:
        """Offset and hash of each window of an indexed node."""
        return [(i * WINDOW, value) for i, value in enumerate(node.hashes)]

    def _table_of(self, node: Node, offset: int) -> dict[int, dict[tuple[Node, int], None]]:
        return self._exact if offset + WINDOW <= node.exact else self._approximate

    def _count(self, hashes: Sequence[int], step: int) -> None:
        np.add.at(self._counts, np.array(hashes, np.uint64) >> self._shift, step)
        self.num_windows += step * len(hashes)

    def add(self, nodes: Sequence[Node], rows: Int32[np.ndarray, "nodes page"]) -> None:
        """Index new nodes of one namespace.

            page_size 16, a node of 13 tokens: hashes at offsets 0..8 of its row, of which the grid keeps 0 and 8;
            13 // 8 = 1 window is whole, so node.hashes = [hash of tokens 0..7]

        Args:
          rows: the tokens of each node. Those behind the end of a short page are ignored.
        """
        if not nodes:
            return
        hashes = window_hashes(rows, self._salt(nodes[0].namespace))[:, ::WINDOW].tolist()
        for node, row in zip(nodes, hashes, strict=True):
            node.hashes = row[: node.length // WINDOW]
        # From the end, because `candidates` gives the place added last first: where a text is repeated, this is its
        # earliest place in the sequence, which has the most stored tokens behind it.
        for node in reversed(nodes):
            for offset, value in reversed(self._windows_of(node)):
                self._table_of(node, offset).setdefault(value, {})[node, offset] = None
        self._count([value for node in nodes for value in node.hashes], 1)
        if self.observer is not None:
            self.observer.stored(nodes)

    def remove(self, nodes: Sequence[Node]) -> None:
        """Remove indexed nodes from the index."""
        for node in nodes:
            for offset, value in self._windows_of(node):
                places = self._table_of(node, offset)
                del places[value][node, offset]
                if not places[value]:
                    del places[value]
        self._count([value for node in nodes for value in node.hashes], -1)
        if nodes and self.observer is not None:
            self.observer.removed(nodes)

    def probe(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str
    ) -> tuple[Int64[np.ndarray, "hits"], UInt64[np.ndarray, "hits"]]:
        """The offsets whose window may be stored, ascending, and their hashes. Some are false alarms of the counts."""
        hashes = window_hashes(tokens, self._salt(namespace))
        offsets = np.flatnonzero(self._counts[hashes >> self._shift] != 0)
        return offsets, hashes[offsets]

    def __contains__(self, value: int) -> bool:
        """Whether a window with this hash is stored, which costs a dictionary lookup."""
        return value in self._exact or value in self._approximate

    def has_exact(self, value: int) -> bool:
        """Whether a window with this hash is stored in exact content."""
        return value in self._exact

    def candidates(self, value: int) -> Iterator[tuple[Node, int]]:
        """At most 16 places with this hash: exact ones before approximate ones, and in each the newest first."""
        return itertools.islice(self.places(value), MAX_CANDIDATES)

    def places(self, value: int) -> Iterator[tuple[Node, int]]:
        """All places with this hash, in the order of `candidates`."""
        exact, approximate = self._exact.get(value, {}), self._approximate.get(value, {})
        return itertools.chain(reversed(exact), reversed(approximate))

    def check(self, nodes: Sequence[Node]) -> None:
        """Raise AssertionError unless the windows of these nodes are indexed, and no others."""
        indexed = [
            (value, node, offset)
            for places in (self._exact, self._approximate)
            for value, found in places.items()
            for node, offset in found
        ]
        expected = {(value, node, offset) for node in nodes for offset, value in self._windows_of(node)}
        assert len(indexed) == len(expected) == self.num_windows
        assert set(indexed) == expected
        assert all(len(node.hashes) == node.length // WINDOW for node in nodes)
        counts = np.zeros_like(self._counts)
        np.add.at(counts, np.array([value for value, _, _ in indexed], np.uint64) >> self._shift, 1)
        assert np.array_equal(counts, self._counts)
