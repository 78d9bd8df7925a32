"""Seals: what only members of a fleet can put on a message, so that others can neither ask for KV nor send any."""

from __future__ import annotations

import hashlib
import hmac

HEADER = "x-sparsex-seal"


class Seal:
    """Made with the fleet's secret. It hides nothing: who can read the network can read what is sent."""

    def __init__(self, key: bytes) -> None:
        """
        Args:
          key: the fleet's secret, `Sketch.key`.
        """
        self._key = hashlib.blake2b(key, person=b"sparsex peers").digest()

    def of(self, *parts: bytes | bytearray) -> str:
        """The seal of these parts in this order, 64 hexadecimal digits."""
        digest = hashlib.blake2b(key=self._key, digest_size=32)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def is_of(self, seal: str | None, *parts: bytes | bytearray) -> bool:
        """Whether it is the seal of these parts."""
        return seal is not None and hmac.compare_digest(self.of(*parts).encode(), seal.encode(errors="replace"))
