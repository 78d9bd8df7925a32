"""HTTP methods beside those that endpoints have: HEAD for every GET, `Allow`, and the preflights of other origins."""

from __future__ import annotations

import dataclasses
import re

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsex_jax.config.checks import require

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
# What scripts of another origin may read of a response, besides its body and a few harmless headers.
_READABLE = ("Retry-After", "Warning", "X-Sparsex-Ignored-Fields", "X-Request-Id", "Request-Id")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a method or a header


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


@dataclasses.dataclass(frozen=True)
class Cors:
    """Which scripts of other origins may send requests and read the answers. Their preflights need no key.

    Attributes:
      origins: such as `https://chat.example`; `*` is every origin. Without any, no script of another origin may.
      methods: HTTP methods that they may use; `*` is all.
      headers: that they may send; `*` is all.
      credentials: whether they may send cookies and client certificates, as a proxy before the server may ask for.
    """

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    def __post_init__(self) -> None:
        for origin in self.origins:
            _check_origin(origin)
        for name, values in (("allowed_methods", self.methods), ("allowed_headers", self.headers)):
            wrong = next((value for value in values if value != "*" and not _NAME.fullmatch(value)), None)
            require(wrong is None, f"{name} has {wrong!r}; it must be * or a name")
        require(
            not (self.credentials and "*" in self.origins),
            "allow_credentials needs origins by name: with *, any page could use what its visitors may do",
        )

    def install(self, app: FastAPI) -> None:
        if self.origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=[origin.lower() for origin in self.origins],
                allow_methods=[method.upper() for method in self.methods],
                allow_headers=self.headers,
                allow_credentials=self.credentials,
                expose_headers=_READABLE,
            )


def _check_origin(text: str) -> None:
    scheme, mark, host = text.partition("://")
    require(
        text == "*" or bool(scheme and mark and host and "/" not in host),
        f"allowed_origins has {text!r}; it must be * or SCHEME://HOST or SCHEME://HOST:PORT, without a path",
    )
