"""The process: a socket, signals, and an end in good order."""

from __future__ import annotations

import asyncio
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sparsex_jax.serving.app import Service


class Server(uvicorn.Server):
    """A uvicorn server that drains before it closes its socket, so that clients are told to go elsewhere.

    The first SIGTERM or SIGINT begins that, and the process ends with exit code 0. The second ends it at once.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        # Keep-alive connections that are idle when the socket closes are closed too, so nothing waits for them.
        super().__init__(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10))
        self._service: Service = app.state.service
        self._drained: asyncio.Future[None] | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list | None = None) -> None:
        self._asyncio = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called as a signal's handler, between any two instructions of the event loop's thread."""
        if self._service.worker.draining or self._asyncio is None:
            self.should_exit = self.force_exit = True
        else:
            self._service.worker.draining = True
            self._asyncio.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuse what is new, finish what runs, then stop."""
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.worker.drain(self._service.limits.drain_timeout)
        self.should_exit = True
