"""Programs that are compiled ahead are there when they are called, and nothing has run before."""

import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY
from jax.sharding import NamedSharding, PartitionSpec

from sparsex_jax.device.ahead import Ahead
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.store import make_store

WHOLE = NamedSharding(make_mesh(), PartitionSpec())


@functools.partial(jax.jit, donate_argnames="store", static_argnames="times")
def step(store, x, *, times):
    """A counter that is typed weakly is among its results."""
    return store + 1, jnp.sin(x) * times, times


def test_a_program_is_compiled_once_and_runs_later():
    store, x = (jax.device_put(np.ones(size, np.float32), WHOLE) for size in (8, 5))
    ahead, before = Ahead(), num_compilations()
    for _ in range(2):
        kept, sines, counter = ahead.run(step, store, WHOLE, store, x, times=2)
        assert kept is store
        assert (sines.tolist(), counter.item(), counter.weak_type) == ([0.0] * 5, 0, True)
    ahead.wait()
    assert num_compilations() == before + 1
    _, sines, counter = step(store, x, times=2)
    assert num_compilations() == before + 1
    assert store.is_deleted(), "now it has run"
    assert (counter.item(), sines[0]) == (2, pytest.approx(2 * np.sin(1)))


def test_what_does_not_compile_is_left_to_who_calls_it():
    class Broken:
        """A program whose compilation fails."""

        out_tree = jax.tree.structure(0)
        jaxpr = SimpleNamespace(out_avals=[jax.typeof(np.ones(3, np.float32))])

        def __call__(self):
            raise AssertionError("it is not to run")

        def trace(self, *_):
            return self

        def lower(self):
            return self

        def compile(self):
            raise RuntimeError("no such instruction")

    ahead = Ahead()
    assert ahead.run(Broken(), jnp.ones(2), WHOLE, 1).tolist() == [0.0] * 3
    ahead.wait()


@pytest.mark.parametrize(("devices", "parts"), [(1, ()), (2, (None, None, None, "tensor"))])
def test_a_store_begins_where_programs_leave_it(devices, parts):
    config = dataclasses.replace(CONFIG, dtype="float32")
    assert make_store(TINY, config, make_mesh(devices)).sharding.spec == PartitionSpec(*parts)


IN_A_PROCESS = """
import jax
from sparsex_jax import Engine, ModelConfig
from sparsex_jax.scheduler import warmup

shapes = {"hidden_size": 32, "intermediate_size": 48, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
model = ModelConfig(vocab_size=97, num_layers=2, max_position=512, **shapes)
engine = Engine.from_config(model, store_tokens=1024, page_size=16, max_num_seqs=1, chunk_rows=32, choose="always")
for step in warmup.steps_ahead(engine.loop):
    step()
assert engine.stats()["free"] == engine.stats()["pages"]
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name=None, **__: traced.append(fun_name) if "trace_duration" in event else None
)
for step in warmup.steps(engine.loop):
    step()
assert not {"prefill", "decode", "score"} & set(traced), traced
"""


@pytest.mark.slow
def test_the_warm_up_finds_its_programs_compiled():
    """Apart from here, where types are checked that JAX's own records of arguments have not."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    subprocess.run([sys.executable, "-c", IN_A_PROCESS], env=environment, check=True)
