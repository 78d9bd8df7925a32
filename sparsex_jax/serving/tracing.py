"""A trace of each request, for OpenTelemetry: what it waited for, what was found, loaded and computed.

    POST /v1/chat/completions                 server span, from the request's head to the last byte of its answer
      queue, lookup, load, copy, prefill, decode      of each answer, as `sparsex_jax.scheduler.timeline` has them

A span tree is made when a request is over, of times that the loop noted. OpenTelemetry is imported when tracing is
started, and not at all without it. A client's W3C `traceparent` is the parent of the server span.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.report import KINDS
from sparsex_jax.serving.request_log import asks_something

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from sparsex_jax.reuse.report import Report
    from sparsex_jax.scheduler.timeline import Interval
    from sparsex_jax.serving.exchange import Exchange
    from sparsex_jax.serving.progress import Progress

EXTRA = "pip install 'sparsex-jax[tracing]'"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_FAILED = ("error", "timeout")  # finish reasons


def is_wanted(endpoint: str | None) -> bool:
    """Whether the command line or the standard variables name a collector, and the variables do not turn traces off."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return bool(endpoint or _first_set(_ENDPOINTS)) and not off


class Tracing:
    """Makes spans of exchanges that are over. For the event loop's thread."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        """
        Args:
          provider: sends the spans, and is shut down with this.
          model: the model's name in requests.
        """
        from opentelemetry import propagate, trace

        self._provider, self._model = provider, model
        self._trace, self._propagate = trace, propagate
        self._tracer = provider.get_tracer("sparsex_jax.serving")

    @classmethod
    def start(cls, endpoint: str | None, model: str) -> Tracing:
        """Send spans to a collector by OTLP over HTTP, in batches, on a thread of its own.

        Args:
          endpoint: the collector's URL, such as http://127.0.0.1:4318. None: as the OTEL_ variables say.

        Raises:
          InvalidRequestError: OpenTelemetry is not installed, or the URL or a variable is wrong.
        """
        url = None if endpoint is None else _url_of_traces(endpoint)
        protocol = _first_set(_PROTOCOLS) or _PROTOCOL
        if protocol != _PROTOCOL:
            raise InvalidRequestError(f"{_PROTOCOLS[1]}={protocol!r} must be {_PROTOCOL}: traces are sent by HTTP")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            said = f"otlp_endpoint={endpoint!r}" if endpoint else "a collector that OTEL_ variables name"
            raise InvalidRequestError(f"{said} needs OpenTelemetry ({EXTRA}): {error}") from error
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over this.
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "sparsex"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        return cls(provider, model)

    def write(self, exchange: Exchange) -> None:
        """Trace an exchange, unless it is none that asks the model."""
        if not asks_something(exchange):
            return
        kind = self._trace.SpanKind.SERVER
        parent = self._propagate.extract(exchange.headers)
        name = f"{exchange.http_method} {exchange.endpoint}"
        begin, end = exchange.began_s, exchange.began_s + exchange.total_s
        root = self._tracer.start_span(name, parent, kind, start_time=exchange.epoch_ns(begin))
        if root.is_recording():
            root.set_attributes(_known(self._of_request(exchange)))
            self._fail(root, exchange)
            context = self._trace.set_span_in_context(root, parent)
            end = max([end, *(self._answer(exchange, number, context) for number in range(len(exchange.jobs)))])
        root.end(exchange.epoch_ns(end))

    def close(self) -> None:
        """Send what is left, for as long as OTEL_EXPORTER_OTLP_TIMEOUT allows."""
        self._provider.shutdown()

    def _answer(self, exchange: Exchange, number: int, context: Any) -> float:
        """Make the spans of one answer. Returns when the last one ends."""
        job, ends = exchange.jobs[number], [exchange.began_s]
        about = {"gen_ai.request.id": exchange.id, "sparsex.answer": number}
        seen: set[str] = set()
        for interval in _from_the_line(exchange.tickets[number].timeline.intervals, job.started):
            span = self._tracer.start_span(interval.name, context, start_time=exchange.epoch_ns(interval.begin))
            # What the report says is of the first prefill, and of what came before it.
            said = _of_part(interval.name, job) if interval.name not in seen else {}
            said |= {"sparsex.tokens": interval.tokens}
            span.set_attributes(_known(about | said))
            span.end(exchange.epoch_ns(interval.end))
            seen.add(interval.name)
            ends.append(interval.end)
        return max(ends)

    def _of_request(self, exchange: Exchange) -> dict[str, Any]:
        jobs, reports = exchange.jobs, [job.report for job in exchange.jobs if job.report is not None]
        attributes: dict[str, Any] = {
            "http.request.method": exchange.http_method,
            "http.route": exchange.endpoint,
            "http.response.status_code": exchange.status,
            "gen_ai.request.id": exchange.id,
            "gen_ai.request.model": exchange.adapter or self._model,
            "sparsex.key": exchange.key,
            "sparsex.method": exchange.method,
        }
        if jobs:
            attributes |= {
                "gen_ai.usage.input_tokens": sum(ticket.prompt_tokens for ticket in exchange.tickets),
                "gen_ai.usage.output_tokens": sum(job.new_tokens for job in jobs),
                "gen_ai.response.finish_reasons": [job.finish_reason or "" for job in jobs],
            }
        for name in (*(f"{kind}_tokens" for kind in KINDS), "restored_tokens") if reports else ():
            attributes[f"sparsex.{name}"] = sum(getattr(report, name) for report in reports)
        return attributes

    def _fail(self, root: Any, exchange: Exchange) -> None:
        """Mark the span of a request that the server did not answer as it was asked."""
        reasons = [job.finish_reason for job in exchange.jobs if job.finish_reason in _FAILED]
        if reasons or (exchange.status or 0) >= 500:
            said = reasons[0] if reasons else str(exchange.status)
            root.set_status(self._trace.Status(self._trace.StatusCode.ERROR, said))


def _from_the_line(intervals: list[Interval], opened_s: float) -> Iterator[Interval]:
    """The intervals; the first wait begins with the request's place in the server's line."""
    for number, interval in enumerate(intervals):
        waits_first = interval.name == "queue" and all(each.name != "queue" for each in intervals[:number])
        yield interval._replace(begin=opened_s) if waits_first else interval


def _of_part(name: str, job: Progress) -> dict[str, Any]:
    """What is known of a part of this name."""
    if name == "decode":
        return {"gen_ai.usage.output_tokens": job.new_tokens, "sparsex.finish_reason": job.finish_reason}
    return _of_report(name, job.report) if job.report is not None else {}


def _of_report(name: str, report: Report) -> dict[str, Any]:
    found = sum(segment.length for segment in report.segments)
    parts: dict[str, dict[str, Any]] = {
        "lookup": {
            "sparsex.prefix_tokens": report.prefix_tokens,
            "sparsex.approximate_prefix_tokens": report.approximate_prefix_tokens,
            "sparsex.segment_tokens": found,
        },
        "prefill": {
            "gen_ai.usage.input_tokens": report.prompt_tokens,
            "sparsex.fresh_tokens": report.fresh_tokens,
            "sparsex.recomputed_tokens": report.recomputed_tokens,
            "sparsex.computed_fraction": report.computed_fraction,
        },
    }
    return parts.get(name, {})


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _first_set(variables: tuple[str, ...]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _url_of_traces(endpoint: str) -> str:
    """As OTEL_EXPORTER_OTLP_ENDPOINT: traces have a path of their own behind it, unless it is there already."""
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidRequestError(f"otlp_endpoint={endpoint!r} must begin with http:// or https://")
    return endpoint if endpoint.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
