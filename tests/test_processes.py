"""Real processes on one machine, each with devices of its own: they answer as one process does, and end together.

Each compiles for itself, so a test takes a minute.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live import wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "run_distributed.py"
MODEL = str(ROOT / "configs" / "ruler-tiny")
COMMAND = [sys.executable, "-c", "from sparsex_jax.cli import app; app()"]
ASKED = {"prompt": "the", "max_tokens": 12, "ignore_eos": True}


def environment(devices=1, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEX_", "SLURM_"))}
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return kept | quick | {"JAX_NUM_CPU_DEVICES": str(devices)} | more


def free_ports():
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError):
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


class Group:
    """A server of two processes."""

    def __init__(self, directory, *options, others=()):
        self.url, coordinator = f"http://127.0.0.1:{free_ports()}", f"127.0.0.1:{free_ports()}"
        self.logs = [directory / f"{number}.log" for number in range(2)]
        serve = [
            "serve",
            MODEL,
            "--tensor-parallel=2",
            "--no-warm-up",
            "--store-tokens=2048",
            "--drain-timeout=200",
            "--silence-timeout=10",
        ]
        common = environment(SPARSEX_GROUP_SECRET=secrets.token_hex(16))
        self.processes = []
        for number, log in enumerate(self.logs):
            own = [f"--coordinator={coordinator}", "--num-processes=2", f"--process-id={number}"]
            place = [f"--port={self.url.rpartition(':')[2]}"]
            with log.open("wb") as out:
                arguments = [*COMMAND, *serve, *place, *own, *options, *(others if number else ())]
                self.processes.append(subprocess.Popen(arguments, stdout=out, stderr=out, env=common))

    def wait_until_up(self):
        def up():
            assert all(process.poll() is None for process in self.processes), self.said()
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/health").status_code == 200

        wait_for(up, 300)

    def ask(self, **fields):
        return httpx.post(f"{self.url}/v1/completions", json=ASKED | fields, timeout=240)

    def said(self):
        return [log.read_text() for log in self.logs]

    def codes(self, seconds=90):
        return [process.wait(seconds) for process in self.processes]


@pytest.fixture
def group(tmp_path):
    made = Group(tmp_path)
    try:
        made.wait_until_up()
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


def answered(*command, **env):
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


GENERATE = ["generate", "the", "of", "--model", MODEL, "--no-chat", "--json", "--max-new-tokens=16"]


def test_a_command_in_two_processes_prints_what_it_prints_in_one(tmp_path):
    """With the same mesh: another one rounds otherwise, which a temperature above 0 may show."""
    known = tmp_path / "known.txt"
    known.write_text("of the and " * 40)
    generate = [*GENERATE, "--temperature=0.7", f"--remember={known}", "--tensor-parallel=2"]
    script = [sys.executable, str(SCRIPT), "--processes=2", "--"]
    both = answered(*script, *generate), answered(*COMMAND, *generate, devices=2)
    tokens = [[each["token_ids"] for each in answer["answers"]] for answer in both]
    assert tokens[0] == tokens[1]
    assert [len(each) for each in tokens[0]] == [16, 16]


@pytest.mark.parametrize(("seed", "devices"), [(0, 1), (1, 1), (2, 2)])
def test_requests_that_come_and_go_have_the_tokens_of_one_process(seed, devices):
    """Sequences are preempted and cancelled. With two devices of each process, each KV head is there twice."""
    member = [sys.executable, str(ROOT / "tests" / "member.py"), str(seed), str(2 * devices)]
    group = [f"127.0.0.1:{free_ports()}", "2"]
    secret = {"SPARSEX_GROUP_SECRET": secrets.token_hex(16)}
    with subprocess.Popen(
        [*member, *group, "1"], env=environment(devices, **secret), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as follower:
        several = answered(*member, *group, "0", devices=devices, **secret)
        assert follower.wait(60) == 0
    alone = answered(*member, devices=2 * devices)
    assert several["tokens"] == alone["tokens"]
    assert len(alone["tokens"]) >= 4


def test_a_process_that_is_killed_in_the_middle_of_a_request_is_told(group):
    """The devices of process 0 may wait forever for those of the other one, and clients hear of it all the same."""
    first = group.ask()
    assert first.status_code == 200, first.text
    answers = []
    long = threading.Thread(target=lambda: answers.append(group.ask(max_tokens=900)), daemon=True)
    long.start()
    time.sleep(1)
    group.processes[1].kill()
    killed = time.monotonic()
    long.join(30)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "process_lost"), answers[0].text
    assert "process 1 (" in answers[0].json()["error"]["message"]
    assert httpx.get(f"{group.url}/health").status_code == 503
    assert group.codes() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 30
    assert "has ended; without it the others cannot go on" in group.said()[0].splitlines()[-1]


def test_a_process_that_stands_still_is_lost_too(group):
    group.processes[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: httpx.get(f"{group.url}/health").status_code == 503, 60)
    answer = group.ask()
    assert answer.status_code == 503
    assert "has given no sign of life for 10 s" in answer.json()["error"]["message"]
    assert group.processes[0].wait(60) == 1


def test_without_the_leader_the_others_end(group):
    group.processes[0].kill()
    assert group.codes() == [-signal.SIGKILL, 1]
    assert "it leads the group, which cannot go on without it" in group.said()[1]


@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_all_end_in_peace_whichever_is_told_to(group, told):
    for number in told:
        group.processes[number].terminate()
    assert group.codes() == [0, 0], group.said()


def test_what_runs_is_finished_before_all_end(group):
    answers = []
    running = threading.Thread(target=lambda: answers.append(group.ask(max_tokens=40)), daemon=True)
    running.start()
    time.sleep(1)
    group.processes[1].terminate()
    assert group.codes(240) == [0, 0], group.said()
    running.join(10)
    assert answers[0].status_code == 200, answers[0].text


def test_commands_that_differ_are_refused_in_both(tmp_path):
    group = Group(tmp_path, others=["--max-num-seqs=3"])
    codes = group.codes()
    assert codes == [2, 2], group.said()
    for said in group.said():
        assert "max_num_seqs is 3 in process 1" in said
        assert "and None in process 0; it must be the same in all" in said


def test_too_few_devices_are_refused_in_both(tmp_path):
    group = Group(tmp_path, "--tensor-parallel=1")
    assert group.codes() == [1, 1], group.said()
    says = "tensor_parallel=1 leaves process 1 without a device; it must be 2"
    assert all(says in said for said in group.said())
