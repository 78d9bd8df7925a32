"""The server's process: its sockets, its connections, and the signals that end it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sparsex_jax.serving.connections import MAX_HEAD_BYTES, Connection
from sparsex_jax.serving.health import LIVE, state_of
from sparsex_jax.serving.service import Service
from sparsex_jax.serving.sockets import bound, make_ready
from sparsex_jax.serving.supervisor import ALIVE, READY, STOPPING, Supervisor

# systemd, supervisord and `timeout` signal the whole process group, and `uv run` passes on what it gets itself.
_ONE_WISH_S = 1.0
_LOOK_TICKS = 10  # of 0.1 s
_OTHER_FILES = 256  # that the process has open beside connections


class Server(uvicorn.Server):
    """A uvicorn server that drains before it closes its socket, so that new requests get a 503 with Retry-After.

    The first SIGTERM or SIGINT starts draining, after which the process ends with exit code 0. One that comes later
    than a second after it ends the process at once.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        sockets: Sequence[socket.socket] = (),
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          sockets: bound ones to listen at. None given: those of host and port, bound when it runs.
          on_listening: called once, when clients can connect.
        """
        self._service: Service = app.state.service
        self._address, self._sockets, self._on_listening = (host, port), list(sockets), on_listening
        # uvicorn closes idle keep-alive connections together with the socket, so it does not wait for them.
        config = uvicorn.Config(
            app,
            loop="asyncio",  # uvloop reads 32 times before it turns to the next connection
            http=functools.partial(Connection, **self._connection_limits()),  # type: ignore[arg-type]
            ws="none",
            log_level="error",
            access_log=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=10,
        )
        super().__init__(config)
        self._supervisor = Supervisor()
        self._drained: asyncio.Future[None] | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._signalled_s: float | None = None

    def _connection_limits(self) -> dict[str, float]:
        limits, places = self._service.limits, self._service.line.places
        return {
            "client_timeout": limits.client_timeout,
            "max_connections": _as_files_allow(limits.max_connections or 2 * places + 512),
            "max_unread": limits.max_body_bytes,
        }

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal ends it. The process is the server's from now on."""
        _answer_soon()
        super().run(sockets)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._asyncio = asyncio.get_running_loop()
        with contextlib.ExitStack() as held:
            listeners = sockets or self._sockets or held.enter_context(bound(*self._address))
            for each in listeners:
                make_ready(each)
            await super().serve(listeners)
        if self._signalled_s is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # the rest of the same wish does not change the exit code
                signal.signal(number, signal.SIG_IGN)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()
            self._supervisor.tell(READY)

    async def on_tick(self, counter: int) -> bool:
        if counter % _LOOK_TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.look(now)  # type: ignore[union-attr]
            if state_of(self._service.worker, self._service.limits) in LIVE:
                self._supervisor.tell(ALIVE)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. Python may call this between any two instructions of the event loop's thread."""
        now = time.monotonic()
        if self._signalled_s is None and self._asyncio is not None:
            self._signalled_s = now
            self._service.worker.draining = True
            self._asyncio.call_soon_threadsafe(self.drain)
        elif self._signalled_s is None or now - self._signalled_s > _ONE_WISH_S:
            signal.signal(sig, signal.SIG_DFL)  # without a teardown, in which the device's threads would abort
            signal.raise_signal(sig)

    def drain(self) -> None:
        """Refuse new requests, let running ones finish, then stop."""
        self._supervisor.tell(STOPPING)
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.worker.drain(self._service.limits.drain_timeout)
        self.should_exit = True


def _answer_soon() -> None:
    """Settings of the interpreter by which clients wait less."""
    sys.setswitchinterval(0.001)  # the event loop's thread gets its turn sooner
    gc.collect()
    gc.freeze()  # a collection that walks all objects of the model and the libraries stops the server for half a second


def _as_files_allow(connections: int) -> int:
    """Raise the process's limit of open files as far as it may, and return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else min(connections, max(soft - _OTHER_FILES, 16))
