"""How far a submitted job is, in numbers and seconds: what metrics and the request log say of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsex_jax.reuse.report import Report
    from sparsex_jax.scheduler.loop import Event


class Progress:
    """What the events of one job brought so far, and when. All times are seconds from its request's place in line on.

    Attributes:
      new_tokens: how many came.
      report: of the prefill.
      queue_s: until it was first admitted.
      ttft_s: until its first token. None for a text to keep, which gets none.
      total_s: until its last event.
      started: as given.
      finish_reason: stop, length, cancelled, error or timeout.
    """

    def __init__(self, started: float) -> None:
        """
        Args:
          started: when its request came in line, on `time.perf_counter`'s clock.
        """
        self.new_tokens = 0
        self.report: Report | None = None
        self.queue_s: float | None = None
        self.ttft_s: float | None = None
        self.total_s: float | None = None
        self.finish_reason: str | None = None
        self.started, self._submitted_s = started, time.perf_counter() - started
        self._last_s = 0.0  # of tokens
        self._later = 0  # tokens behind the first event that had some

    def take(self, event: Event) -> None:
        """Record an event."""
        now = time.perf_counter() - self.started
        self.report = event.report or self.report
        if event.queue_s is not None:
            self.queue_s = self._submitted_s + event.queue_s
        if event.token_ids:
            self._take_tokens(len(event.token_ids), now)
        if event.finish_reason is not None:
            self.finish_reason, self.total_s = event.finish_reason, now

    def _take_tokens(self, number: int, now: float) -> None:
        if self.ttft_s is None:
            self.ttft_s = now
        else:
            self._later += number
        self.new_tokens += number
        self._last_s = now

    def seconds_per_token(self) -> float | None:
        """Of the tokens behind the first event, since an event may have several; None if there was only one event."""
        return (self._last_s - self.ttft_s) / self._later if self.ttft_s is not None and self._later else None
