"""The request log: a line of JSON for each request, to a file or to standard output.

Lines are written on a thread of their own, so a slow disk, or a pipe that nobody reads, stalls no request.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from sparsex_jax.errors import InvalidRequestError

if TYPE_CHECKING:
    from sparsex_jax.serving.exchange import Exchange

STANDARD_OUTPUT = Path("-")
_MOST_LINES = 10_000  # that wait to be written
_FAREWELL_S = 5.0  # for them to be written when the server stops
# What probes and browsers fetch all the time, and none of which asks the model anything.
_NOT_LOGGED = ("/health", "/health/live", "/health/ready", "/metrics", "/v1/store", "/", "/page")

log = logging.getLogger(__name__)


def asks_something(exchange: Exchange) -> bool:
    """Whether it is more than a probe, or a part of the page."""
    return exchange.path not in _NOT_LOGGED and not exchange.path.startswith("/page/")


class RequestLog:
    """Takes exchanges that are over, and writes them."""

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="sparsex-request-log", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path) -> RequestLog:
        """Log to the end of a file, which may be moved away to begin a new one, or to standard output (`-`).

        Raises:
          InvalidRequestError: the file cannot be written.
        """
        if path == STANDARD_OUTPUT:
            return cls(logging.StreamHandler(sys.stdout))
        try:
            return cls(WatchedFileHandler(path, encoding="utf-8"))
        except OSError as error:
            raise InvalidRequestError(f"request_log={str(path)!r} cannot be written: {error}") from error

    def write(self, exchange: Exchange) -> None:
        """Log an exchange, unless it is none that asks the model, or too many lines wait to be written."""
        if not asks_something(exchange):
            return
        try:
            self._lines.put_nowait(json.dumps(exchange.to_dict()))
        except queue.Full:
            self._drop()

    def _drop(self) -> None:
        if self._dropped == 0:
            log.warning("the request log takes no more lines; %d wait already, and new ones are dropped", _MOST_LINES)
        self._dropped += 1

    def close(self) -> None:
        """Write what waits, for a few seconds at most. What comes after is not written."""
        try:
            self._lines.put(None, timeout=_FAREWELL_S)
        except queue.Full:
            return
        self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._handler.emit(logging.makeLogRecord({"msg": line}))
        self._handler.close()
