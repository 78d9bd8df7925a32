"""The replicas of a fleet as arrays, so that a choice among 1000 costs a few array operations."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float64, Int64

from sparsex_jax.routing.policy import Candidates

_LEAST_SLOTS = 8
_NUMBERS = np.dtype(
    [
        ("hash", np.uint64),
        ("heard_s", np.float64),
        ("sent_tokens", np.float64),  # of requests that were sent there and have no token yet
        ("sent_running", np.int64),  # requests that were sent there and have one
        ("told_tokens", np.float64),  # by the replica's own word
        ("told_running", np.int64),
    ]
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a replica says that it has to do, requests of other routers included.

    Attributes:
      queued_tokens: of prompts that wait or are being prefilled, as far as they are not computed.
      running: sequences that are decoded.
    """

    queued_tokens: float = 0.0
    running: int = 0


class Fleet:
    """Replicas by slot: a place in the arrays, which another replica gets when this one has left.

    Attributes:
      slots: by name, in the order in which they joined.
      numbers: a record for each slot.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.numbers = np.zeros(_LEAST_SLOTS, _NUMBERS)
        self._names: list[str | None] = [None] * _LEAST_SLOTS

    def join(self, name: str, now: float) -> int:
        """The slot of a new replica."""
        if None not in self._names:
            self.numbers = np.concatenate([self.numbers, np.zeros_like(self.numbers)])
            self._names += [None] * len(self._names)
        slot = self._names.index(None)
        self.slots[name], self._names[slot] = slot, name
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.numbers[slot] = (int.from_bytes(digest, "little"), now, 0, 0, 0, 0)
        return slot

    def leave(self, name: str) -> int | None:
        """The slot that is free now; None if there is no such replica."""
        slot = self.slots.pop(name, None)
        if slot is not None:
            self._names[slot], self.numbers[slot] = None, np.zeros((), _NUMBERS)
        return slot

    def name(self, slot: int) -> str:
        name = self._names[slot]
        assert name is not None
        return name

    def queued(self) -> Float64[np.ndarray, "slots"]:
        """Tokens to compute: by a replica's own word, or by what was sent there, whichever is more."""
        return np.maximum(self.numbers["told_tokens"], self.numbers["sent_tokens"])

    def running(self) -> Int64[np.ndarray, "slots"]:
        return np.maximum(self.numbers["told_running"], self.numbers["sent_running"])

    def candidates(self, slots: Int64[np.ndarray, "replicas"], hits: Float64[np.ndarray, "slots"]) -> Candidates:
        """The replicas in these slots.

        Args:
          hits: for each slot of the arrays.
        """
        return Candidates(hits[slots], self.queued()[slots], self.running()[slots], self.numbers["hash"][slots])

    def tell(self, slot: int, load: Load) -> None:
        self.numbers["told_tokens"][slot], self.numbers["told_running"][slot] = load.queued_tokens, load.running
