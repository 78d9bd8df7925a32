"""Where a run of tokens may be stored: a hash of every window of 8 tokens in the store, looked up at every offset.

This is rsync's idea. Stored pages are cut into windows on a fixed grid; a prompt is hashed at *every* offset, so
stored text is found wherever it comes back. Any 15 tokens in a row contain one whole window of the grid:

    stored   |0 1 2 3 4 5 6 7|8 9 . . . . . 15|16 ...
    run            3 . . . . . . . . . . . . . 17        15 tokens, with window 8..15 inside

A hash only finds; whoever asks compares the tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from sparsex_jax.cache.tree import Node

WINDOW = 8
MAX_CANDIDATES = 16  # donors looked at per window, however often its text is stored
_MULTIPLIER = 0x9E3779B97F4A7C15


def _mix(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """splitmix64's finaliser: neighbouring token ids become unrelated 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def window_hashes(tokens: Int32[np.ndarray, "*rows tokens"], salt: int) -> UInt64[np.ndarray, "*rows windows"]:
    """The polynomial hash of the 8 tokens from every offset on, `tokens - 7` of them (none if too few).

    h[i] = sum over j < 8 of mix(tokens[i + j] + salt) * B ** (7 - j), modulo 2 ** 64. Two neighbouring hashes of
    n tokens make one of 2n, so three steps do what Horner's rule does in seven.
    """
    hashes = _mix(tokens.astype(np.uint64) + np.uint64(salt))
    power, width = _MULTIPLIER, 1
    while width < WINDOW:
        hashes = hashes[..., :-width] * np.uint64(power) + hashes[..., width:]
        power, width = power * power % 2**64, 2 * width
    return hashes


class WindowIndex:
    """From a window's hash to the nodes and offsets where it is stored.

    A counting filter over the hashes' leading bits answers for all offsets of a prompt at once which ones are
    worth a dictionary lookup. Everything is bounded by what is stored: one entry a window.
    """

    def __init__(self, max_windows: int) -> None:
        bits = max(10, (8 * max_windows - 1).bit_length())  # 8 counters a window: few false alarms
        self._shift = np.uint64(64 - bits)
        self._counts = np.zeros(1 << bits, np.int32)
        # Exact places apart from approximate ones, so that many copies of a document never crowd out the original.
        self._exact: dict[int, dict[tuple[Node, int], None]] = {}
        self._approximate: dict[int, dict[tuple[Node, int], None]] = {}
        self._secret = secrets.token_bytes(16)  # nobody outside can construct collisions
        self.num_windows = 0

    def _salt(self, namespace: str) -> int:
        return int.from_bytes(hashlib.blake2b(namespace.encode(), key=self._secret, digest_size=8).digest(), "little")

    def _windows_of(self, node: Node) -> list[tuple[int, int]]:
        """Offset and hash of each window of an indexed node."""
        return [(i * WINDOW, value) for i, value in enumerate(node.hashes)]

    def _places(self, node: Node, offset: int) -> dict[int, dict[tuple[Node, int], None]]:
        return self._exact if offset + WINDOW <= node.exact else self._approximate

    def _count(self, hashes: Sequence[int], step: int) -> None:
        np.add.at(self._counts, np.array(hashes, np.uint64) >> self._shift, step)
        self.num_windows += step * len(hashes)

    def add(self, nodes: Sequence[Node], rows: Int32[np.ndarray, "nodes page"]) -> None:
        """Index new nodes of one namespace. `rows`: their tokens; what lies behind a short page's end is ignored."""
        if not nodes:
            return
        hashes = window_hashes(rows, self._salt(nodes[0].namespace))[:, ::WINDOW].tolist()
        for node, row in zip(nodes, hashes, strict=True):
            node.hashes = row[: node.length // WINDOW]
        # Backwards, so that the latest place of a repeated text is its first one there: most can follow on it.
        for node in reversed(nodes):
            for offset, value in reversed(self._windows_of(node)):
                self._places(node, offset).setdefault(value, {})[node, offset] = None
        self._count([value for node in nodes for value in node.hashes], 1)

    def remove(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for offset, value in self._windows_of(node):
                places = self._places(node, offset)
                del places[value][node, offset]
                if not places[value]:
                    del places[value]
        self._count([value for node in nodes for value in node.hashes], -1)

    def probe(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str
    ) -> tuple[Int64[np.ndarray, "hits"], UInt64[np.ndarray, "hits"]]:
        """The offsets whose window may be stored, ascending, and the hashes there."""
        hashes = window_hashes(tokens, self._salt(namespace))
        offsets = np.flatnonzero(self._counts[hashes >> self._shift])
        return offsets, hashes[offsets]

    def __contains__(self, value: int) -> bool:
        """Whether a window of this hash is stored: the filter's word checked, one dictionary lookup."""
        return value in self._exact or value in self._approximate

    def candidates(self, value: int) -> Iterator[tuple[Node, int]]:
        """Where a window of this hash is stored: exact places first, the latest first, at most 16."""
        exact, approximate = self._exact.get(value, {}), self._approximate.get(value, {})
        return itertools.islice(itertools.chain(reversed(exact), reversed(approximate)), MAX_CANDIDATES)

    def check(self, nodes: Sequence[Node]) -> None:
        """Raise AssertionError unless exactly the windows of these nodes are indexed."""
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
