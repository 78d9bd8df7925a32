"""Programs that are compiled ahead are there when they are called, and nothing has run before."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, tiny_params
from jax.sharding import NamedSharding, PartitionSpec

from sparsex_jax import Engine
from sparsex_jax.device.ahead import Ahead
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.store import make_store
from sparsex_jax.scheduler import warmup

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

        out_info = 0
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
    assert make_store(TINY, CONFIG, make_mesh(devices)).sharding.spec == PartitionSpec(*parts)


@pytest.mark.slow
def test_the_warm_up_finds_its_programs_compiled(monkeypatch):
    traced = []
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    for one in warmup.steps_ahead(engine.loop):
        one()
    assert engine.stats()["free"] == engine.stats()["pages"]
    count = lambda event, _, fun_name=None, **__: traced.append(fun_name) if "trace_duration" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    for one in warmup.steps(engine.loop):
        one()
    assert not {"prefill", "decode"} & set(traced)
