"""No client can keep the server from the others: keys, bodies, connections, the line, and a short fuzzing."""

import asyncio
import collections
import contextlib
import json
import signal
import socket
import threading
import time
import types
import urllib.parse

import fuzz_server
import httpx
import pytest
from live import ScriptedLoop, live_server, make_engine, wait_for

from sparsex_jax.config import Round
from sparsex_jax.errors import InvalidRequestError, OverloadedError
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.serving import bodies, schemas
from sparsex_jax.serving.access import Access, ConcurrencyError, Limits, Tenant
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.line import Line, Pace, delay_of

DONE = [Event("x", (1,), finish_reason="stop")]
FOREVER = [Event("...", (1,)), None]
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def engine():
    """Only its tokenizer and its limits are used."""
    return make_engine()


def served(engine, script, **options):
    return live_server(engine, loop=ScriptedLoop(script), **options)


@contextlib.contextmanager
def raw(live, data=b""):
    """A connection, on which this was sent."""
    address = urllib.parse.urlsplit(live.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        client.sendall(data)
        yield client


def received(client):
    """Until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def status(answer):
    return int(answer.split(b" ", 2)[1])


# Keys and bodies --------------------------------------------------------------------------------------------


def test_the_key_is_checked_before_the_body_comes(engine, tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('[alice]\nkey = "sk-alice"')
    with served(engine, lambda _: DONE, access=Access.load(path, Limits())) as live:
        for more in ("", "Authorization: Bearer sk-mallory\r\n", "Authorization: Basic sk-alice\r\n"):
            with raw(live, f"{HEAD}{more}Content-Length: 100000\r\n\r\n".encode()) as client:
                assert status(client.recv(1000)) == 401


def test_clients_that_trickle_are_refused_or_closed(engine):
    with served(engine, lambda _: DONE, limits=Limits(client_timeout=0.3)) as live:
        half = f"{HEAD}Content-Length: 100\r\n\r\n{{".encode()
        with raw(live, half) as half_body, raw(live, HEAD.encode()) as half_head, raw(live) as silent:
            assert status(received(half_body)) == 408
            assert received(half_head) == received(silent) == b""
        with raw(live, b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{") as answered_early:
            assert status(received(answered_early)) == 200


def test_a_body_that_comes_slowly_but_comes_is_taken(engine):
    """In all, longer than the time that it has before its first byte."""
    body = json.dumps({"prompt": "x" * 40_000}).encode()
    head = f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with served(engine, lambda _: DONE, limits=Limits(client_timeout=0.5)) as live, raw(live, head) as client:
        for start in range(0, len(body), 8000):
            client.sendall(body[start : start + 8000])
            time.sleep(0.15)
        assert status(received(client)) in (200, 400)


def test_an_answer_that_nobody_reads_is_cancelled(engine):
    script = [Event("x" * 100_000, (1,))] * 100
    with served(engine, lambda _: [*script, None], limits=Limits(client_timeout=0.3)) as live:
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        with raw(live, f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body):
            wait_for(lambda: live.worker.loop.tickets and live.worker.loop.tickets[0].cancelled)


def test_idle_connections_make_room_for_new_ones(engine):
    with served(engine, lambda _: DONE, limits=Limits(max_connections=8)) as live, contextlib.ExitStack() as held:
        idle = [held.enter_context(raw(live)) for _ in range(20)]
        half = [held.enter_context(raw(live, f"{HEAD}Content-Length: 9\r\n\r\n".encode())) for _ in range(20)]
        assert httpx.get(f"{live.url}/health").status_code == 200
        assert received(idle[0]) == received(half[0]) == b""


def test_with_all_connections_busy_a_new_one_is_told(engine):
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with served(engine, lambda _: FOREVER, limits=Limits(max_connections=3)) as live, contextlib.ExitStack() as held:
        for _ in range(3):
            client = held.enter_context(raw(live, f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body))
            assert status(client.recv(1000)) == 200
        with raw(live) as client:
            answer = received(client)
        assert status(answer) == 503
        assert b"retry-after" in answer


def test_chunks_of_a_byte_are_given_up(engine):
    with (
        served(engine, lambda _: DONE) as live,
        raw(live, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()) as client,
    ):
        with contextlib.suppress(ConnectionError):
            client.sendall(b"1\r\nx\r\n" * 300_000)
        assert received(client) == b""
        assert httpx.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({"prompt": [1, 2, 3]}, 3),
        ({"a": ['x\\"[{', "\\", "é\n"], "b": {"c": 1.5}}, 6 + 3 + 1),
        ({"a": [True, False, None]}, 3 + 2),
    ],
)
def test_values_are_counted_outside_of_strings(value, count):
    assert bodies.count_values(json.dumps(value).encode()) == count


@pytest.mark.parametrize("item", [b"[]", b"{}", b'"a"', b"1.5", b'{"role":"user","content":"x"}', b"true"])
@pytest.mark.parametrize("field", [b"prompt", b"messages", b"tools", b"unknown"])
def test_a_large_body_of_small_values_is_refused_soon(item, field):
    content = b'{"%s":[' % field + (item + b",") * ((4 << 20) // (len(item) + 1)) + b"null]}"
    started = time.thread_time()
    with pytest.raises(RequestError, match="more than 50000 strings"):
        bodies.parse(content, schemas.ChatRequest)
    assert time.thread_time() - started < 0.5


def test_large_bodies_that_are_well_are_parsed():
    ids = bodies.parse(json.dumps({"prompt": list(range(300_000))}).encode(), schemas.CompletionRequest)
    assert len(ids.prompt) == 300_000
    text = 'if (a[0] == "{") { return "\\n"; }\n' * 30_000
    assert bodies.parse(json.dumps({"prompt": text}).encode(), schemas.CompletionRequest).prompt == text
    assert bodies.parse(b'\xef\xbb\xbf{"prompt": "x"}', schemas.CompletionRequest).prompt == "x"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/vnd.api+json; charset=utf-8"}, 200),
    ],
)
def test_types_and_encodings_of_bodies(engine, headers, expected):
    with served(engine, lambda _: DONE) as live:
        answer = httpx.post(f"{live.url}/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert answer.status_code == expected


# The line ---------------------------------------------------------------------------------------------------


def tenant(name="alice", most=None):
    return Tenant(name, name, most, False, None)


def test_a_hundred_clients_wait_where_the_queue_has_room(engine):
    async def ask(live):
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
            requests = [http.post("/v1/completions", json={"prompt": "x"}) for _ in range(100)]
            return collections.Counter(answer.status_code for answer in await asyncio.gather(*requests))

    with served(engine, lambda _: DONE) as live:
        assert asyncio.run(ask(live)) == {200: 100}


def test_each_prompt_counts(engine, tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('[alice]\nkey = "sk-alice"\nmax_concurrent = 4')
    with served(engine, lambda _: FOREVER, access=Access.load(path, Limits())) as live, live.http("sk-alice") as http:
        answer = http.post("/v1/completions", json={"prompt": ["x"] * 5})
        assert answer.status_code == 400
        assert "the request has 5 answers" in answer.json()["error"]["message"]
        with http.stream("POST", "/v1/completions", json={"prompt": ["x"] * 3, "stream": True}):
            answer = http.post("/v1/completions", json={"prompt": ["x"] * 2})
            assert answer.status_code == 429
            assert "3 sequences of this key are under way" in answer.json()["error"]["message"]
            assert int(answer.headers["Retry-After"]) >= 1


def in_line(scenario):
    async def run():
        scenario()

    asyncio.run(run())


def test_keys_take_turns():
    order = []

    async def ask(line, who, name):
        with line.place(who) as place:
            await place.turn()
            order.append(name)
            await asyncio.sleep(0)

    async def scenario():
        line, alice, bob = Line(1, 8, num_keys=2), tenant("alice"), tenant("bob")
        requests = [ask(line, alice, f"a{n}") for n in range(5)] + [ask(line, bob, f"b{n}") for n in range(2)]
        await asyncio.gather(*requests)
        assert line.waiting == 0

    asyncio.run(scenario())
    assert order == ["a0", "a1", "a2", "b0", "a3", "b1", "a4"]


def test_what_is_held_for_a_round_keeps_nobodys_turn_and_a_key_cannot_hold_all_places():
    async def scenario():
        line, alice, bob = Line(1, 4, num_keys=2), tenant("alice"), tenant("bob")
        held = [Member(Round("waiting", 2)) for _ in range(3)]
        with contextlib.ExitStack() as stack:
            first, second, third, other = (stack.enter_context(line.place(who)) for who in (alice, alice, alice, bob))
            for place, member in zip((first, second, third), held, strict=True):
                place.members = frozenset([member])
            await first.turn()
            await second.turn()
            with pytest.raises(ConcurrencyError, match="2 sequences of this key are held for their rounds"):
                await third.turn()
            async with asyncio.timeout(5):
                await other.turn()

    asyncio.run(scenario())


def test_priorities_order_the_requests_of_a_key_and_none_waits_for_ever(monkeypatch):
    now, order = [1000.0], []
    monkeypatch.setattr("sparsex_jax.serving.line.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario():
        line, alice, bob = Line(1, 20, num_keys=2), tenant("alice"), tenant("bob")

        async def ask(who, name, priority):
            with line.place(who) as place:
                place.delay_s = delay_of(priority)
                await place.turn()
                order.append(name)
                await asyncio.sleep(0)

        async def come(who, name, priority):
            now[0] += 0.01
            tasks.append(asyncio.ensure_future(ask(who, name, priority)))
            await asyncio.sleep(0)

        tasks = []
        with line.place(bob) as first, line.place(bob) as second:
            await first.turn()
            await second.turn()
            await come(alice, "late", 5)
            await come(alice, "usual", None)
            await come(alice, "early", -5)
            await come(bob, "bob", 10**9)
            now[0] += 6
            await come(alice, "earlier, but 6 s later", -5)
            now[0] += 61
            await come(alice, "a minute later", -(10**9))
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert [name for name in order if name != "bob"] == [
        *("early", "usual", "earlier, but 6 s later", "late", "a minute later"),
    ]
    assert order.index("bob") <= 1  # its key's turn, whatever its priority


def test_a_full_line_takes_a_key_that_is_within_its_share():
    def scenario():
        line, alice, bob = Line(2, 4, num_keys=2), tenant("alice"), tenant("bob")
        with contextlib.ExitStack() as held:
            for _ in range(6):
                held.enter_context(line.place(alice))
            with pytest.raises(OverloadedError, match="6 sequences are under way"):
                held.enter_context(line.place(alice))
            for _ in range(3):
                held.enter_context(line.place(bob))
            with pytest.raises(OverloadedError):
                held.enter_context(line.place(bob))
        with line.place(alice) as place:
            place.grow(3)

    in_line(scenario)


def test_what_could_never_be_under_way_is_no_overload():
    def scenario():
        line = Line(2, 4)
        with line.place(tenant()) as place, pytest.raises(InvalidRequestError, match="the most here are 4"):
            place.grow(4)
        with line.place(tenant(most=2)) as place, pytest.raises(InvalidRequestError, match="the most here are 2"):
            place.grow(2)

    in_line(scenario)


def test_a_request_that_leaves_the_line_gives_its_place_back():
    async def scenario():
        line, who = Line(1, 1, num_keys=2), tenant()
        with line.place(who) as first:
            await first.turn()
            with contextlib.suppress(TimeoutError), line.place(who) as second:
                async with asyncio.timeout(0.01):
                    await asyncio.shield(asyncio.ensure_future(second.turn()))
        with line.place(who) as third:
            await asyncio.wait_for(third.turn(), 1)
        assert line.waiting == 0

    asyncio.run(scenario())


def test_each_who_is_turned_away_is_told_a_later_time(monkeypatch):
    """At the rate at which requests end: here, one every 2 seconds."""
    now = [0.0]
    monkeypatch.setattr("sparsex_jax.serving.line.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario():
        line, who = Line(2, 62), tenant(most=64)
        with contextlib.ExitStack() as held:
            for _ in range(60):
                place = held.enter_context(line.place(who))
                await place.turn()
            for _ in range(10):
                with line.place(who) as place:
                    await place.turn()
                    now[0] += 2
            for _ in range(4):
                held.enter_context(line.place(who))
            told = []
            for _ in range(40):
                with pytest.raises(ConcurrencyError) as refused:
                    held.enter_context(line.place(who))
                told.append(refused.value.retry_after_s)
        assert told[:3] == pytest.approx([2, 4, 6])
        assert max(told) == 60

    asyncio.run(scenario())


def test_the_pace_leaves_idle_time_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sparsex_jax.serving.line.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace()
    for _ in range(20):
        pace.begin()
        now[0] += 0.5
        pace.end(1, more=False)
        now[0] += 1000
    assert pace.seconds_between_ends() == pytest.approx(0.5)


def test_requests_in_line_are_finished_while_draining(engine, tmp_path):
    """With two keys, so that some wait in the server's line and not in the loop's."""
    path = tmp_path / "keys.toml"
    path.write_text('[alice]\nkey = "sk-alice"\n[bob]\nkey = "sk-bob"')
    gone = threading.Event()

    def script(_):
        gone.wait(20)
        yield DONE[0]

    async def ask(live):
        headers = {"Authorization": "Bearer sk-alice"}
        async with httpx.AsyncClient(base_url=live.url, timeout=60, headers=headers) as http:
            requests = [asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"})) for _ in range(12)]
            while live.server.config.app.state.service.line.waiting < 4:
                await asyncio.sleep(0.01)
            live.server.handle_exit(signal.SIGTERM, None)
            late = await http.post("/v1/completions", json={"prompt": "x"})
            gone.set()
            return late.status_code, {answer.status_code for answer in await asyncio.gather(*requests)}

    with served(engine, script, access=Access.load(path, Limits())) as live:
        assert asyncio.run(ask(live)) == (503, {200})


# Fuzzing ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed():
    with live_server(make_engine(max_waiting=16), limits=Limits(max_body_bytes=1 << 20, client_timeout=2)) as live:
        httpx.post(f"{live.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60)
        yield live


def test_a_little_fuzzing_breaks_nothing(fuzzed):
    fuzzer = fuzz_server.Fuzzer(fuzzed.url, limit_bytes=1 << 20)
    ends, _ = asyncio.run(fuzz_server.fuzz(fuzzer, seconds=1, clients=6))
    assert not [name for name, count in ends.items() if any("500" in end for end in count)], ends
    assert httpx.get(f"{fuzzed.url}/health", timeout=20).json() == {"status": "ok"}


@pytest.mark.slow
def test_fuzzing_breaks_nothing(fuzzed):
    assert fuzz_server.run(fuzz_server.Fuzzer(fuzzed.url, limit_bytes=1 << 20), seconds=30, clients=12)
    wait_for(lambda: httpx.get(f"{fuzzed.url}/v1/store").json()["active"] == 0)


def test_answers_are_read_by_status():
    assert fuzz_server.said(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n") == "200 404"
    assert "500" in fuzz_server.said(b'HTTP/1.1 200 OK\r\n\r\ndata: {"code": "internal_error"}')
    assert fuzz_server.said(b"") == "closed"
