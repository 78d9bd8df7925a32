"""Processes that compile for a server leave what it would compile itself, and cost nothing but time if they fail."""

import os
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, tiny_params
from jax.sharding import NamedSharding, PartitionSpec

from sparsex_jax import Engine, InvalidRequestError
from sparsex_jax.device import runner as runners
from sparsex_jax.device.ahead import Results
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.device.outlines import of_outline, outline
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.scheduler import helpers, warmup
from sparsex_jax.scheduler.helpers import BUSY, NUMBER, YOURS, Board, num_helpers, with_room

RESULTS = Results(jax.tree.structure(0), [])
WHOLE = NamedSharding(make_mesh(), PartitionSpec())


# Who does what ----------------------------------------------------------------------------------------------


def test_each_step_is_taken_once():
    board = Board(3)
    assert [board.step() for _ in range(4)] == [0, 1, 2, None]
    board = Board(3)
    board.close()
    assert board.step() is None


def test_a_program_is_traced_by_who_claims_it_first():
    board = Board(0)
    assert board.claim("x", "a") == YOURS
    assert board.claim("x", "b") == BUSY
    board.traced("x", RESULTS)
    assert board.claim("x", "b") == RESULTS
    board.ended("x")
    board.wait("x")


def test_what_was_not_traced_may_be_claimed_again():
    board = Board(0)
    for name in "xyz":
        assert board.claim(name, "a") == YOURS
    board.traced("x", RESULTS)
    board.ended("y")
    assert board.claim("y", "b") == YOURS, "a did not manage to"
    assert board.claim("z", "b") == BUSY
    board.lost("a")
    assert board.claim("z", "b") == YOURS
    assert board.claim("x", "b") == RESULTS
    board.wait("x")  # nobody will leave it, so nobody waits


@pytest.mark.parametrize(
    ("platform", "asked", "processors", "number"),
    [
        ("gpu", None, 7, 0),
        ("gpu", None, 8, 2),
        ("gpu", None, 16, 4),
        ("gpu", None, 192, 6),
        ("gpu", "0", 192, 0),
        ("gpu", "3", 2, 3),
        ("tpu", None, 192, 0),
    ],
)
def test_how_many_help(monkeypatch, platform, asked, processors, number):
    monkeypatch.delenv(NUMBER, raising=False)
    if asked is not None:
        monkeypatch.setenv(NUMBER, asked)
    monkeypatch.setattr(helpers, "num_processors", lambda: processors)
    assert num_helpers(platform) == number


@pytest.mark.parametrize(
    ("limit", "share", "number"),
    [(None, None, 6), (100e9, None, 10), (130e9, "0.9", 4), (72e9, "0.9", 2), (80e9, "1.0", 0)],
)
def test_as_many_help_as_there_is_memory_for(monkeypatch, limit, share, number):
    """Beside a server whose pool may take a share of the GPU, with a matrix of 1.05 GB that makes logits."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if share is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    device = SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})
    runner = SimpleNamespace(mesh=SimpleNamespace(local_devices=[device]))
    monkeypatch.setattr(helpers, "_head_bytes", lambda runner: 1.05e9)
    assert with_room(runner) == number
    monkeypatch.setattr(helpers, "num_processors", lambda: 192)
    monkeypatch.delenv(NUMBER, raising=False)
    assert num_helpers("gpu", with_room(runner)) == min(number, 6)


@pytest.mark.parametrize("asked", ["-1", "abc", "", "65", "1" * 5000])
def test_a_number_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv(NUMBER, asked)
    with pytest.raises(InvalidRequestError, match=f"{NUMBER}=.* must be an integer from 0 to 64"):
        num_helpers("gpu")


def test_helpers_that_hang_are_killed_and_what_they_claimed_is_done_here(monkeypatch, tmp_path):
    monkeypatch.setattr(helpers, "_PATIENCE", 0.05)
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    asked = helpers.Helpers(1, engine.loop, None, KeptPrograms(tmp_path, engine.mesh), 1)
    board, hanging = asked._board, SimpleNamespace()
    hanging.kill = lambda: board.lost(hanging)
    asked._started, asked._processes = True, [hanging]
    for name in ("traces", "compiles"):
        board.claim(name, hanging)
    board.traced("compiles", RESULTS)
    asked.wait(tmp_path / "compiles")
    assert asked.claim(tmp_path / "traces") is None
    assert asked.claim(tmp_path / "compiles") == RESULTS


def test_how_many_help_makes_no_other_programs(monkeypatch, tmp_path):
    before = KeptPrograms(tmp_path, make_mesh()).directory
    monkeypatch.setenv(NUMBER, "3")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert KeptPrograms(tmp_path, make_mesh()).directory == before
    monkeypatch.setenv("SPARSEX_KERNELS", "xla")
    assert KeptPrograms(tmp_path, make_mesh()).directory != before


# What another process gets to know --------------------------------------------------------------------------


def test_arrays_travel_as_shapes():
    array, host = jax.device_put(np.ones((2, 3), np.float16), WHOLE), np.arange(3)
    one, weak, same = of_outline(outline((array, jnp.asarray(1.0), host)))
    assert (one.shape, one.dtype, one.sharding, one.weak_type) == ((2, 3), np.float16, WHOLE, False)
    assert weak.weak_type
    assert same.tolist() == [0, 1, 2]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_runner_of_shapes_has_the_programs_of_the_other(devices, tmp_path):
    engine = (
        Engine.from_config(TINY, mesh=make_mesh(2), **vars(CONFIG))
        if devices == 2
        else Engine(TINY, tiny_params(), config=CONFIG)
    )
    one, kept = engine.runner, KeptPrograms(tmp_path, engine.mesh)
    other = of_outline(outline(one.outlined()))
    assert isinstance(other.store, jax.ShapeDtypeStruct)
    paths = [
        kept.path((runners.prefill, (each.params, each.store, each._numbers[1]), {"decoder": each.decoder}))
        for each in (one, other)
    ]
    assert paths[0] == paths[1] is not None


# The processes ----------------------------------------------------------------------------------------------


def test_a_helper_ends_with_the_process_that_started_it():
    process, connection = helpers._started()
    with connection:
        assert process.poll() is None
        process.stdin.close()  # as the system does, however a process ends
        assert process.wait() == 0


def test_a_helper_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jax.py").write_text("raise SystemExit(3)")
    process, connection = helpers._started()
    with connection:
        process.stdin.close()
        assert process.wait() == 0


def test_what_cannot_be_told_is_compiled_here(tmp_path, caplog):
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    engine.loop.requests._tokenizer = lambda text: text  # which no other process can have
    asked = helpers.Helpers(2, engine.loop, None, KeptPrograms(tmp_path, engine.mesh), 3)
    assert asked.claim(tmp_path / "x") is None
    assert "Only 0 processes" in caplog.text
    asked.end()


def test_helpers_have_the_settings_of_the_process_not_of_the_thread_that_missed_a_program(tmp_path, monkeypatch):
    """There, a precision of products may hold for some calls, by which no other process would find the programs."""
    ours, theirs = Pipe()
    idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(helpers, "_started", lambda: (idle, ours))
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    asked = helpers.Helpers(1, engine.loop, None, KeptPrograms(tmp_path, engine.mesh), 3)
    with jax.default_matmul_precision("float32"):
        asked.claim(tmp_path / "x")
    told = theirs.recv()
    theirs.close()
    asked.end(at_once=True)
    assert told == helpers.settings()


@pytest.mark.parametrize(("number", "directory"), [("0", "new"), ("2", "file/new")])
def test_there_are_no_helpers_if_none_are_asked_for_or_none_may_write_programs(
    tmp_path, monkeypatch, number, directory, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(NUMBER, number)
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    assert warmup._helpers(engine.loop, None, KeptPrograms(tmp_path / directory, engine.mesh), 3) is None
    assert ("may not be written to" in caplog.text) == (directory == "file/new")


IN_A_PROCESS = """
import os, signal, sys
from pathlib import Path
from sparsex_jax import Engine, ModelConfig, SamplingParams
from sparsex_jax.device.ahead import Ahead
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.scheduler import helpers, warmup

directory, devices, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
KeptPrograms.of = lambda mesh: KeptPrograms(directory, mesh)
claim, traced, wait, own = helpers.Board.claim, helpers.Board.traced, Ahead.wait, []
killed = []

def claim_later(self, name, owner):
    all_ended = isinstance(owner, helpers.Helpers) and all(each.poll() is not None for each in owner._processes)
    leaves = isinstance(owner, helpers.Helpers) and name not in self._claimed and not all_ended
    return helpers.BUSY if leaves else claim(self, name, owner)

def kill(self, name, results):
    traced(self, name, results)
    if not killed:
        killed.append(self._claimed[name].owner)
        os.kill(killed[0].pid, signal.SIGKILL)

def note(self):
    found = wait(self)
    own.extend(key[0].__name__ for key, each in self._started.items() if not each.found)
    return found

Ahead.wait = note
if what in ("leaves", "kills"):  # all to the others, as a process does that is slow to begin
    helpers.Board.claim = claim_later
if what == "kills":
    helpers.Board.traced = kill
shapes = {"hidden_size": 32, "intermediate_size": 48, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
model = ModelConfig(vocab_size=97, num_layers=2, max_position=64, **shapes)
sizes = {"store_tokens": 256, "page_size": 16, "max_num_seqs": 1, "chunk_rows": 32}
engine = Engine.from_config(model, choose="always", mesh=make_mesh(devices), **sizes)
for step in (*warmup.steps_ahead(engine.loop), *warmup.steps(engine.loop)):
    step()
prompt, more = list(range(1, 40)), SamplingParams(max_new_tokens=8, temperature=0.0)
engine.remember(prompt[10:30])
answers = [engine.generate(each, more).token_ids for each in (prompt, prompt[10:30] + prompt[:10], prompt[::-1])]
print(own, "|", [list(map(int, answer)) for answer in answers])
"""


def compiled(directory: Path, devices: int, what: str, number: int) -> tuple[str, str]:
    """What a process compiled itself, with so many helpers, and its tokens. Without JAX's own cache, whose programs
    cannot be written again on a CPU."""
    on_cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment = os.environ | on_cpus | {"JAX_ENABLE_COMPILATION_CACHE": "false", NUMBER: str(number)}
    command = [sys.executable, "-c", IN_A_PROCESS, str(directory), str(devices), what]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    own, tokens = done.stdout.split(" | ")
    return own, tokens


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_helpers_compile_all_that_is_left_to_them_and_the_tokens_are_the_same(tmp_path, devices):
    alone, tokens = compiled(tmp_path / "alone", devices, "alone", 0)
    assert "'prefill'" in alone
    assert compiled(tmp_path / "helped", devices, "leaves", 2) == ("[]", tokens)
    names = [{path.name for path in (tmp_path / each).glob("*/*")} for each in ("alone", "helped")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_helper_that_is_killed_costs_nothing_but_time(tmp_path):
    _, tokens = compiled(tmp_path / "alone", 1, "alone", 0)
    assert compiled(tmp_path / "helped", 1, "kills", 2)[1] == tokens
