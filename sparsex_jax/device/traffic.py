"""What is on the link at a time, and how long it will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sparsex_jax.device.link import Arriving, HostBlock, Link
from sparsex_jax.errors import LinkError
from sparsex_jax.reuse.pace import Pace


@dataclasses.dataclass(eq=False)
class Flight[Owner]:
    """Groups of a chunk's layers on their way to the devices.

    Attributes:
      owner: whose.
      chunk, groups: which of the owner's chunks, and which groups of layers.
      arriving: their pieces. None once the load has failed.
      nbytes: that move.
      since: when it began.
    """

    owner: Owner
    chunk: int
    groups: list[int]
    arriving: Arriving | None
    nbytes: int
    since: float


class Traffic[Owner]:
    """Flights on a link, which take it one after the other.

    Attributes:
      flights: those on the link, the first one first.
    """

    def __init__(self, link: Link, pace: Pace, clock: Callable[[], float]) -> None:
        self._link, self._pace, self._clock = link, pace, clock
        self.flights: list[Flight[Owner]] = []
        self._heard_at = 0.0  # when the link began to be busy, or something arrived last

    @property
    def nbytes(self) -> int:
        return sum(flight.nbytes for flight in self.flights)

    def send(self, owner: Owner, chunk: int, groups: Sequence[int], block: HostBlock) -> bool:
        """Begin to load some groups of a block. False if that failed at once."""
        now = self._clock()
        try:
            arriving = self._link.fetch(block, groups)
        except LinkError:
            return False
        if not self.flights:
            self._heard_at = now
        self.flights.append(Flight(owner, chunk, list(groups), arriving, arriving.nbytes, now))
        return True

    def any_arrived(self) -> bool:
        return any(map(_has_ended, self.flights))

    def take_arrived(self) -> list[Flight[Owner]]:
        """What has arrived, or failed, since this was asked last. The pace of the link is learnt from it."""
        ended = [flight for flight in self.flights if _has_ended(flight)]
        self.flights = [flight for flight in self.flights if flight not in ended]
        if nbytes := sum(flight.nbytes for flight in ended if flight.arriving is not None):
            self._learn(nbytes)
        return ended

    def _learn(self, nbytes: int) -> None:
        """Correct the pace by what has arrived since the link was heard of last.

        If nothing is left on it, it may have been idle for a while: then it is at least as fast as that.
        """
        now = self._clock()
        took, expected = now - self._heard_at, self._pace.load_seconds(nbytes)
        if self.flights or took < expected or not self._pace.link.known:
            self._pace.link.correct(expected, took)
        self._heard_at = now

    def seconds(self, more: int | float = 0) -> float:
        """What the link takes for all that is on it, and so many bytes more.

        The longer it has not been heard of, the slower it is taken to be.
        """
        seconds = self._pace.load_seconds(more + self.nbytes)
        if not self.flights:
            return seconds
        first = self.flights[0]
        silent = self._clock() - max(self._heard_at, first.since)
        return seconds * max(silent / max(self._pace.load_seconds(first.nbytes), 1e-9), 1.0)


def _has_ended[Owner](flight: Flight[Owner]) -> bool:
    """Whether it has arrived, or has failed, which is noted."""
    try:
        return flight.arriving is None or flight.arriving.ready()
    except LinkError:
        flight.arriving = None
        return True
