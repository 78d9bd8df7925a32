"""Traces: a span for each part of a request, with what was found and computed, behind a flag."""

import http.server
import subprocess
import sys
import threading

import pytest
from live import MODEL, live_server, make_engine, wait_for
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.tracing import Tracing, is_wanted

NOTE = "The harbour opens at dawn and closes when the bells ring. " * 4
ASK = {"prompt": NOTE, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "reuse": {"method": "prefix"}}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARTS = ["queue", "lookup", "prefill", "decode"]


@pytest.fixture(scope="module")
def traced():
    """A live server, and where its spans are."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with live_server(make_engine(), tracing=Tracing(provider, MODEL)) as live:
        yield live, exporter


def asked(traced, body, path="/v1/completions", **headers):
    """The spans of one request, in the order of their beginnings; the request's own comes first.

    They are there some time after its answer, so every request of these tests waits for its own.
    """
    live, exporter = traced
    exporter.clear()
    with live.http() as http:
        answer = http.post(path, json=body, headers=headers)
    wait_for(lambda: any(span.kind == SpanKind.SERVER for span in exporter.get_finished_spans()))
    return answer, sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))


def test_a_request_has_a_span_for_each_part_under_the_clients_trace(traced):
    first, _ = asked(traced, ASK | {"prompt": "Something else that is long enough to be found again by a prefix"})
    assert first.status_code == 200
    asked(traced, ASK)
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    answer, (request, *parts) = asked(traced, ASK, **sent)
    report = answer.json()["sparsex"]
    assert (request.name, request.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert [span.name for span in parts if span.name != "copy"] == PARTS  # a page that is found in part is copied
    assert all(span.parent.span_id == request.context.span_id for span in parts)
    assert all(span.attributes["gen_ai.request.id"] == "mine" for span in (request, *parts))
    of = {span.name: span for span in parts}
    assert of["lookup"].attributes["sparsex.prefix_tokens"] == report["prefix_tokens"] > 15
    assert of["prefill"].attributes["sparsex.fresh_tokens"] == report["fresh_tokens"]
    assert of["prefill"].attributes["sparsex.computed_fraction"] == report["computed_fraction"]
    assert of["decode"].attributes["gen_ai.usage.output_tokens"] == 4
    said = dict(request.attributes)
    assert (said["http.route"], said["http.response.status_code"]) == ("/v1/completions", 200)
    assert (said["gen_ai.request.model"], said["sparsex.method"]) == (MODEL, "prefix")
    assert said["gen_ai.usage.input_tokens"] == report["prompt_tokens"]
    assert said["sparsex.prefix_tokens"] == report["prefix_tokens"]
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    for earlier, later in (("queue", "prefill"), ("prefill", "decode")):
        assert of[earlier].end_time <= of[later].start_time + 1000
    assert request.start_time <= of["queue"].start_time
    assert of["decode"].end_time <= request.end_time + 1000


def test_each_answer_has_spans_of_its_own_and_copies_are_seen(traced):
    remembered, _ = asked(traced, {"text": NOTE, "company": False}, "/v1/knowledge")
    assert remembered.status_code == 200
    body = ASK | {"prompt": "What is this? " + NOTE + "When?", "n": 2, "reuse": {"method": "naive"}}
    _, (request, *parts) = asked(traced, body)
    assert [span.attributes["sparsex.answer"] for span in parts if span.name == "decode"] == [0, 1]
    [copy] = [span for span in parts if span.name == "copy" and span.attributes["sparsex.answer"] == 0]
    assert copy.attributes["sparsex.tokens"] > 15
    assert request.attributes["gen_ai.usage.output_tokens"] == 8


def test_knowledge_refusals_and_bad_parents(traced):
    _, (request, *parts) = asked(traced, {"text": "Another text, which is kept."}, "/v1/knowledge", traceparent="00-zz")
    assert request.parent is None
    assert [span.name for span in parts][:3] == ["queue", "lookup", "prefill"]
    answer, spans = asked(traced, {"prompt": "x", "temperature": -1})
    assert (answer.status_code, len(spans)) == (400, 1)
    assert spans[0].status.status_code == StatusCode.UNSET
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    live, exporter = traced
    exporter.clear()
    with live.http() as http:
        http.post("/v1/completions", json=ASK, headers=unsampled).raise_for_status()
        http.get("/health/live").raise_for_status()
    assert exporter.get_finished_spans() == ()


def test_a_request_that_fails_is_marked(traced, monkeypatch):
    live, _ = traced
    monkeypatch.setattr(live.server._service, "intake", None)
    answer, [request] = asked(traced, ASK)
    assert (answer.status_code, request.status.status_code) == (500, StatusCode.ERROR)


def test_spans_reach_a_collector(monkeypatch):
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Nothing is printed."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_SERVICE_NAME", "test")
        tracing = Tracing.start(f"http://127.0.0.1:{collector.server_port}", MODEL)
        tracing._tracer.start_span("one").end()
        tracing.close()
        collector.shutdown()
    [(path, body)] = got
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert path == "/v1/traces"
    assert resource.scope_spans[0].spans[0].name == "one"
    assert any(
        each.key == "service.name" and each.value.string_value == "test" for each in resource.resource.attributes
    )


def test_who_wants_traces(monkeypatch):
    assert not is_wanted(None)
    assert is_wanted("http://x:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4318")
    assert is_wanted(None)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not is_wanted("http://x:4318")


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(InvalidRequestError, match="otlp_endpoint='x:4318' must begin with http"):
        Tracing.start("x:4318", MODEL)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(InvalidRequestError, match="OTEL_EXPORTER_OTLP_PROTOCOL='grpc' must be http/protobuf"):
        Tracing.start("http://x:4318", MODEL)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidRequestError, match=r"needs OpenTelemetry \(pip install 'sparsex-jax\[tracing\]'\)"):
        Tracing.start("http://x:4318", MODEL)


@pytest.mark.slow
def test_nothing_is_imported_without_traces():
    source = (
        "import sys, sparsex_jax.cli.serve; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
