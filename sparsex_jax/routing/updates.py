"""Updates of digests, and their bytes.

    SXD1 | whole: u8 | epoch: u64 | seq: u64 | tags: u32 | for each tag: 8 bytes, added: u32, removed: u32, the samples

All numbers are little-endian, samples are u32.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping

import numpy as np

from sparsex_jax.errors import DigestError

_MAGIC = b"SXD1"
_HEAD, _TAG = struct.Struct("<4sBQQI"), struct.Struct("<8sII")


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """What a replica tells routers of its digest.

    Attributes:
      epoch: stands for the replica's process. Updates of different epochs have nothing to do with each other.
      seq: of a delta: its number, from 1 on without gaps. Of a snapshot: the number of the last delta in it.
      whole: whether `added` is all that the replica holds, and not a delta.
      added: by tag, uint32 samples [n] that are held from now on, each once.
      removed: by tag, uint32 samples [n] that are held no longer. None of them is in `added`.
    """

    epoch: int
    seq: int
    whole: bool
    added: Mapping[bytes, np.ndarray]
    removed: Mapping[bytes, np.ndarray]

    def to_bytes(self) -> bytes:
        tags = list(dict.fromkeys([*self.added, *self.removed]))
        parts = [_HEAD.pack(_MAGIC, self.whole, self.epoch, self.seq, len(tags))]
        for tag in tags:
            both = [np.asarray(samples.get(tag, ()), "<u4") for samples in (self.added, self.removed)]
            parts += [_TAG.pack(tag, *map(len, both)), *(samples.tobytes() for samples in both)]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Update:
        """Raises DigestError if these are not the bytes of an update."""
        if len(data) < _HEAD.size or data[:4] != _MAGIC:
            raise DigestError("update: it does not begin as one")
        _, whole, epoch, seq, num_tags = _HEAD.unpack_from(data)
        added, removed, at = dict[bytes, np.ndarray](), dict[bytes, np.ndarray](), _HEAD.size
        for _ in range(num_tags):
            tag, *lengths = _TAG.unpack(_part(data, at, _TAG.size))
            at += _TAG.size
            for by_tag, length in zip((added, removed), lengths, strict=True):
                samples = np.frombuffer(_part(data, at, 4 * length), "<u4")
                at += 4 * length
                if length:
                    by_tag[tag] = samples
        if at != len(data):
            raise DigestError(f"update: {len(data) - at} bytes are left over")
        return cls(epoch, seq, bool(whole), added, removed)


def _part(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise DigestError(f"update: it ends after {len(data)} bytes, in the middle of a part")
    return data[at : at + size]
