"""Turns errors into responses as OpenAI's: a status, and {"error": {message, type, param, code}}.

At Anthropic's endpoints they have the form of Anthropic's: {"type": "error", "error": {type, message}, "request_id"}.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from sparsex_jax.errors import (
    AdapterInUseError,
    ContextLengthError,
    FrozenLimitError,
    GroupError,
    InvalidRequestError,
    NoReplicaError,
    NoRoomError,
    OverloadedError,
    SparsexError,
    StoreFullError,
    UnknownAdapterError,
    UnknownHandleError,
    UnknownPinError,
)
from sparsex_jax.serving.access import ConcurrencyError, ForbiddenError, QuotaError, UnauthorizedError
from sparsex_jax.serving.methods import allowed
from sparsex_jax.serving.schemas import ReuseOptions
from sparsex_jax.serving.worker import DrainingError, TimeLimitError

_SHORT = reprlib.Repr(maxstring=60, maxother=60, maxlist=3, maxdict=3)
_COMPLETE = ("missing", "too_long", "too_short")  # kinds of validation errors that say what was sent
_CLIENT_CLOSED = 499  # nginx's status for a client that disconnected; only metrics show it

log = logging.getLogger(__name__)


class RequestError(SparsexError):
    """A request is wrong in one field.

    Attributes:
      param: the field's name. None if no single field is wrong.
      code: a word for programs to act on.
      status: the HTTP status.
    """

    def __init__(self, message: str, *, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class DisconnectedError(SparsexError):
    """The client disconnected before its answer began."""


class ReplicaLostError(SparsexError):
    """The replica that a request was sent to died, and the request with it."""


class OutOfServiceError(SparsexError):
    """The server cancelled a running request because it is stopping."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """An error as the client sees it: the fields of OpenAI's error object, the HTTP status, when to try again, and
    which methods are allowed."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    allow: str | None = None

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str | None = None) -> dict[str, Any]:
        """The body at Anthropic's endpoints, where messages alone name fields."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """
        Args:
          scope: of the request.
        """
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if is_anthropic(scope["path"]):
            return json_response(self.anthropic_body(_id_of(scope)), self.status, headers)
        return json_response(self.body(), self.status, headers)


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic(path: str) -> bool:
    """Whether an endpoint is one of Anthropic's."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def _id_of(scope: Scope) -> str | None:
    exchange = scope.get("state", {}).get("exchange")
    return None if exchange is None else exchange.id


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in ASCII, because messages quote values of requests, and a lone surrogate has no UTF-8."""
    return Response(json.dumps(body), status, headers, "application/json")


def fault_of(error: BaseException) -> Fault:
    """The fault that describes an error. An unexpected error is logged, and the client sees only an internal error."""
    for error_class, describe in _DESCRIPTIONS:
        if isinstance(error, error_class):
            return describe(error)
    log.error("a request failed", exc_info=error)
    return Fault(500, "internal error; the server's log says more", "server_error", code="internal_error")


def _invalid(error: Any) -> Fault:
    """The package's messages begin with the field: "field=value must be ...", "field has ..." or "field of ..."."""
    message = str(error)
    field = re.match(r"([\w.]+)(?:=| has | of )", message)
    param = field.group(1) if field else None
    return Fault(
        400,
        message,
        "invalid_request_error",
        f"reuse.{param}" if param in ReuseOptions.model_fields else param,
        "invalid_value",
    )


def _request(error: Any) -> Fault:
    return Fault(error.status, str(error), "invalid_request_error", error.param, error.code)


def _later(status: int, code: str) -> Any:
    kind = "rate_limit_error" if status == 429 else "server_error"
    return lambda error: Fault(status, str(error), kind, code=code, retry_after_s=getattr(error, "retry_after_s", 1.0))


def _as(status: int, kind: str, code: str, param: str | None = None) -> Any:
    return lambda error: Fault(status, str(error), kind, param, code)


def _http(error: Any) -> Fault:
    kinds = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    return Fault(error.status_code, str(error.detail), "invalid_request_error", code=kinds.get(error.status_code))


def _validation(error: Any) -> Fault:
    """Describe the deepest validation error."""
    worst = max(error.errors(), key=lambda each: len(each["loc"]))
    if worst["type"] == "json_invalid":
        return _no_json(worst)
    param = _field(worst["loc"])
    if worst["type"] == "too_many_fields":
        message = f"{param or 'the body'}: {worst['msg']}"
    elif param is None and isinstance(worst.get("input"), Mapping):  # its fields do not go together
        message = f"the body: {worst['msg']}"
    elif param is None:
        message = "the body must be a JSON object, sent as application/json"
    else:
        message = f"{param}: {worst['msg']}"
        message += "" if worst["type"] in _COMPLETE else f", not {_SHORT.repr(worst.get('input'))}"
    return Fault(400, message, "invalid_request_error", param, worst["type"])


def _no_json(error: Any) -> Fault:
    """The location is a character's number, which is no field."""
    why, at = error.get("ctx", {}).get("error", error["msg"]), error["loc"][-1]
    message = f"the body is not valid JSON: {why} at character {at}"
    return Fault(400, message, "invalid_request_error", code="json_invalid")


def _field(location: Sequence[str | int]) -> str | None:
    """The field at a location: `("body", "messages", 0, "role")` is `messages[0].role`. Names of types are skipped."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
    return path or None


# The first class that an error is an instance of describes it.
_DESCRIPTIONS: tuple[tuple[type[BaseException], Any], ...] = (
    (RequestError, _request),
    (RequestValidationError, _validation),
    (HTTPException, _http),
    (UnauthorizedError, _as(401, "authentication_error", "invalid_api_key")),
    (ForbiddenError, _as(403, "permission_error", "forbidden")),
    (QuotaError, _as(403, "permission_error", "knowledge_quota", "text")),
    (UnknownHandleError, _as(404, "invalid_request_error", "unknown_handle")),
    (UnknownPinError, _as(404, "invalid_request_error", "unknown_pin")),
    (UnknownAdapterError, _as(404, "invalid_request_error", "model_not_found", "model")),
    (AdapterInUseError, _as(409, "invalid_request_error", "adapter_in_use", "lora_name")),
    (ConcurrencyError, _later(429, "too_many_requests")),
    (DisconnectedError, _as(_CLIENT_CLOSED, "invalid_request_error", "disconnected")),
    (OverloadedError, _later(503, "overloaded")),
    (DrainingError, _later(503, "draining")),
    (GroupError, _later(503, "process_lost")),
    (OutOfServiceError, _later(503, "draining")),
    (ReplicaLostError, _later(503, "replica_lost")),
    (NoReplicaError, _later(503, "no_replica")),
    (FrozenLimitError, _as(507, "server_error", "knowledge_full")),
    (NoRoomError, _as(400, "invalid_request_error", "context_length_exceeded")),
    (StoreFullError, _later(503, "store_full")),
    (TimeLimitError, _as(504, "timeout_error", "time_limit")),
    (ContextLengthError, _as(400, "invalid_request_error", "context_length_exceeded")),
    (InvalidRequestError, _invalid),
)


def install(app: FastAPI) -> None:
    """Make every error that the app raises a response of this form."""

    async def answer(request: Request, error: Exception) -> Response:
        fault = fault_of(error)
        if fault.status == 405:
            fault = dataclasses.replace(fault, allow=allowed(request))
        if fault.code == "not_found":
            message = f"there is no {request.url.path} here; /openapi.json lists what there is"
            fault = dataclasses.replace(fault, message=message)
        return fault.response(request.scope)

    for kind in (SparsexError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
