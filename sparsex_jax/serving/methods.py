"""HTTP methods beside those that endpoints have: HEAD for every GET, `Allow`, and the preflights of other origins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsex_jax.errors import InvalidRequestError

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
# What scripts of another origin may read of a response, besides its body and a few harmless headers.
_READABLE = ("Retry-After", "Warning", "X-Sparsex-Ignored-Fields", "X-Request-Id")


class HeadAsGet:
    """ASGI middleware that answers HEAD as GET, without the body. Uptime monitors send HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        as_get = {**scope, "method": "GET"}

        async def without_body(message: Message) -> None:
            scope["route"] = as_get.get("route")  # by which the layers around this one count and log
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(as_get, receive, without_body)


def allowed(request: Request) -> str:
    """The methods of a path, as `Allow` names them."""
    taken = [method for method in _METHODS if any(_takes(route, request.scope, method) for route in request.app.routes)]
    return ", ".join(taken + ["HEAD"] * ("GET" in taken))


def _takes(route: BaseRoute, scope: Scope, method: str) -> bool:
    if isinstance(route, Mount) and method != "GET":  # of the page's files
        return False
    return route.matches({**scope, "method": method})[0] is Match.FULL


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let scripts of these origins send requests and read the answers (CORS). Their preflights need no key.

    Args:
      origins: such as `https://chat.example`; `*` is every origin.

    Raises:
      InvalidRequestError: one of them is no origin.
    """
    options: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": _READABLE}
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=[_origin(each) for each in origins], **options)


def _origin(text: str) -> str:
    scheme, mark, host = text.partition("://")
    if text != "*" and not (scheme and mark and host and "/" not in host):
        raise InvalidRequestError(
            f"allowed_origins has {text!r}; it must be * or SCHEME://HOST or SCHEME://HOST:PORT, without a path"
        )
    return text.lower()
