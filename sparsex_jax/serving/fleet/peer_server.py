"""Gives blocks of a replica's lower tiers to other replicas of its fleet, over HTTP.

It listens at an address of its own, beside the endpoint that clients see, and answers who knows the fleet's secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sparsex_jax.errors import SparsexError
from sparsex_jax.scheduler.peering import Peering
from sparsex_jax.serving.fleet import peer_messages as messages
from sparsex_jax.serving.fleet.peer_counts import ServedCounts
from sparsex_jax.serving.fleet.seal import HEADER, Seal
from sparsex_jax.serving.sockets import bound, url_of
from sparsex_jax.serving.worker import Worker
from sparsex_jax.tiers.block_file import BlockFile

_MOST_ANSWERED = 4  # requests at once; a block that one sends is not freed meanwhile
_MOST_S = 30.0  # of an answer, to one who does not read it
_AT_ONCE = 1 << 20  # bytes that are handed to a connection before it is waited for
_HEX_BYTES = 8  # of a token
_BESIDE_TOKENS = 1 << 20  # bytes of a request


class _Answer(NamedTuple):
    """A response's body, in parts, and what of it is sealed."""

    parts: Sequence[bytes | memoryview]
    sealed: bytes


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are for the process, which serves something else beside this


class PeerServer:
    """From `start` to `stop`.

    Attributes:
      counts: what was asked for so far.
    """

    def __init__(self, worker: Worker, peering: Peering, model: str, seal: Seal) -> None:
        """
        Args:
          model: the digest of the engine's fingerprint.
        """
        self.counts = ServedCounts()
        self._worker, self._peering, self._model, self._seal = worker, peering, model, seal
        self._most_bytes = _HEX_BYTES * worker.engine.model.max_position + _BESIDE_TOKENS
        self._answering = asyncio.Semaphore(_MOST_ANSWERED)
        routes = [self._route(messages.LOOKUP, self._look_up), self._route(messages.BLOCK, self._send)]
        self._app = Starlette(routes=routes)
        self._held = contextlib.ExitStack()
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen, on the event loop that runs. Returns the address. Raises AddressError: it cannot be had."""
        sockets = self._held.enter_context(bound(host, port))
        config = uvicorn.Config(
            self._bounded, interface="asgi3", lifespan="off", log_level="error", access_log=False, ws="none"
        )
        self._server = _Uvicorn(config)
        self._serving = asyncio.ensure_future(self._server.serve(_listening(sockets)))
        return url_of(sockets[0])

    async def stop(self) -> None:
        if self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.wait([self._serving])
        self._held.close()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answering, asyncio.timeout(_MOST_S):
            await self._app(scope, receive, send)

    def _route(self, path: str, answer: Callable[[dict[str, Any]], Awaitable[_Answer]]) -> Route:
        """Responds with what `answer` makes of the fields of a request."""

        async def respond(request: Request) -> Response:
            try:
                return await self._respond(request, path, answer)
            except HTTPException:
                self.counts.refused += 1
                raise

        return Route(path, respond, methods=["POST"])

    async def _respond(
        self, request: Request, path: str, answer: Callable[[dict[str, Any]], Awaitable[_Answer]]
    ) -> Response:
        body, seal = await self._read(request), request.headers.get(HEADER)
        if not self._seal.is_of(seal, path.encode(), body):
            raise HTTPException(403, "the request has no seal of this fleet")
        try:
            parts, sealed = await answer(self._fields(body))
        except SparsexError as error:
            raise HTTPException(503, str(error)) from error
        headers = {HEADER: self._seal.of(str(seal).encode(), sealed), "content-length": str(sum(map(len, parts)))}
        return StreamingResponse(self._sent(path, parts), headers=headers)

    async def _sent(self, path: str, parts: Sequence[bytes | memoryview]) -> AsyncIterator[memoryview]:
        """A body bit by bit. It counts once the connection has taken the last one."""
        for part in parts:
            view = memoryview(part)
            for at in range(0, len(view), _AT_ONCE):
                yield view[at : at + _AT_ONCE]
        if path == messages.LOOKUP:
            self.counts.lookups += 1
        else:
            self.counts.blocks += 1
            self.counts.nbytes += sum(map(len, parts))

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._most_bytes:
                raise HTTPException(413, f"the body must have at most {self._most_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def _fields(self, body: bytes) -> dict[str, Any]:
        try:
            fields: dict[str, Any] = json.loads(body)
            model = fields["model"]
        except (ValueError, TypeError, KeyError) as error:
            raise HTTPException(400, f"the body cannot be read: {error!r}") from error
        if model != self._model:
            raise HTTPException(409, "this replica has another model, or keeps its KV in another way")
        return fields

    async def _look_up(self, fields: dict[str, Any]) -> _Answer:
        try:
            lookup = messages.lookup_of(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"the lookup cannot be read: {error!r}") from error
        told = messages.told_to_bytes(await self._worker.call(self._peering.find, lookup))
        return _Answer([told], told)

    async def _send(self, fields: dict[str, Any]) -> _Answer:
        try:
            key = bytes.fromhex(fields["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"key cannot be read: {error!r}") from error
        make = await self._worker.call(self._peering.tiers.file_of, key)
        file: BlockFile | None = await asyncio.to_thread(make) if make is not None else None
        if file is None:
            raise HTTPException(404, "no tier has this block")
        return _Answer(file.parts, file.header)


def _listening(sockets: list[socket.socket]) -> list[socket.socket]:
    """So that connections are taken, and wait, as soon as the address is told."""
    for each in sockets:
        each.listen()
    return sockets
