"""What a replica says of its store: a sample of the windows in it, as 32-bit numbers under the tag of their namespace.

A window is 8 tokens in a row, as in `cache.windows`. The numbers of all windows are computed, at every offset, and of
those one in `every` is kept, chosen by the number itself. So whoever has the same text keeps the same windows of it,
wherever it stands in a prompt or in a page; this is how near-duplicate files are found (Manber, "Finding similar files
in a large file system", 1994). The share of a prompt's sample that a replica holds estimates the share of its tokens:

    prompt    . . . . s1 . . . . . . s2 . . . s3 . . . . . . . . s4 . .     100 tokens, sample s1 s2 s3 s4
    replica   s1 s2 s4 and others                                           3 of 4, so about 75 tokens

Namespaces are a boundary. Tag and numbers are made with a key that only the fleet has, and those of two namespaces have
nothing in common. So who reads a digest without the key learns how much is stored and nothing of what; and a prompt of
one namespace is never told of another's content, whatever it says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32, UInt32

from sparsex_jax.cache.windows import WINDOW, mix, window_hashes
from sparsex_jax.config.checks import is_int, require
from sparsex_jax.routing.updates import Update

TAG_BYTES = 8
LEAST_KEY_BYTES = 16
_NOTHING = np.zeros(0, np.uint32)


@dataclasses.dataclass(frozen=True)
class Sketch:
    """How digests are made. All replicas and routers of a fleet have the same one.

    Attributes:
      key: the fleet's secret, at least 16 bytes.
      every: one window in so many is kept, a power of two. Digests take 4 / every bytes for each stored token; texts of
        fewer than about 4 * every tokens are estimated badly.
    """

    key: bytes = dataclasses.field(repr=False)
    every: int = 16

    def __post_init__(self) -> None:
        is_key = isinstance(self.key, bytes) and len(self.key) >= LEAST_KEY_BYTES
        require(is_key, f"key must be at least {LEAST_KEY_BYTES} bytes")
        is_power = is_int(self.every) and 0 < self.every <= 1 << 16 and self.every & (self.every - 1) == 0
        require(is_power, f"every={self.every!r} must be a power of two, from 1 to 65536")

    def tag(self, namespace: str) -> bytes:
        """The 8 bytes that stand for a namespace."""
        return self._digest(namespace, b"tag")

    def samples(self, tokens: Int32[np.ndarray, "tokens"], namespace: str) -> UInt32[np.ndarray, "samples"]:
        """The sample of a text, in order of offsets. It is empty for fewer than 8 tokens."""
        return self.samples_of_each(tokens[None], namespace)[0]

    def samples_of_each(self, texts: Int32[np.ndarray, "texts tokens"], namespace: str) -> list[np.ndarray]:
        """The samples of several texts of one length, which costs little more than those of one."""
        if texts.shape[1] < WINDOW:
            return [_NOTHING] * len(texts)
        salt = int.from_bytes(self._digest(namespace, b"salt"), "little")
        numbers = mix(window_hashes(texts, salt))
        is_kept = numbers & np.uint64(self.every - 1) == 0
        upper = (numbers >> np.uint64(32)).astype(np.uint32)
        return [row[kept] for row, kept in zip(upper, is_kept, strict=True)]

    def _digest(self, namespace: str, use: bytes) -> bytes:
        key = hashlib.blake2b(self.key).digest()  # a key of any length becomes one of 64 bytes
        return hashlib.blake2b(namespace.encode(), key=key, digest_size=TAG_BYTES, person=use).digest()


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a router knows of a request.

    Attributes:
      tag: that of its namespace.
      samples: of its prompt, in order.
      num_tokens: of its prompt.
      group: requests of the same group go to the same replica while it lives, such as the members of a round. None: it
        is of no group.
    """

    tag: bytes
    samples: UInt32[np.ndarray, "samples"]
    num_tokens: int
    group: bytes | None = None

    @classmethod
    def of(cls, sketch: Sketch, tokens: Int32[np.ndarray, "tokens"], namespace: str, group: bytes | None = None) -> Ask:
        return cls(sketch.tag(namespace), sketch.samples(tokens, namespace), len(tokens), group)


class Holdings:
    """What one replica holds, and what of it was not told yet. For one thread.

    A window may be stored in several places. Routers are told of the first that comes and of the last that goes.

    Attributes:
      epoch: stands for this object. Another one, as after a restart, has another.
      seq: the number of the last delta; 0 if there was none.
    """

    def __init__(self) -> None:
        self.epoch, self.seq = secrets.randbits(63), 0
        self._counts: dict[bytes, Counter[int]] = {}
        self._changed: dict[bytes, dict[int, bool]] = {}  # by tag: a sample, and whether it is held now

    def add(self, tag: bytes, samples: Iterable[int]) -> None:
        """A text with this sample was stored."""
        counts = self._counts.setdefault(tag, Counter())
        for sample in samples:
            counts[sample] += 1
            if counts[sample] == 1:
                self._change(tag, sample, True)

    def remove(self, tag: bytes, samples: Iterable[int]) -> None:
        """A text that was added is gone. Raises KeyError if it never was."""
        counts = self._counts.get(tag, Counter())
        for sample in samples:
            if counts[sample] < 1:
                raise KeyError(f"sample {sample} is removed more often than it was added")
            counts[sample] -= 1
            if counts[sample] == 0:
                del counts[sample]
                self._change(tag, sample, False)
        if not counts:
            self._counts.pop(tag, None)

    def _change(self, tag: bytes, sample: int, held: bool) -> None:
        """What is taken back before it was told is not told at all."""
        changed = self._changed.setdefault(tag, {})
        if changed.pop(sample, held) == held:
            changed[sample] = held

    def delta(self) -> Update | None:
        """What changed since the last one; None if nothing did."""
        changed = {tag: each for tag, each in self._changed.items() if each}
        self._changed = {}
        if not changed:
            return None
        self.seq += 1
        added = {tag: _array(each, True) for tag, each in changed.items()}
        removed = {tag: _array(each, False) for tag, each in changed.items()}
        return Update(self.epoch, self.seq, False, _without_empty(added), _without_empty(removed))

    def snapshot(self) -> Update:
        """All that is held now. The next delta may be applied to it."""
        held = {tag: np.fromiter(counts, np.uint32, len(counts)) for tag, counts in self._counts.items()}
        return Update(self.epoch, self.seq, True, held, {})

    @property
    def num_samples(self) -> int:
        return sum(map(len, self._counts.values()))


def _array(changed: dict[int, bool], held: bool) -> UInt32[np.ndarray, "samples"]:
    return np.array([sample for sample, is_held in changed.items() if is_held == held], np.uint32)


def _without_empty(by_tag: dict[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
    return {tag: samples for tag, samples in by_tag.items() if len(samples)}
