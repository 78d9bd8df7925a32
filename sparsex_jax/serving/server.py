"""The server process: its socket, its signals, and how it stops."""

from __future__ import annotations

import asyncio
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sparsex_jax.serving.app import Service


class Server(uvicorn.Server):
    """A uvicorn server that drains before it closes its socket, so that new requests get a 503 with Retry-After.

    The first SIGTERM or SIGINT starts draining, after which the process ends with exit code 0. The second one ends the
    process at once.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        # uvicorn closes idle keep-alive connections together with the socket, so it does not wait for them.
        super().__init__(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10))
        self._service: Service = app.state.service
        self._drained: asyncio.Future[None] | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list | None = None) -> None:
        self._asyncio = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. Python may call this between any two instructions of the event loop's thread."""
        if self._service.worker.draining or self._asyncio is None:
            self.should_exit = self.force_exit = True
        else:
            self._service.worker.draining = True
            self._asyncio.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuse new requests, let running ones finish, then stop."""
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.worker.drain(self._service.limits.drain_timeout)
        self.should_exit = True
