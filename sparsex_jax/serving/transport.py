"""The layer between requests and connections: disconnected clients, and event streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sparsex_jax.serving.faults import DisconnectedError


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
