"""The layer between requests and sockets: limits of bodies, disconnected clients, and event streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsex_jax.serving.faults import DisconnectedError, fault_of


class BodyLimit:
    """ASGI middleware that refuses large bodies: at once by Content-Length, or when too many bytes have arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._announced(scope) > self._max_bytes:
            await fault_of(self._error()).response()(scope, receive, send)
        else:
            await self._app(scope, self._counting(receive), send)

    def _announced(self, scope: Scope) -> int:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return int(length) if length.isdigit() else 0

    def _counting(self, receive: Receive) -> Receive:
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_bytes:
                raise self._error()
            return message

        return counted

    def _error(self) -> HTTPException:
        return HTTPException(413, f"the request's body is larger than the limit of {self._max_bytes} bytes")


async def unless_disconnected[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result.

    Raises:
      DisconnectedError: the client disconnected first. The work was cancelled and has ended.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise DisconnectedError("the client disconnected")
    finally:
        await _end(task, gone)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(StreamingResponse):
    """A response of server-sent events."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], held: contextlib.AsyncExitStack) -> None:
        """
        Args:
          first: the first event, which was awaited before the response began, so that its errors get a status.
          rest: the later events.
          held: is closed when the stream ends, in whatever way it ends.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_behind(first, rest), media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _behind(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk
