"""Reads the bodies of requests within limits of size, time and memory. Large ones are checked off the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import email.message
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Message

from sparsex_jax.errors import OverloadedError
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.faults import DisconnectedError, RequestError

_SLOWEST_BYTES_S = 16 << 10
_SMALL_BYTES = 64 << 10  # parsed in less time than it takes to hand it to another thread and back
_MOST_BODIES = 16  # of the largest size that are read or parsed at once
MAX_VALUES = 50_000  # where the body is not small


class Checked(Request):
    """A request whose body is a checked object already, which FastAPI takes as it is."""

    def __init__(self, request: Request, body: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._checked = body

    async def body(self) -> bytes:
        return b"read already"

    async def json(self) -> BaseModel:
        return self._checked


class Bodies:
    """All bodies that are being read."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held_bytes = 0
        # One thread, so that large bodies are taken apart one after the other.
        self._parsing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sparsex-bodies")

    async def checked[M: BaseModel](self, request: Request, model: type[M]) -> M:
        """A request's body as an object of this model.

        Raises:
          HTTPException: it is too large (413), too slow (408), or of another type or encoding (415).
          RequestError: it is not JSON.
          RequestValidationError: its fields are wrong.
          OverloadedError: too many large ones are read at once.
          DisconnectedError: the client disconnected before all of it had come.
        """
        _require_json(request)
        async with self._read(request) as content:
            return await self._parsed(content, model)

    async def read(self, request: Request) -> bytes:
        """A request's body as it is. Errors as `checked`, but for those of its form."""
        async with self._read(request) as content:
            return content

    @contextlib.asynccontextmanager
    async def _read(self, request: Request) -> AsyncIterator[bytes]:
        """All of a body, which counts as held for as long as this is open."""
        body = _Body(self._limits, int(request.headers.get("content-length") or 0))
        try:
            while not body.complete:
                more = body.add(await body.next(request))
                self._held_bytes += more
                if self._held_bytes > _MOST_BODIES * self._limits.max_body_bytes and len(body.content) > _SMALL_BYTES:
                    raise OverloadedError("too many large bodies are read at once", 5.0)
            yield bytes(body.content)
        finally:
            self._held_bytes -= len(body.content)

    async def _parsed[M: BaseModel](self, content: bytes, model: type[M]) -> M:
        if len(content) <= _SMALL_BYTES:
            return parse(content, model)
        return await asyncio.get_running_loop().run_in_executor(self._parsing, parse, content, model)


class _Body:
    """One body, as far as it has come."""

    def __init__(self, limits: Limits, announced: int) -> None:
        self.content, self.complete = bytearray(), False
        self._limits, self._clock = limits, asyncio.get_running_loop()
        self._began_s = self._clock.time()
        self._require_size(announced)

    async def next(self, request: Request) -> Message:
        seconds = self._limits.client_timeout + len(self.content) / _SLOWEST_BYTES_S
        try:
            async with asyncio.timeout_at(self._began_s + seconds):
                return await request.receive()
        except TimeoutError as error:
            raise HTTPException(408, f"{len(self.content)} bytes of the body came in {seconds:.0f} s") from error

    def add(self, message: Message) -> int:
        """Returns the number of bytes that came."""
        if message["type"] == "http.disconnect":
            raise DisconnectedError("the client disconnected")
        more = message.get("body", b"")
        self._require_size(len(self.content) + len(more))
        self.content += more
        self.complete = not message.get("more_body", False)
        return len(more)

    def _require_size(self, size: int) -> None:
        most = self._limits.max_body_bytes
        if size > most:
            raise HTTPException(413, f"the request's body is larger than the limit of {most} bytes")


def count_values(content: bytes) -> int:
    """The strings, objects, lists, numbers with a fraction and truth values in JSON, at least up to `MAX_VALUES`.

    Each is a Python object that may be checked by a schema, and no other thread runs meanwhile. What may rightly be
    megabytes, text and lists of integers, has few of them or is parsed fast. Each step here is fast too.
    """
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = plain.count(b'"')
    if quotes > 2 * MAX_VALUES:
        return quotes // 2
    outside = b"".join(plain.split(b'"')[::2])
    return quotes // 2 + sum(map(outside.count, (b"[", b"{", b".", b"e", b"E")))


def parse[M: BaseModel](content: bytes, model: type[M]) -> M:
    """JSON as an object of this model. Its parser refuses what is nested more than 200 levels deep."""
    if len(content) > _SMALL_BYTES and count_values(content) > MAX_VALUES:
        raise RequestError(
            f"the body has more than {MAX_VALUES} strings, objects, lists and fractions", param=None, code="too_complex"
        )
    try:
        value = from_json(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise RequestError(f"the body is not JSON in UTF-8: {error}", param=None, code="json_invalid") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError([_in_body(each) for each in error.errors(include_url=False)]) from error


def _in_body(error: Any) -> dict[str, Any]:
    return error | {"loc": ("body", *error["loc"])}


def _require_json(request: Request) -> None:
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    subtype = header.get_content_subtype()
    if header.get_content_maintype() != "application" or (subtype != "json" and not subtype.endswith("+json")):
        raise RequestError("the body must be a JSON object, sent as application/json", param=None, code="json_invalid")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(415, f"content-encoding: {encoding!r} is not read here")
