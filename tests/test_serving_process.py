"""The server's process: the sockets that it listens at, and the signals that end it."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import httpx
import jax
import pytest
from conftest import TALKING
from live import ScriptedLoop, live_server, make_engine, wait_for
from typer.testing import CliRunner

from sparsex_jax.checkpoints import open_checkpoint, save_checkpoint
from sparsex_jax.cli import app
from sparsex_jax.errors import AddressError
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.sockets import bound, url_of
from sparsex_jax.serving.supervisor import Supervisor
from sparsex_jax.serving.worker import Worker

EMBEDDED = "smollm2-135m-instruct"
DONE = [Event("x", (1,), finish_reason="stop")]


@pytest.fixture(scope="module")
def engine():
    return make_engine()


# Sockets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def taken():
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_port_in_use_is_refused_before_a_model_is_loaded(taken, host, monkeypatch):
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda _: pytest.fail("it was loaded"))
    result = CliRunner().invoke(app, ["serve", "--host", host, "--port", str(taken)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"port={taken} cannot be listened at: it is in use" in result.stderr


def test_of_two_that_start_at_once_one_is_refused():
    with (
        bound("127.0.0.1", 0) as [first],
        pytest.raises(AddressError, match="in use"),
        bound("127.0.0.1", first.getsockname()[1]),
    ):
        pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "203.0.113.7"])
def test_hosts_that_are_none_of_this_machine(host):
    with pytest.raises(AddressError, match=host[:60]), bound(host, 0):
        pass


def test_a_port_is_free_again_when_its_server_has_ended(engine):
    """Also for a moment's connections, which the kernel remembers."""
    with live_server(engine, loop=ScriptedLoop(lambda _: DONE)) as live:
        port = httpx.URL(live.url).port
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(1000)
            while client.recv(1000):
                pass
    with bound("127.0.0.1", port):
        pass


def test_a_name_of_several_addresses_has_one_port_at_all():
    with bound("localhost", 0) as sockets:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert all(url_of(each).startswith("http://") for each in sockets)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address(host):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with bound(host, 0) as [listener]:
            assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")


def run_at(engine, sockets):
    """A server at these sockets, on a thread."""
    server = Server(create_app(Worker(engine, ScriptedLoop(lambda _: DONE)), model="tiny"), sockets=sockets)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    return server, thread


def test_who_waits_for_the_word_that_it_listens_can_connect(engine):
    answers = []
    app = create_app(Worker(engine, ScriptedLoop(lambda _: DONE)), model="tiny")
    with bound("127.0.0.1", 0) as [listener]:

        def connect():
            with socket.create_connection(listener.getsockname(), timeout=5):
                answers.append("connected")
            server.should_exit = True

        server = Server(app, sockets=[listener], on_listening=connect)
        server.run()
    assert answers == ["connected"]


def test_a_unix_socket(engine, tmp_path):
    path = tmp_path / "socket"
    with bound("", 0, path) as sockets:
        server, thread = run_at(engine, sockets)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
            assert http.post("http://x/v1/completions", json={"prompt": "x"}).status_code == 200
        with pytest.raises(AddressError, match="in use"), bound("", 0, path):
            pass
        server.should_exit = True
        thread.join(30)
    assert not path.exists()


def test_a_unix_socket_that_a_killed_server_left(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with bound("", 0, path):
        assert path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(AddressError, match="no socket"), bound("", 0, tmp_path / "file"):
        pass


# Signals ----------------------------------------------------------------------------------------------------


def test_signals_within_a_second_are_one_wish(engine, monkeypatch):
    now, raised, drained = [100.0], [], []
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("sparsex_jax.serving.server.time", clock)
    monkeypatch.setattr("signal.raise_signal", raised.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    server = Server(create_app(Worker(engine, ScriptedLoop(lambda _: DONE)), model="tiny"))
    server._asyncio = types.SimpleNamespace(call_soon_threadsafe=drained.append)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        server.handle_exit(number, None)
        now[0] += 0.2
    assert (len(drained), raised) == (1, [])
    now[0] += 1
    server.handle_exit(signal.SIGTERM, None)
    assert (len(drained), raised) == (1, [signal.SIGTERM])


SERVE = """
import sys, time
sys.path.insert(0, {tests!r})
from live import ScriptedLoop, make_engine
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.worker import Worker

def script(prompt):
    for number in range(100):
        time.sleep(0.05)
        yield Event("...", (1,), finish_reason="stop" if number == {events} else None)

app = create_app(Worker(make_engine(), ScriptedLoop(script)), model="tiny", limits=Limits(drain_timeout=60))
Server(app, "127.0.0.1", {port}).run()
"""


def signalled(events, pauses):
    """What a client reads of a stream, and the exit code of a server that gets a signal after each pause."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = SERVE.format(tests=os.path.dirname(__file__), port=port, events=events)
    process = subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 120)
        body = {"prompt": "x", "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            for pause in pauses:
                threading.Event().wait(pause)
                os.killpg(process.pid, signal.SIGTERM)
            try:
                text = "".join(lines)
            except httpx.HTTPError:
                text = ""
        return text, process.wait(30)
    finally:
        process.kill()


@pytest.mark.slow
def test_two_signals_of_a_process_group_are_one_and_the_stream_is_finished():
    text, code = signalled(events=40, pauses=[0, 0.001])
    assert (text.endswith("data: [DONE]"), code) == (True, 0)


@pytest.mark.slow
def test_a_later_signal_ends_the_process_at_once():
    text, code = signalled(events=99, pauses=[0, 1.5])
    assert (text.endswith("data: [DONE]"), code) == (False, -signal.SIGTERM)


# Health -----------------------------------------------------------------------------------------------------


def health_of(http):
    """The state, and whether the server is live and ready by it."""
    answers = [http.get(f"/health{path}") for path in ("", "/live", "/ready")]
    [state] = {answer.json()["status"] for answer in answers}
    assert answers[0].status_code == answers[2].status_code
    return state, answers[1].status_code == 200, answers[2].status_code == 200


def test_a_step_that_hangs_is_told_from_a_server_that_has_no_work(engine, monkeypatch, tmp_path):
    """And a server that drains is live, and takes nothing. systemd hears of all that."""
    hang, said, compiled = threading.Event(), [], [7]
    monkeypatch.setattr("sparsex_jax.device.heartbeat.num_compilations", lambda: compiled[0])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def hears(state):
            with contextlib.suppress(BlockingIOError):
                while True:
                    said.append(systemd.recv(100).decode())
            return state in said

        def script(_):
            yield Event("a", (1,))
            hang.wait(30)
            yield DONE[0]

        loop = ScriptedLoop(script)
        with (
            live_server(engine, loop=loop, limits=Limits(hang_timeout=0.5)) as live,
            live.http() as http,
            live.http() as other,
        ):
            wait_for(lambda: hears("READY=1") and hears("WATCHDOG=1"))
            threading.Event().wait(0.7)  # without work
            assert health_of(http) == ("ok", True, True)
            with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                wait_for(lambda: other.get("/health/live").status_code == 503)
                assert health_of(other) == ("hung", False, False)
                compiled[0] += 1  # one of several programs
                assert health_of(other) == ("ok", True, True)
                wait_for(lambda: other.get("/health/live").status_code == 503)
                hears("")  # what was said before
                said.clear()
                threading.Event().wait(1.2)
                assert not hears("WATCHDOG=1")
                hang.set()
                assert "".join(lines).endswith("data: [DONE]")
            wait_for(lambda: http.get("/health/live").status_code == 200)
            live.worker.draining = True
            assert health_of(http) == ("draining", True, False)
            live.worker.draining = False
            live.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: hears("STOPPING=1"))


def test_an_abstract_notify_socket_and_one_where_nobody_listens():
    name = f"sparsex-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        Supervisor(f"@{name}").tell("READY=1")
        assert systemd.recv(100) == b"READY=1"
    for nobody in (f"@{name}", "/no/such/socket", ""):
        Supervisor(nobody).tell("READY=1")


# Its start --------------------------------------------------------------------------------------------------

A_COMMAND = "from sparsex_jax.cli import app; app()"


def test_a_server_with_the_default_warm_up_starts_answers_and_ends(tmp_path):
    """Apart from here, where types are checked that JAX's own records of arguments have not. With the tokenizer of the
    embedded model structures are compiled too; there is one sequence, as each size has programs of its own."""
    model, tokenizer = dataclasses.replace(TALKING, num_layers=2, max_position=256), open_checkpoint(EMBEDDED).tokenizer
    save_checkpoint(tmp_path / "tiny", model, random_params(model, "float32", make_mesh(), seed=0), tokenizer)
    address = tmp_path / "socket"
    options = ["--uds", address, "--max-num-seqs", "1", "--store-tokens", "512", "--healing", "0"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, "-c", A_COMMAND, "serve", tmp_path / "tiny", *options]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = "".join(iter_until(process.stderr, "Serving tiny"))
            assert "Compiled or loaded" in said, said
            assert "Serving tiny" in said, said
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(address)), timeout=30) as http:
                assert http.get("http://x/health/ready").status_code == 200, "it listens before it says so"
                body = {"prompt": "A colour", "max_tokens": 4, "structured_outputs": {"choice": ["red", "blue"]}}
                answer = http.post("http://x/v1/completions", json=body).json()
                metrics = http.get("http://x/metrics").text
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert answer["choices"][0]["text"] in ("red", "blue")
    assert 'sparsex_compilations_total{when="listening"} 0.0' in metrics


def iter_until(lines, mark):
    """The lines up to the one that begins so, or to the end."""
    for line in lines:
        yield line
        if line.startswith(mark):
            return
