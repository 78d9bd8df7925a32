"""One HTTP request and its answer: its id, and what metrics and the request log say of it.

An exchange is over when its response has ended, or its client went away, and each job that was submitted for it had its
last event. Then it is logged, once.
"""

from __future__ import annotations

import datetime
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsex_jax.reuse.report import KINDS
from sparsex_jax.serving.faults import fault_of, is_anthropic
from sparsex_jax.serving.metrics import OTHER, Metrics
from sparsex_jax.serving.progress import Progress

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event, Ticket

Log = Callable[["Exchange"], None]

ID_HEADER = "x-request-id"
ANTHROPIC_ID_HEADER = "request-id"
_SANE_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII, which any header and any log can hold


class Exchange:
    """What is known of one request. For the event loop's thread.

    Attributes:
      id: the client's, or one made here.
      key: the name of its API key; None if it has no known one.
      adapter: the one that it named as its model. None: it named the model, or none.
      method: how its prompts reuse what is stored.
      status: of the response; None before it began.
      tickets, jobs: what was submitted for it, and how far that is.
      began_s: when it came, on `time.perf_counter`'s clock.
    """

    def __init__(self, scope: Scope, metrics: Metrics, log: Log) -> None:
        self.id = request_id(Headers(scope=scope).get(ID_HEADER))
        self.key: str | None = None
        self.adapter: str | None = None
        self.method: str | None = None
        self.status: int | None = None
        self.tickets: list[Ticket] = []
        self._scope, self._metrics, self._log = scope, metrics, log
        self._time, self.began_s = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self._total_s: float | None = None
        self.jobs: list[Progress] = []

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """The exchange of a request that went through `Exchanges`."""
        return scope["state"]["exchange"]

    @property
    def path(self) -> str:
        return self._scope["path"]

    @property
    def http_method(self) -> str:
        return self._scope["method"]

    @property
    def headers(self) -> Headers:
        """Of the request."""
        return Headers(scope=self._scope)

    @property
    def total_s(self) -> float:
        """Seconds until the response ended."""
        assert self._total_s is not None, "the response has not ended"
        return self._total_s

    def epoch_ns(self, seconds: float) -> int:
        """A time on `time.perf_counter`'s clock, in nanoseconds since 1970."""
        return int((self._time.timestamp() + seconds - self.began_s) * 1e9)

    @property
    def endpoint(self) -> str:
        """The path of the route that took the request."""
        return getattr(self._scope.get("route"), "path", OTHER)

    def submitted(self, ticket: Ticket, opened_s: float) -> None:
        """A job is submitted. Also from the worker's thread, in a call that the event loop's thread awaits."""
        self.tickets.append(ticket)
        self.jobs.append(Progress(opened_s))

    def heard(self, number: int, event: Event) -> None:
        """Take an event of a job, in the order of submission."""
        progress = self.jobs[number]
        progress.take(event)
        self._metrics.heard(event, progress)
        self._log_if_over()

    def begins(self, status: int) -> None:
        """The response begins."""
        self.status = status
        self._metrics.answered(self.endpoint, status)

    def ends(self) -> None:
        """The response has ended, or nobody reads it any more."""
        self._total_s = time.perf_counter() - self.began_s
        self._log_if_over()

    def _log_if_over(self) -> None:
        if self._total_s is not None and all(job.finish_reason for job in self.jobs):
            self._log(self)

    def to_dict(self) -> dict[str, Any]:
        """What the request log says. Seconds and tokens are null where there are none; several prompts' are sums, the
        first's queue time and the earliest first token."""
        return {
            "time": self._time.isoformat(timespec="milliseconds"),
            "id": self.id,
            "endpoint": self.endpoint if self.endpoint != OTHER else self.path,
            "http_method": self.http_method,
            "key": self.key,
            "status": self.status,
            "finish_reason": ",".join(dict.fromkeys(job.finish_reason or "" for job in self.jobs)) or None,
            "adapter": self.adapter,
            "method": self.method,
            "round": self._round(),
            **self._tokens(),
            **self._seconds(),
        }

    def _round(self) -> str | None:
        """The id of the round that its prompts were members of."""
        return next((job.report.round.id for job in self.jobs if job.report and job.report.round), None)

    def _tokens(self) -> dict[str, int | None]:
        reports = [job.report for job in self.jobs if job.report is not None]
        prompt = _total(ticket.prompt_tokens for ticket in self.tickets)
        kinds = {f"{kind}_tokens": _total(getattr(report, f"{kind}_tokens") for report in reports) for kind in KINDS}
        return {"prompt_tokens": prompt, **kinds, "new_tokens": _total(job.new_tokens for job in self.jobs)}

    def _seconds(self) -> dict[str, float | None]:
        queue = [job.queue_s for job in self.jobs if job.queue_s is not None]
        first = [job.ttft_s for job in self.jobs if job.ttft_s is not None]
        seconds = {"queue_s": next(iter(queue), None), "ttft_s": min(first, default=None), "total_s": self._total_s}
        return {name: None if value is None else round(value, 6) for name, value in seconds.items()}


def _total(numbers: Iterable[int]) -> int | None:
    """Their sum; None if there are none."""
    numbers = list(numbers)
    return sum(numbers) if numbers else None


def request_id(asked: str | None) -> str:
    """The id that a client asks for, or a new one if it asks for none, or for one that is too long or not plain."""
    return asked if asked and _SANE_ID.fullmatch(asked) else f"req_{secrets.token_hex(16)}"


class Exchanges:
    """ASGI middleware around everything else: makes the exchange of each request, gives every response its id, and
    answers what no endpoint expected."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: Log) -> None:
        """
        Args:
          log: is called with each exchange that is over.
        """
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, self._metrics, self._log)
        scope.setdefault("state", {})["exchange"] = exchange

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.begins(message["status"])
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = exchange.id
                if is_anthropic(exchange.path):
                    headers[ANTHROPIC_ID_HEADER] = exchange.id
            await send(message)

        try:
            await self._answered(exchange, scope, receive, marked)
        finally:
            exchange.ends()

    async def _answered(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            if exchange.status is not None:
                raise
            await fault_of(error).response(scope)(scope, receive, send)
