"""Two engines on Ray Serve, in processes of their own: routing by what they hold, and the death of one under load."""

import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgpack
import pytest
import zmq
from live import wait_for

from sparsex_jax.errors import AddressError, InvalidRequestError
from sparsex_jax.routing import Sketch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own configuration
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray: uv sync --extra ray"),
]
ROOT = Path(__file__).parents[1]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process that serves two replicas, its port, and the port of the first one's KV events."""
    log = tmp_path_factory.mktemp("ray") / "log"
    port, events = _free_port(), _free_port()
    command = [sys.executable, "scripts/serve_ray.py", "ruler-tiny", "--replicas", "2", "--port", str(port)]
    command += ["--no-warm-up", "--store-tokens", "8192", "--sample", "4", "--kv-events", f"tcp://127.0.0.1:{events}"]
    command += ["--fetch", "--host-store", "64MiB"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: process.poll() is not None or b"Serving" in log.read_bytes(), 240)
        assert process.poll() is None, log.read_text()[-3000:]
        yield process, port, events
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(90) == 0, log.read_text()[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def fleet(server):
    """A client."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server[1]}", timeout=300) as client:
        wait_for(lambda: _num(client) == 2, 60)
        yield client


def _num(client) -> int:
    with contextlib.suppress(httpx.HTTPError):
        return len(client.get("/v1/replicas").json()["data"])
    return 0


def text(subject: int) -> str:
    facts = [
        f"Fact {n} of {subject}: the key {n * 7919 * (subject + 3) % 9973} opens box {n * subject}." for n in range(20)
    ]
    return " ".join(facts)


def ask(client, prompt, **fields):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
    return client.post("/v1/completions", json=body)


def told(client, replica: str) -> bool:
    """Whether the router was told of anything that this replica holds."""
    states = {state["id"]: state for state in client.get("/v1/replicas").json()["data"]}
    return states[replica]["samples"] > 0


def test_prompts_go_where_their_texts_are(fleet):
    homes = {}
    for subject in range(1, 5):
        response = ask(fleet, text(subject))
        assert response.status_code == 200, response.text
        homes[subject] = response.headers["x-sparsex-replica"]
        wait_for(lambda name=homes[subject]: told(fleet, name), 10)
    assert len(set(homes.values())) == 2, "four texts, and all went to one of two idle replicas"
    time.sleep(3)  # until nothing is assumed any more, and only digests count
    reuse = {"method": "naive", "only_if_faster": False}
    for subject, home in homes.items():
        response = ask(fleet, f"Some other words stand before it. {text(subject)} Which box?", reuse=reuse)
        assert response.headers["x-sparsex-replica"] == home
        report = response.json()["sparsex"]
        assert report["reused_tokens"] > 0.8 * report["prompt_tokens"]


def test_a_salt_hides_texts_from_the_router_too(fleet):
    before = ask(fleet, text(11), cache_salt="one").json()["sparsex"]
    other = ask(fleet, text(11), cache_salt="other").json()["sparsex"]
    assert before["prefix_tokens"] == other["prefix_tokens"] == 0


def test_streams_pass_through_event_by_event(fleet):
    body = {"prompt": "Count: one, two,", "max_tokens": 48, "stream": True, "ignore_eos": True}
    with fleet.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        times = [time.perf_counter() for line in response.iter_lines() if line.startswith("data: ")]
    assert len(times) > 3
    assert len(response.headers.get_list("x-request-id")) == 1
    assert times[-1] - times[0] > 0


def test_each_replica_publishes_kv_events(fleet, server):
    with zmq.Context() as context, context.socket(zmq.SUB) as stream:
        stream.setsockopt(zmq.SUBSCRIBE, b"kv-events")
        stream.setsockopt(zmq.RCVTIMEO, 30_000)
        for rank in range(2):
            stream.connect(f"tcp://127.0.0.1:{server[2] + rank}")
        time.sleep(2)  # subscriptions take effect
        assert ask(fleet, text(31)).status_code == 200
        _, _, batch = stream.recv_multipart()
        _, events, rank = msgpack.unpackb(batch)
        assert {event["type"] for event in events} == {"BlockStored"}
        assert (events[0]["parent_block_hash"], len(events[0]["token_ids"])) == (None, 64)
        assert rank in (0, 1)


def test_a_replica_that_is_chosen_for_its_short_queue_fetches(fleet):
    """Many ask about one document at once, each with other words behind it: not all go to where it is, and the other
    replica gets it from there."""
    for subject in (41, 43, 45, 47):  # replicas that still compile programs are too late, and compute it
        document = f"{text(subject)} {text(subject + 1)}"
        home = ask(fleet, document).headers["x-sparsex-replica"]
        time.sleep(3)  # until it is in host memory, and only digests count
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(_asked, fleet, f"{document} {text(20 * subject + n)}") for n in range(12)]
            assert {future.result(300) for future in asked} > {home}, "all were sent to one of two replicas"
        if fetched := _moved(fleet, "fetched", "blocks"):
            break
    assert 0 < fetched <= _moved(fleet, "served", "blocks")
    assert _moved(fleet, "fetched", "failed") == _moved(fleet, "served", "refused") == 0


def _asked(client, prompt: str) -> str:
    """Who answered."""
    response = ask(client, prompt, max_tokens=64, reuse={"method": "prefix", "only_if_faster": False})
    assert response.status_code == 200, response.text
    return response.headers["x-sparsex-replica"]


def _moved(client, side: str, what: str) -> int:
    """What all replicas together fetched or served."""
    return sum(state[side][what] for state in client.get("/v1/replicas").json()["data"])


def test_a_wrong_request_gets_the_servers_own_error(fleet):
    response = ask(fleet, "hello", max_tokens=-1)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    assert fleet.get("/v1/models").json()["data"][0]["id"] == "ruler-tiny"
    assert fleet.get("/v1/knowledge").status_code == 501


def test_a_replica_that_is_killed_under_load(fleet, server):
    """Those that it works on get an error that says so, all others an answer, and Serve brings another one."""
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        at_once = [pool.submit(_outcome, fleet, number) for number in range(12)]
        wait_for(lambda: _num_open(fleet) == 12, 60)
        there = _open(fleet)
        os.kill(_engines(server[0].pid)[0], signal.SIGKILL)
        later = [pool.submit(_outcome, fleet, 100 + number) for number in range(12)]
        outcomes = [future.result(300) for future in at_once]
        others = [future.result(300) for future in later]
    [survivor] = set(outcomes) & set(there)
    [victim] = set(there) - {survivor}
    assert outcomes.count("replica_lost") == there[victim] > 0
    assert outcomes.count(survivor) == there[survivor] > 0
    assert set(others) <= {"replica_lost", *_open(fleet), survivor}
    assert others.count("replica_lost") <= 6, "only what was sent before anybody knew"
    wait_for(lambda: _num(fleet) == 2 and victim not in _open(fleet), 120)
    assert ask(fleet, text(77)).status_code == 200


def _outcome(client, number: int) -> str:
    """The replica that answered in full, or the code of the error: of the response, or of the stream's last event."""
    body = {"prompt": text(number), "max_tokens": 96, "ignore_eos": True, "stream": number % 2 == 0}
    response = client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return response.json()["error"]["code"]
    if body["stream"] and not response.text.rstrip().endswith("data: [DONE]"):
        assert '"code": "replica_lost"' in response.text.rstrip().rsplit("\n\n", 1)[-1], response.text[-300:]
        return "replica_lost"
    return response.headers["x-sparsex-replica"]


def _open(client) -> dict[str, int]:
    """Requests that the front has open, by replica; the one with most comes first."""
    states = client.get("/v1/replicas").json()["data"]
    return {s["id"]: s["open"] for s in sorted(states, key=lambda state: -state["open"])}


def _num_open(client) -> int:
    return sum(_open(client).values())


def _engines(server: int) -> list[int]:
    """Processes of engines that descend from this one."""
    return [pid for pid in _descendants(server) if b"ServeReplica:sparsex:engines" in _read(pid, "cmdline")]


def _descendants(pid: int) -> list[int]:
    parents = {int(each.name): _read(int(each.name), "stat") for each in Path("/proc").iterdir() if each.name.isdigit()}
    children = [one for one, stat in parents.items() if stat and int(stat.rsplit(b")", 1)[1].split()[1]) == pid]
    return children + [one for child in children for one in _descendants(child)]


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def test_replicas_scale_as_they_are_told():
    from sparsex_jax.serving.fleet.on_ray import FleetConfig, ScaleConfig, application

    assert ScaleConfig(3, 3).of_replicas() == {"num_replicas": 3}
    [scaling] = ScaleConfig(1, 4, target_ongoing_requests=2.0, downscale_delay_s=60).of_replicas().values()
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 2.0)
    assert scaling.downscale_delay_s == 60
    for options, message in (
        ({"min_replicas": 3}, "max_replicas=2 is less than min_replicas"),
        ({"min_replicas": 0}, "min_replicas=0 must be an integer >= 1"),
        ({"num_cpus": -1}, "num_cpus=-1"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests=0"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            ScaleConfig(**options)
    fleet = FleetConfig("ruler-tiny", "tiny", dict, Sketch(b"a fleet's secret"))
    assert application(fleet, ScaleConfig(1, 4)) is not None


def test_a_cluster_that_is_not_there_is_named():
    from sparsex_jax.serving.fleet.on_ray import connect

    with pytest.raises(AddressError, match="address='not an address'"):
        connect("not an address")
