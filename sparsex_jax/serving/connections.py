"""Connections as uvicorn has them, with limits of time, number and work, so that no client can hold up the others.

What a client may keep the server waiting for is looked at once a second: see `Connection.look`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Buffer
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# A read is parsed in one go, on the event loop. Chunks of one byte are the worst, with 10 microseconds for 6 bytes; a
# usual read takes 50 in all. So reads begin small and grow while they are cheap. Many that are not end a connection.
_LEAST_BYTES, _READ_BYTES = 1 << 10, 32 << 10
_MOST_COSTLY_READS = 16
_WRITE_BYTES = 64 << 10  # more waits in the response, not in the connection's buffer
MAX_HEAD_BYTES = 32 << 10


def _is_costly(num_bytes: int, work_s: float) -> bool:
    return num_bytes >= 256 and work_s > 3e-4 + num_bytes * 5e-7


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """A client's connection. As a `BufferedProtocol` it reads no more at a time than its buffer holds.

    Attributes:
      since: when the last answer ended, or the next request began.
    """

    def __init__(self, *, client_timeout: float, max_connections: int, max_unread: int, **of_uvicorn: Any) -> None:
        """
        Args:
          client_timeout: seconds that a client may take to send a request, and to take the next part of an answer.
          max_connections: with more, the one that has owed a request for longest is closed.
          max_unread: bytes of a body that are thrown away behind an answer that did not wait for it.
        """
        super().__init__(**of_uvicorn)
        self._client_timeout, self._max_connections, self._max_unread = client_timeout, max_connections, max_unread
        self._buffer, self._next_bytes = memoryview(bytearray(_READ_BYTES)), _LEAST_BYTES
        self.since = self.loop.time()
        self._unsent, self._sent_at = 0, self.since
        self._unread, self._costly_reads = 0, 0

    @property
    def owes_a_request(self) -> bool:
        """The client has to send a request, or the rest of one. Otherwise the server has to answer."""
        return self._is_between_requests or self.cycle.more_body

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # From the transport -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_WRITE_BYTES)
        if len(self.connections) > self._max_connections:
            self._make_room()

    def get_buffer(self, sizehint: int) -> Buffer:
        return self._buffer[: self._next_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        before, started = self.cycle, time.thread_time()
        super().data_received(data)
        if self.cycle is not before:
            self.since, self._unread, self._costly_reads = self.loop.time(), 0, 0
        self._account(len(data), time.thread_time() - started)

    def _account(self, num_bytes: int, work_s: float) -> None:
        """Close the connection if its bytes take too much work, or come behind an answer without end."""
        costly = _is_costly(num_bytes, work_s)
        self._next_bytes = _LEAST_BYTES if costly else min(2 * self._next_bytes, _READ_BYTES)
        self._costly_reads += costly
        self._unread += num_bytes if self._is_between_requests else 0
        if self._costly_reads > _MOST_COSTLY_READS or self._unread > self._max_unread:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self.since, self._unread = self.loop.time(), 0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # in the middle of an answer
            self.transport.abort()

    # Limits -------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Close the connection if the client takes nothing of its answer, or sends no request, for too long.

        A body that comes slowly is for its reader to refuse, which knows how long it may take.
        """
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._sent_at = now
        self._unsent = unsent
        if now - self._sent_at > self._client_timeout:
            self.transport.abort()
        elif self._is_between_requests and now - self.since > self._client_timeout:
            self.transport.close()

    def _make_room(self) -> None:
        others: list[Connection] = [other for other in self.connections if other is not self]  # type: ignore[misc]
        owing = [other for other in others if other.owes_a_request and not other.transport.is_closing()]
        if owing:
            min(owing, key=lambda other: other.since).transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()


def _full() -> bytes:
    """A whole response, since there is no request yet that could have one."""
    error = {"message": "the server has too many connections", "type": "server_error", "param": None}
    body = json.dumps({"error": error | {"code": "overloaded"}})
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}retry-after: 5\r\nconnection: close\r\n\r\n{body}".encode()


_FULL = _full()
