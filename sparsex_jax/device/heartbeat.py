"""How long a thread has worked without getting anything done, which tells one that hangs from one that has no work."""

from __future__ import annotations

import time

from sparsex_jax.device.compilation import num_compilations


class Heartbeat:
    """Of one thread, which calls `beat` and `rest`. One other thread may ask how long it has been silent."""

    def __init__(self) -> None:
        self._since: float | None = None  # `time.monotonic()` of the last beat; None while the thread rests
        self._compiled = (num_compilations(), 0.0)  # programs, and when the asking thread first saw so many

    def beat(self) -> None:
        """The thread got something done, and goes on."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """The thread waits for work."""
        self._since = None

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 while the thread rests. A program that was compiled since is a beat too."""
        since, now, compiled = self._since, time.monotonic(), num_compilations()
        if compiled != self._compiled[0]:
            self._compiled = compiled, now
        return 0.0 if since is None else now - max(since, self._compiled[1])
