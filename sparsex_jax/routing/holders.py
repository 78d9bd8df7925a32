"""Which replicas hold a sample: an inverted index, so that a prompt costs as much for 1000 replicas as for 10."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int64

_NONE: dict[int, int] = {}


class Holders:
    """By tag and sample, the slots that hold it, as the bits of one integer. A slot is a replica's place in arrays.

    Example: slots 0 and 2 hold sample 7, so its integer is 0b101.
    """

    def __init__(self) -> None:
        self._slots_of: dict[bytes, dict[int, int]] = {}
        self._samples_of: dict[int, dict[bytes, set[int]]] = {}

    def add(self, slot: int, tag: bytes, samples: Iterable[int]) -> None:
        """The slot holds these from now on. Those that it holds already stay."""
        bit, slots_of = 1 << slot, self._slots_of.setdefault(tag, {})
        own = self._samples_of.setdefault(slot, {}).setdefault(tag, set())
        for sample in samples:
            own.add(sample)
            slots_of[sample] = slots_of.get(sample, 0) | bit
        self._forget_empty(slot, tag)

    def remove(self, slot: int, tag: bytes, samples: Iterable[int]) -> None:
        """The slot holds none of these any more. Those that it does not hold are ignored."""
        own = self._samples_of.get(slot, {}).get(tag, set())
        gone = own.intersection(samples)
        own -= gone
        slots_of = self._slots_of.get(tag, _NONE)
        for sample in gone:
            slots_of[sample] &= ~(1 << slot)
            if not slots_of[sample]:
                del slots_of[sample]
        self._forget_empty(slot, tag)

    def replace(self, slot: int, held: Mapping[bytes, set[int]]) -> None:
        """The slot holds these, and nothing else."""
        before = self._samples_of.get(slot, {})
        for tag in [*before]:
            self.remove(slot, tag, before[tag] - held.get(tag, set()))
        for tag, samples in held.items():
            self.add(slot, tag, samples - before.get(tag, set()))

    def _forget_empty(self, slot: int, tag: bytes) -> None:
        by_tag = self._samples_of.get(slot, {})
        if tag in by_tag and not by_tag[tag]:
            del by_tag[tag]
        if not by_tag:
            self._samples_of.pop(slot, None)
        if tag in self._slots_of and not self._slots_of[tag]:
            del self._slots_of[tag]

    def held(self, slot: int) -> dict[bytes, set[int]]:
        """All that a slot holds."""
        return {tag: set(samples) for tag, samples in self._samples_of.get(slot, {}).items()}

    def of(self, tag: bytes) -> Mapping[int, int]:
        """By sample, the slots that hold it."""
        return self._slots_of.get(tag, _NONE)

    def num_held(self, slot: int) -> int:
        """How many samples a slot holds."""
        return sum(map(len, self._samples_of.get(slot, {}).values()))

    @property
    def num_samples(self) -> int:
        """Different ones; one that several slots hold counts once."""
        return sum(map(len, self._slots_of.values()))

    def check(self) -> None:
        """Raise AssertionError unless both directions say the same."""
        expected: dict[bytes, dict[int, int]] = {}
        for slot, by_tag in self._samples_of.items():
            for tag, samples in by_tag.items():
                assert samples
                for sample in samples:
                    slots_of = expected.setdefault(tag, {})
                    slots_of[sample] = slots_of.get(sample, 0) | 1 << slot
        assert expected == self._slots_of


def counted(found: Iterable[int], num_slots: int) -> Int64[np.ndarray, "slots"]:
    """For each slot, how many of these integers have its bit.

    >>> counted([0b101, 0b001], 3)
    array([2, 0, 1])
    """
    width = (num_slots + 7) // 8
    rows = np.frombuffer(b"".join(each.to_bytes(width, "little") for each in found), np.uint8).reshape(-1, width)
    return np.unpackbits(rows, axis=1, bitorder="little")[:, :num_slots].sum(axis=0, dtype=np.int64)
