"""Programs that one process left on disk are found by the next, are the same, and are never taken for others."""

import contextlib
import errno
import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from sparsex_jax.device import runner
from sparsex_jax.device.ahead import Ahead, Claims, Results
from sparsex_jax.device.kept_programs import ArrayType, KeptPrograms
from sparsex_jax.device.signals import key_mass, probe_mass
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh

MESH = make_mesh()
WHOLE = NamedSharding(MESH, PartitionSpec())


def placed(*values):
    return jax.device_put(np.array(values, np.float32), WHOLE)


@jax.jit
def step(x):
    return jnp.sin(x)


@pytest.fixture(autouse=True)
def without_the_cache_of_jax():
    """What JAX loads from it cannot be written again on a CPU."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def program(monkeypatch):
    """A program of the package, as far as names go: it is a new one for each test, which nothing has compiled."""
    double = functools.partial(jax.jit, static_argnames="ops", donate_argnames="x")(lambda x, *, ops: (2 * x, 7))
    double.__module__ = runner.__name__
    monkeypatch.setattr(runner, "double", double, raising=False)
    return double


@contextlib.contextmanager
def traces():
    """The names of what is traced within."""
    traced = []

    def note(event, _, fun_name=None, **__):
        if "trace_duration" in event:
            traced.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield traced
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def two_processes(tmp_path, program, between=lambda files: None):
    """What `wait` gives a second process, which finds what a first one left."""
    for second in (False, True):
        ahead, x = Ahead(KeptPrograms(tmp_path, MESH)), placed(1, 2, 3)
        with traces() as traced:
            zeros, number = ahead.run(program, x, WHOLE, x, ops=Ops.on(MESH))
        assert zeros is x, "what is donated stands for the result"
        assert (number.item(), number.weak_type) == (0, True)
        found = ahead.wait()
        if not second:
            assert traced
            assert not found
            between([path for path in tmp_path.rglob("*") if path.is_file()])
    return found, traced


def test_a_program_is_found_and_is_not_traced(tmp_path, program):
    found, traced = two_processes(tmp_path, program)
    assert not traced
    (compiled,) = found.values()
    x = placed(1, 2, 3)
    doubled, number = compiled(x)
    assert (doubled.tolist(), number.item(), x.is_deleted()) == ([2, 4, 6], 7, True)


def test_a_found_program_runs_where_it_is_called_now(tmp_path, program):
    two_processes(tmp_path, program)
    ahead = Ahead(KeptPrograms(tmp_path, MESH))
    with traces() as traced:
        doubled, _ = ahead.call(program, (), WHOLE, placed(1, 5), ops=Ops.on(MESH))
        again, _ = ahead.call(program, (), WHOLE, placed(1, 2, 5), ops=Ops.on(MESH))
    assert (doubled.tolist(), again.tolist()) == ([2, 10], [2, 4, 10])
    assert len(traced) == 1, "the one of two numbers, which is new"


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_a_damaged_file_is_removed_and_its_program_compiled(tmp_path, program, content, caplog):
    def damage(files):
        (file,) = files
        file.write_bytes(file.read_bytes()[:-20] if content is None else content)

    found, _ = two_processes(tmp_path, program, damage)
    assert not found
    assert "is of no use" in caplog.text
    ahead, x = Ahead(KeptPrograms(tmp_path, MESH)), placed(1, 2, 3)
    ahead.run(program, x, WHOLE, x, ops=Ops.on(MESH))
    assert len(ahead.wait()) == 1, "it was kept again"


def refused(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_program_in_a_directory_that_is_read_only_is_found(tmp_path, program, monkeypatch):
    def close(_):
        for name in ("utime", "open", "unlink"):
            monkeypatch.setattr(os, name, refused)

    found, traced = two_processes(tmp_path, program, close)
    assert not traced
    assert len(found) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_programs_of_another_user_are_not_there(tmp_path, program):
    found, traced = two_processes(tmp_path, program, lambda files: files[0].parent.chmod(0))
    assert traced
    assert not found
    next(tmp_path.iterdir()).chmod(0o700)


def test_a_program_that_cannot_be_written_leaves_no_file(tmp_path, program, monkeypatch):
    monkeypatch.setattr(os, "replace", refused)  # the last step
    found, _ = two_processes(tmp_path, program)
    assert not found
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_whether_programs_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    assert KeptPrograms(tmp_path, MESH).may_keep
    assert KeptPrograms(tmp_path / "new" / "newer", MESH).may_keep
    assert not KeptPrograms(tmp_path / "file", MESH).may_keep
    assert not KeptPrograms(tmp_path / "file" / "new", MESH).may_keep
    assert not any(path.is_dir() for path in tmp_path.iterdir()), "asking makes nothing"


class Elsewhere(Claims):
    """Another process has traced a program, and does this until it has ended."""

    def __init__(self, leave):
        self.leave = leave

    def claim(self, path):
        types = [ArrayType((3,), np.dtype("float32"), False), ArrayType((), np.dtype("int32"), True)]
        return Results(jax.tree.structure((0, 0)), types)

    def wait(self, path):
        self.leave()


def test_what_another_process_compiles_is_not_traced_and_found_once_it_is_there(tmp_path, program):
    kept, x, ops = KeptPrograms(tmp_path, MESH), placed(1, 2, 3), Ops.on(MESH)
    may_end = threading.Event()

    def leave():
        may_end.wait()
        other = Ahead(kept)
        other.run(program, x, WHOLE, x, ops=ops)
        other.wait()

    ahead = Ahead(kept, Elsewhere(leave))
    try:
        with traces() as traced:
            zeros, number = ahead.run(program, x, WHOLE, x, ops=ops)
    finally:
        may_end.set()
    assert (zeros is x, number.item(), number.weak_type, traced) == (True, 0, True, [])
    (compiled,) = ahead.wait().values()
    assert compiled(x)[0].tolist() == [2, 4, 6]


def test_what_another_process_did_not_leave_is_compiled_when_it_is_called(tmp_path, program, caplog):
    ahead = Ahead(KeptPrograms(tmp_path, MESH), Elsewhere(lambda: None))
    assert ahead.call(program, (), WHOLE, placed(1, 2, 3), ops=Ops.on(MESH))[0].tolist() == [2, 4, 6]
    assert ahead.wait() == {}
    assert "was not left" in caplog.text


def test_with_a_program_that_was_found_all_others_are_given(tmp_path, program):
    """JAX would not know them by the results of that one."""
    two_processes(tmp_path, program)
    ahead, arrays = Ahead(KeptPrograms(tmp_path, MESH)), (placed(1, 2, 3), placed(1, 2))
    for x in arrays:
        ahead.run(program, x, WHOLE, x, ops=Ops.on(MESH))
    doubled = [compiled(x)[0].tolist() for x, compiled in zip(arrays, ahead.wait().values(), strict=True)]
    assert doubled == [[2, 4, 6], [2, 4]]


def test_programs_that_differ_lie_apart(tmp_path):
    kept, x, ops = KeptPrograms(tmp_path, MESH), placed(1, 2), Ops.on(MESH)
    other_mesh = NamedSharding(make_mesh(2), PartitionSpec())
    plain, unpacked = runner._are_finite, runner._unpacked
    calls = [
        (plain, (x,), {}),
        (unpacked, (x,), {}),
        (plain, (placed(1, 2, 3),), {}),
        (plain, (x.astype(jnp.int32),), {}),
        (plain, (jnp.asarray(1.0),), {}),
        (plain, (jax.device_put(np.float32(1), WHOLE),), {}),
        (plain, (jax.device_put(x, other_mesh),), {}),
        (plain, ((x, x),), {}),
        (plain, (x,), {"ops": ops}),
        (plain, (x,), {"ops": Ops.on(make_mesh(2))}),
        (plain, (x,), {"ops": Ops(ops.mesh, ops.backend, sums_later=True)}),
        (plain, (x,), {"signals": (key_mass,)}),
        (plain, (x,), {"signals": (probe_mass,)}),
    ]
    paths = [kept.path(call) for call in calls]
    with jax.default_matmul_precision("float32"):
        paths.append(kept.path(calls[0]))
    assert None not in paths
    assert len(set(paths)) == len(paths)
    assert kept.path((plain, (placed(4, 5),), {})) == paths[0], "values make no difference"
    assert KeptPrograms(tmp_path, make_mesh(2)).path(calls[0]).parent != paths[0].parent


def test_what_only_this_process_knows_is_not_kept(tmp_path):
    kept, x = KeptPrograms(tmp_path, MESH), placed(1, 2)
    assert kept.path((step, (x,), {})) is None, "a program of no module of the package"
    assert kept.path((runner._are_finite, (x,), {"signals": (lambda boundary, store: (store, x),)})) is None
    assert kept.path((runner._are_finite, (x,), {"options": object()})) is None
    ahead = Ahead(kept)
    ahead.run(step, (), WHOLE, x)
    assert ahead.wait() == {}
    assert list(tmp_path.rglob("*")) == []


def test_old_kinds_of_processes_make_room(tmp_path, program):
    for age in range(6):
        (tmp_path / f"kind {age}").mkdir()
        (tmp_path / f"kind {age}" / "program").write_bytes(b"")
        os.utime(tmp_path / f"kind {age}", (1000 - age, 1000 - age))
    two_processes(tmp_path, program)
    assert sorted(path.name for path in tmp_path.glob("kind*")) == ["kind 0", "kind 1", "kind 2"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_kind_that_is_used_is_no_old_one(tmp_path, program):
    def age(files):
        os.utime(files[0].parent, (0, 0))

    two_processes(tmp_path, program, age)
    (kind,) = tmp_path.iterdir()
    assert kind.stat().st_mtime > 0


def test_where_programs_are_kept():
    assert KeptPrograms.of(MESH) is None, "on a CPU"


IN_A_PROCESS = """
import sys
from pathlib import Path
import jax
from sparsex_jax import Engine, ModelConfig, SamplingParams
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.scheduler import warmup

directory, tp, steers = Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
KeptPrograms.of = lambda mesh: KeptPrograms(directory, mesh)
if steers:
    Ops.host_steers = property(lambda ops: True)
shapes = {"hidden_size": 32, "intermediate_size": 48, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
model = ModelConfig(vocab_size=97, num_layers=2, max_position=512, **shapes)
sizes = {"store_tokens": 1024, "page_size": 16, "max_num_seqs": 2, "chunk_rows": 32}
engine = Engine.from_config(model, choose="always", mesh=make_mesh(tp), **sizes)
traced = set()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name=None, **__: traced.add(fun_name) if "trace_duration" in event else None
)
for step in (*warmup.steps_ahead(engine.loop), *warmup.steps(engine.loop)):
    step()
prompt, more = list(range(1, 60)), SamplingParams(max_new_tokens=8, temperature=0.0)
engine.remember(prompt[10:40])
answers = [engine.generate(each, more).token_ids for each in (prompt, prompt[10:40] + prompt[:10], prompt[::-1])]
heavy = {"prefill", "cross", "last_layers", "_decode", "score", "align", "begin", "_unpacked", "_are_finite"} & traced
print(sorted(heavy), [list(map(int, answer)) for answer in answers])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "steers"), [(1, 0), (1, 1), (2, 0)])
def test_the_next_process_traces_no_layer_and_gives_the_same_tokens(tmp_path, devices, steers):
    """Without JAX's own cache, whose programs cannot be written again on a CPU."""
    on_cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment = os.environ | on_cpus | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), str(devices), str(steers)]
    outputs = [
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout for _ in "12"
    ]
    (first, tokens), (second, again) = (output.split("] ", 1) for output in outputs)
    assert "'prefill'" in first
    assert second == "["
    assert again == tokens
