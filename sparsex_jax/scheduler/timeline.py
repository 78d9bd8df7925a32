"""When the parts of a sequence's way began and ended, for traces.

    name      from                                            to
    queue     submitted, or preempted                         admitted
    lookup    its tokens are looked up and its plan is laid   the plan has its pages
    load      a part of it is asked for from a lower tier     that is in the store
    copy      copies of segments are dispatched               the host goes on; devices make them within the prefill
    probe     admitted, to find what an excerpt keeps         it waits again
    prefill   admitted                                        the first token, or it is preempted
    decode    the first token                                 its end, or it is preempted

Others run in between, so a prefill lasts longer than it computes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Interval(NamedTuple):
    """A part, on `time.perf_counter`'s clock.

    Attributes:
      tokens: that were loaded or copied; None of other parts.
    """

    name: str
    begin: float
    end: float
    tokens: int | None = None


class Timeline:
    """The intervals of one sequence. For the loop's thread, until the sequence had its last event.

    Attributes:
      intervals: those that have ended, in that order.
    """

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self._state: tuple[str, float] | None = None
        self._ended = False

    def enter(self, name: str) -> None:
        """The sequence is in this state now, which ends the one before. Nothing happens once it has ended."""
        if not self._ended:
            self._leave()
            self._state = name, time.perf_counter()

    def end(self) -> None:
        """The sequence has ended."""
        self._leave()
        self._ended = True

    def _leave(self) -> None:
        if self._state is not None:
            self.add(*self._state)
        self._state = None

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """The block is a part, if it does not raise."""
        begin = time.perf_counter()
        yield
        self.add(name, begin)

    def add(self, name: str, begin: float, tokens: int | None = None) -> None:
        """A part that began then ends now."""
        self.intervals.append(Interval(name, begin, time.perf_counter(), tokens))


class _Untimed(Timeline):
    """Keeps nothing: of a sequence that nobody traces."""

    def enter(self, name: str) -> None:
        """Nobody asks."""

    def add(self, name: str, begin: float, tokens: int | None = None) -> None:
        """Nobody asks."""


UNTIMED = _Untimed()
