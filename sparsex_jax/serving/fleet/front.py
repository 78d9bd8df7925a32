"""The endpoint of a fleet: an ASGI application that sends each request to the replica where least work is left.

    key -> body -> preview (tokens, namespace) -> router -> replica -> its response, passed through as it comes

The front keeps no KV and computes nothing. Several of them may stand side by side, each with a router of its own. What
a replica keeps for a client to come back to, such as knowledge under a handle, has no place in a fleet, and is refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Collection
from typing import Protocol

from fastapi import Request
from starlette.types import Message, Receive, Scope, Send

from sparsex_jax.routing import Position, Router, Ticket
from sparsex_jax.serving.access import Access, ForbiddenError, Limits
from sparsex_jax.serving.bodies import Bodies
from sparsex_jax.serving.faults import DisconnectedError, Fault, RequestError, fault_of, is_anthropic, json_response
from sparsex_jax.serving.fleet.follower import Follower
from sparsex_jax.serving.fleet.preview import Preview, Previewed
from sparsex_jax.serving.fleet.replica import Forwarded, Told
from sparsex_jax.serving.transport import unless_disconnected

REPLICA_HEADER = b"x-sparsex-replica"
# What one replica would keep, or say of itself alone.
_REFUSED = ("/v1/knowledge", "/v1/pins", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/store", "/metrics")
_OPEN = ("/", "/version", "/page", "/openapi.json")  # need no key
_NOT_FORWARDED = (b"host", b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade")

log = logging.getLogger(__name__)


class Backend(Protocol):
    """How a front reaches replicas."""

    async def start(self) -> None:
        """Wait until there is a replica. Called once, before all else."""

    def replicas(self) -> list[str]:
        """The names of those that are there."""

    def send(self, replica: str, request: Forwarded) -> AsyncGenerator[str | Message]:
        """The name of the replica that answers, which is another one if this one is gone, then its ASGI messages.

        Raises:
          ReplicaLostError: it died. What came before is the beginning of its response.
        """

    async def tell(self, replica: str, position: Position) -> Told:
        """What a replica has to tell. Raises any error if it cannot be reached."""


class Front:
    """The ASGI application."""

    def __init__(
        self,
        router: Router,
        preview: Preview,
        backend: Backend,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        period_s: float = 0.25,
        dropped: Collection[bytes] = (),
    ) -> None:
        """
        Args:
          access, limits: those of the replicas. None: their defaults.
          period_s: replicas are asked for news so often.
          dropped: headers of responses that are not passed on, in lower case.
        """
        limits = limits or Limits()
        self.router, self.follower = router, Follower(router, backend, period_s)
        self._preview, self._backend, self._dropped = preview, backend, frozenset(dropped)
        self._access, self._bodies = access or Access.open(limits), Bodies(limits)
        # One thread, because a tokenizer is not safe to call from several.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sparsex-preview")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            raise ConnectionError(f"a fleet has no {scope['type']} connections")
        request, reply = Request(scope, receive), _Reply(scope, send)
        try:
            await self._answer(request, reply)
        except DisconnectedError:
            return
        except Exception as error:
            await reply.fail(fault_of(error))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # that it starts
        await self._backend.start()
        self.follower.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.follower.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request, reply: _Reply) -> None:
        path = request.url.path
        if path.startswith("/health"):
            return await self._health(reply)
        headers = request.headers
        is_open = path in _OPEN or path.startswith("/page/") or request.method == "OPTIONS"
        access = Access.open(Limits()) if is_open else self._access
        tenant = access.tenant(headers.get("authorization"), headers.get("x-api-key"))
        if path == "/v1/replicas":
            return await self._tell_states(reply, may=tenant.metrics)
        if path.startswith(_REFUSED):
            raise RequestError(f"{path} is of a single server; a fleet has none", param=None, code="fleet", status=501)
        body = await self._bodies.read(request)
        read = self._preview.blank(tenant)
        if request.method == "POST" and self._preview.reads(path):
            loop = asyncio.get_running_loop()
            read = await loop.run_in_executor(self._tokenizing, self._preview.read, path, body, tenant)
        await unless_disconnected(request, self._forward(_forwarded(request, body), read, reply))

    async def _forward(self, request: Forwarded, read: Previewed, reply: _Reply) -> None:
        ticket = self.router.route(read.ask)
        held_at = self.follower.addresses.get(ticket.holder) if ticket.holder is not None else None
        if held_at is not None:
            request = dataclasses.replace(request, prompt=read.prompt, held_at=held_at)
        is_complete = False
        messages = self._backend.send(ticket.replica, request)
        try:
            async for message in messages:
                await self._take(message, ticket, reply)
            is_complete = reply.status is not None and reply.status < 500
        finally:
            self.router.done(ticket, failed=not is_complete)
            await messages.aclose()

    async def _take(self, message: str | Message, ticket: Ticket, reply: _Reply) -> None:
        if isinstance(message, str):
            self.router.join(message)  # the follower may not have seen it yet
            self.router.moved(ticket, message)
            return
        if message["type"] == "http.response.start":
            kept = [each for each in message.get("headers", ()) if each[0] not in self._dropped]
            message = {**message, "headers": [*kept, (REPLICA_HEADER, ticket.replica.encode())]}
        elif message.get("body"):
            self.router.started(ticket)
        await reply.send(message)

    async def _health(self, reply: _Reply) -> None:
        number = len(self.router.replicas)
        await reply.whole({"status": "ok" if number else "no_replica", "replicas": number}, 200 if number else 503)

    async def _tell_states(self, reply: _Reply, *, may: bool) -> None:
        if not may:
            raise ForbiddenError("this key may not read the figures of the whole fleet")
        states = [{"id": name} | state | self._moved(name) for name, state in self.router.states().items()]
        await reply.whole({"object": "list", "data": states})

    def _moved(self, name: str) -> dict[str, dict[str, int]]:
        """Blocks that a replica got from others and sent to them; nothing where it does not."""
        stats = self.follower.moved.get(name)
        return {} if stats is None else {side: dataclasses.asdict(counts) for side, counts in stats._asdict().items()}


class _Reply:
    """A response, as far as it went out.

    Attributes:
      status: None: it has not begun.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status: int | None = None
        self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send(message)

    async def whole(self, body: object, status: int = 200) -> None:
        await json_response(body, status)(self._scope, _nothing, self.send)

    async def fail(self, fault: Fault) -> None:
        """Tell an error: as a response, or as the last event of a stream that has begun. Of a response that was to be
        whole, the connection is closed in its middle, which clients take for an error."""
        if self.status is None:
            await fault.response(self._scope)(self._scope, _nothing, self.send)
        elif self._is_stream:
            await self._send({"type": "http.response.body", "body": self._event(fault), "more_body": False})
        else:
            raise ConnectionError(fault.message)

    def _event(self, fault: Fault) -> bytes:
        if is_anthropic(self._scope["path"]):
            return f"event: error\ndata: {json.dumps(fault.anthropic_body())}\n\n".encode()
        return f"data: {json.dumps(fault.body())}\n\n".encode()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _forwarded(request: Request, body: bytes) -> Forwarded:
    headers = [(name, value) for name, value in request.scope["headers"] if name not in _NOT_FORWARDED]
    client = (request.client.host, request.client.port) if request.client else None
    length = [(b"content-length", str(len(body)).encode())] if body else []
    query = request.scope.get("query_string", b"")
    return Forwarded(request.method, request.url.path, query, headers + length, body, client)
