"""Metrics, the request log and request ids: each request and each token counts once, whatever becomes of it."""

import contextlib
import functools
import json
import threading

import httpx
import numpy as np
import pytest
from conftest import run, tiny_engine
from live import ScriptedLoop, live_server, make_engine, wait_for
from typer.testing import CliRunner

from sparsex_jax import ReuseConfig, SamplingParams
from sparsex_jax.cli import app
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.reuse.report import KINDS
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.exchange import request_id
from sparsex_jax.serving.metrics import FINISH_REASONS
from sparsex_jax.serving.request_log import STANDARD_OUTPUT, RequestLog

ASK = {"prompt": "Which harbour opens at dawn? " * 4, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = ASK | {"max_tokens": 1500, "stream": True}
FIELDS = {
    *("time", "id", "endpoint", "http_method", "key", "status", "finish_reason", "adapter", "method", "round"),
    *(f"{kind}_tokens" for kind in KINDS),
    *("prompt_tokens", "new_tokens", "queue_s", "ttft_s", "total_s"),
}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('[alice]\nkey = "sk-alice"\nmetrics = true\n[bob]\nkey = "sk-bob"\n')
    return Access.load(path, Limits())


def series(http):
    """What `/metrics` says, by series."""
    lines = http.get("/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def of(found, name, label=""):
    """The sum of a metric's series that have this label."""
    return sum(value for key, value in found.items() if key.partition("{")[0] == name and label in key)


def growth(before, after, name, label=""):
    return of(after, name, label) - of(before, name, label)


def hang_up(http, body):
    """Read the first words of a stream, and go away."""
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(line for line in response.iter_lines() if line)


def logged(path, number):
    """The lines of a request log, once there are so many."""
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= number)
    return [json.loads(line) for line in path.read_text().splitlines()]


# Metrics ----------------------------------------------------------------------------------------------------


def test_labelled_counters_are_there_from_the_start():
    engine = make_engine()
    with live_server(engine) as live, live.http() as http:
        found = series(http)
    for reason in FINISH_REASONS:
        assert found[f'sparsex_answers_total{{finish_reason="{reason}"}}'] == 0
    for kind in KINDS:
        assert found[f'sparsex_prompt_tokens_total{{kind="{kind}"}}'] == 0
    for kind in ("prefix", "approximate_prefix", "segment"):
        assert found[f'sparsex_hit_tokens_total{{kind="{kind}"}}'] == 0
    for endpoint in ("/v1/chat/completions", "/v1/knowledge/{handle}", "/metrics", "other"):
        for status in (200, 400, 401, 404, 408, 413, 415, 429, 499, 500, 503, 504, 507):
            assert found[f'sparsex_requests_total{{endpoint="{endpoint}",status="{status}"}}'] == 0
    [build] = [name for name in found if name.startswith("sparsex_build_info{")]
    assert all(f'{label}="' in build for label in ("version", "jax", "device", "model"))
    assert found["sparsex_page_size_tokens"] == engine.config.page_size
    of_mirrors = ("derived_pages", "saved_pages", "patch_rows", "restored_pages_total")
    for name in (*of_mirrors, 'pages{state="base"}', 'pages{state="spare"}'):
        assert found[f"sparsex_{name}"] == 0
    assert "sparsex_computed_ratio_count" in found


def test_requests_and_tokens_are_counted_once(engine):
    with live_server(engine) as live, live.http() as http:
        before = series(http)
        for _ in range(2):
            http.post("/v1/completions", json=ASK).raise_for_status()
        http.post("/v1/completions", json={})
        after = series(http)
    assert growth(before, after, "sparsex_requests_total", 'completions",status="200"') == 2
    assert growth(before, after, "sparsex_requests_total", 'completions",status="400"') == 1
    for histogram in ("time_to_first_token_seconds", "queue_time_seconds", "e2e_request_latency_seconds"):
        assert growth(before, after, f"sparsex_{histogram}_count") == 2
    assert growth(before, after, "sparsex_time_per_output_token_seconds_count") <= 2
    assert growth(before, after, "sparsex_computed_ratio_count") == 2
    assert growth(before, after, "sparsex_generated_tokens_total") == 8
    assert growth(before, after, "sparsex_answers_total", "length") == 2
    prefix = growth(before, after, "sparsex_hit_tokens_total", '"prefix"')
    assert prefix == growth(before, after, "sparsex_prompt_tokens_total", '"prefix"') > 15
    assert of(after, "sparsex_pages") == 64
    assert growth(before, after, "sparsex_lookups_total") == 2
    assert {"sparsex_queue_requests", "sparsex_running_requests", "sparsex_preemptions_total"} <= set(after)
    assert 'sparsex_evictions_total{what="page"}' in after
    assert of(after, "sparsex_compilations_total") == num_compilations()


def test_answers_that_nobody_waits_for_are_counted(engine):
    with live_server(engine, limits=Limits(request_timeout=1.5)) as live, live.http() as http:
        http.post("/v1/completions", json=ASK).raise_for_status()
        before = series(http)
        for _ in range(3):
            hang_up(http, LONG | {"keep": False})
        assert http.post("/v1/completions", json=LONG | {"stream": False}).status_code == 504
        wait_for(lambda: growth(before, series(http), "sparsex_answers_total") == 4)
        after = series(http)
    assert growth(before, after, "sparsex_answers_total", "cancelled") == 3
    assert growth(before, after, "sparsex_answers_total", "timeout") == 1
    for name in ("e2e_request_latency_seconds", "queue_time_seconds", "time_to_first_token_seconds"):
        assert growth(before, after, f"sparsex_{name}_count") == 4
    assert growth(before, after, "sparsex_generated_tokens_total") > 4
    hits, prompts = (growth(before, after, f"sparsex_{name}_tokens_total") for name in ("hit", "prompt"))
    assert 0 < hits <= prompts


def test_scraping_does_not_wait_for_a_round(engine, monkeypatch):
    with live_server(engine) as live, live.http() as http:
        inside, free, step = threading.Event(), threading.Event(), live.worker.loop.step

        def slow():
            inside.set()
            free.wait(20)
            return step()

        monkeypatch.setattr(live.worker.loop, "step", slow)
        threads = [threading.Thread(target=http.post, args=("/v1/completions",), kwargs={"json": ASK})]
        threads[0].start()
        try:
            assert inside.wait(10)
            wait_for(lambda: series(http)["sparsex_queue_requests"] == 1)
            assert http.get("/v1/store", timeout=5).json()["pages"] == 64
        finally:
            free.set()
            threads[0].join()


@pytest.mark.slow
def test_preempted_prompts_are_looked_up_once():
    engine, generator = tiny_engine(store_tokens=512), np.random.default_rng(0)
    shared, ends = generator.integers(1, 96, 96), []
    sampling = SamplingParams(max_new_tokens=120, ignore_eos=True)
    engine.generate(shared, SamplingParams(max_new_tokens=1), reuse=ReuseConfig("prefix"))
    before, told = engine.stats(), engine.loop.stats
    for _ in range(6):
        prompt = np.concatenate([shared, generator.integers(1, 96, 8)])
        engine.loop.submit(
            prompt,
            sampling,
            reuse=ReuseConfig("prefix"),
            listener=lambda event: ends.append(event.finish_reason) if event.finish_reason else None,
        )
    run(engine.loop)
    after, stats = engine.stats(), engine.loop.stats
    assert stats.preempted > 0
    assert ends == ["length"] * 6
    assert after["lookups"] - before["lookups"] == 6
    assert after["prefix_tokens"] - before["prefix_tokens"] == stats.prefix_tokens - told.prefix_tokens > 0


def test_counts_go_on_where_the_store_is_lost():
    engine = tiny_engine()
    for _ in range(2):
        engine.prefill(np.arange(1, 60), reuse=ReuseConfig("prefix"))
    before = engine.stats()
    engine.admission.start_over()
    after = engine.stats()
    assert (after["lookups"], after["prefix_tokens"]) == (before["lookups"], before["prefix_tokens"])
    assert after["lookups"] == 2
    assert after["tokens"] == 0


def test_a_broken_loop_ends_what_it_had_with_an_error(engine):
    loop = ScriptedLoop(lambda prompt: [Event("...", (1,)), None])
    with live_server(engine, loop=loop) as live, live.http() as http:
        metrics = live.server._service.metrics
        with http.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            loop.broken = RuntimeError("broken")
            live.worker.wake()
            assert list(lines)
        text = metrics.render(engine.loop.snapshot, engine.loop.stats).decode()
    assert 'sparsex_answers_total{finish_reason="error"} 1.0' in text


# The request log --------------------------------------------------------------------------------------------


def test_each_request_has_a_line(engine, keys, tmp_path):
    path = tmp_path / "requests.jsonl"
    with live_server(engine, access=keys, request_log=RequestLog.open(path)) as live, live.http("sk-bob") as http:
        salted = {"cache_salt": "log"}
        for name in ("first", "again"):
            http.post("/v1/completions", json=ASK | salted, headers={"x-request-id": name}).raise_for_status()
        http.post("/v1/completions", json={}, headers={"x-request-id": "wrong"})
        httpx.get(f"{live.url}/v1/models", headers={"Authorization": "Bearer sk-secret", "x-request-id": "nobody"})
        http.get("/v1/nothing?token=sk-secret", headers={"x-request-id": "nowhere"})
        several = {"prompt": ["a b", "c d"], "max_tokens": 2, "ignore_eos": True, "reuse": {"method": "full"}}
        http.post("/v1/completions", json=several, headers={"x-request-id": "several"}).raise_for_status()
        knowledge = {"text": "The harbour opens at dawn. " * 3}
        http.post("/v1/knowledge", json=knowledge, headers={"x-request-id": "knowledge"}).raise_for_status()
        with http.stream("POST", "/v1/completions", json=LONG, headers={"x-request-id": "gone"}) as response:
            next(line for line in response.iter_lines() if line)
        for unlogged in ("/health", "/health/live", "/", "/page/app.js", "/metrics"):
            http.get(unlogged)
        lines = logged(path, 8)
    assert "sk-" not in path.read_text()
    by_id = {line["id"]: line for line in lines}
    assert len(lines) == len(by_id) == 8
    assert all(set(line) == FIELDS for line in lines)
    again = by_id["again"]
    assert (again["endpoint"], again["http_method"], again["key"]) == ("/v1/completions", "POST", "bob")
    assert (again["status"], again["finish_reason"], again["method"]) == (200, "length", "sparsex")
    assert again["prompt_tokens"] == sum(again[f"{kind}_tokens"] for kind in KINDS)
    assert again["prefix_tokens"] > 15
    assert again["new_tokens"] == 4
    assert 0 <= again["queue_s"] <= again["ttft_s"] <= again["total_s"]
    statuses = {name: line["status"] for name, line in by_id.items()}
    assert (statuses["wrong"], statuses["nobody"], statuses["nowhere"]) == (400, 401, 404)
    assert by_id["nobody"]["key"] is by_id["wrong"]["finish_reason"] is by_id["wrong"]["prompt_tokens"] is None
    assert by_id["nowhere"]["endpoint"] == "/v1/nothing"
    assert (by_id["several"]["new_tokens"], by_id["several"]["method"]) == (4, "full")
    assert by_id["knowledge"]["prompt_tokens"] > 10
    assert by_id["knowledge"]["ttft_s"] is None
    assert (by_id["gone"]["status"], by_id["gone"]["finish_reason"]) == (200, "cancelled")


def test_a_log_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "absent" / "requests.jsonl"
    result = CliRunner().invoke(app, ["serve", "no-such-model", "--request-log", str(path)])
    assert result.exit_code == 2
    assert "request_log=" in result.stderr


def test_standard_output_is_a_log(engine, capsys):
    with live_server(engine, request_log=RequestLog.open(STANDARD_OUTPUT)) as live, live.http() as http:
        http.get("/v1/models")
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["endpoint"] == "/v1/models"


# Request ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "", "two words", "x" * 129, "ü", "tab\there", "line\nbreak"])
def test_an_id_that_is_not_sane_is_replaced(asked):
    assert request_id(asked) not in (asked, request_id(asked))
    assert request_id("Sane-1.0:id_/+=") == "Sane-1.0:id_/+="


def refused_unread(http, *args, **kwargs):
    """The answer to a body that is not read. It may be lost: what comes of the body behind it ends the connection."""
    for _ in range(20):
        with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError):
            return http.request(*args, **kwargs)
    raise AssertionError("no answer in 20 tries")


def test_every_response_has_the_id_of_its_request(engine, keys, monkeypatch):
    with live_server(engine, access=keys, limits=Limits(max_body_bytes=2000)) as live, live.http("sk-alice") as http:
        asked = [
            ("POST", "/v1/completions", ASK, 200),
            ("POST", "/v1/completions", ASK | {"stream": True}, 200),
            ("POST", "/v1/completions", {}, 400),
            ("POST", "/v1/completions", {"prompt": "x" * 3000}, 413),
            ("DELETE", "/v1/completions", None, 405),
            ("GET", "/v1/nothing", None, 404),
            ("GET", "/", None, 200),
            ("GET", "/page/absent.js", None, 404),
            ("GET", "/health", None, 200),
            ("HEAD", "/v1/models", None, 200),
        ]
        for number, (method, path, body, status) in enumerate(asked):
            with live.http("sk-alice") as own:  # a connection may be at its end behind a 413
                ask = functools.partial(refused_unread, own) if status == 413 else own.request
                answer = ask(method, path, json=body, headers={"X-Request-ID": f"client-{number}"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, f"client-{number}")
        assert series(http)['sparsex_requests_total{endpoint="/v1/models",status="200"}'] == 1
        refused = httpx.get(f"{live.url}/v1/models")
        assert refused.status_code == 401
        assert refused.headers["x-request-id"].startswith("req_")
        before = series(http)
        monkeypatch.setattr(live.server._service, "card", lambda: 1 / 0)
        answer = http.get("/v1/models", headers={"x-request-id": "bad-day"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "bad-day")
        assert answer.json()["error"]["code"] == "internal_error"
        assert growth(before, series(http), "sparsex_requests_total", 'models",status="500"') == 1
