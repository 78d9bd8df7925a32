"""Shared fixtures. Eight virtual CPU devices, so that sharded engines are tested on any machine."""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Python compiles a module once, for all workers and all processes that tests start, also where it is told to write no
# bytecode beside the sources: to compile what JAX and the package import takes some ten seconds.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.update(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=sys.pycache_prefix)

import jax
import numpy as np
import pytest
from emitters import choose_emitters
from hypothesis import settings

# The suite compiles far more than it computes, so LLVM does not optimise: programs of kernels compile in two thirds of
# the time that the next level takes, and SmolLM2 runs as fast. Nor are programs divided, since a worker has one core.
# XLA reads this at its first use. Not where JAX has CUDA: it would reach the kernels for GPUs.
if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

jax.config.update("jax_num_cpu_devices", 8)
choose_emitters()

# How long an example takes says nothing on a machine that does other things meanwhile.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Devices are fixed at the first use of jax.
from sparsex_jax import Engine, EngineConfig, ModelConfig  # noqa: E402
from sparsex_jax.device import signals  # noqa: E402
from sparsex_jax.device.runner import Runner  # noqa: E402
from sparsex_jax.eval import lexicon  # noqa: E402
from sparsex_jax.model.sharding import make_mesh  # noqa: E402
from sparsex_jax.model.weights import Params, random_params  # noqa: E402
from sparsex_jax.reuse.prompt import PromptMap  # noqa: E402
from sparsex_jax.reuse.report import Report, make_report  # noqa: E402
from sparsex_jax.reuse.schedule import Phase  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs under pytest's cache, so that no worker or later run compiles a program again."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_max_size", 1 << 28)  # bytes; with a limit, files are locked
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_finish() -> None:
    """What was imported stays, so the collector of cycles passes over it, and looks at the rest less often: tracing
    makes so many objects that it took 8 % of a process that compiles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_measured() -> Iterator[None]:
    """Engines know no speeds, so what was found is reused: reports do not depend on the machine that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.engine.speeds_for", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_calibrated() -> Iterator[None]:
    """Engines have the built-in defaults: what tests expect does not depend on the calibrations that are shipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.config.defaults.shipped_for", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def speed_decides_nothing() -> Iterator[None]:
    """How many tokens a dispatch has does not depend on how fast the machine is. Tests of what is sent ahead say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.scheduler.policy.ROUND_SECONDS", float("inf"))
        patch.setattr("sparsex_jax.scheduler.policy.LONG_SECONDS", float("inf"))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_signal() -> Iterator[None]:
    """A prefill is compiled with the signal of SparseX, and those that its requests ask for: with all, it takes more
    than twice as long. A process has every one in its programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "BUILT_IN", {"key_mass": signals.key_mass})
        yield


@pytest.fixture(scope="module")
def every_signal() -> Iterator[None]:
    """As a process has it: for modules that ask for many of them, whose requests then share a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "BUILT_IN", EVERY_SIGNAL)
        yield


@pytest.fixture(scope="session")
def smollm() -> Engine:
    """SmolLM2-135M-Instruct in float32. All tests share it, so each uses namespaces of its own."""
    return Engine.from_pretrained("smollm2-135m-instruct", dtype="float32", store_tokens=16384)


EVERY_SIGNAL = signals.BUILT_IN

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=1024,
)

# With the vocabulary of SmolLM2, whose tokenizer it can use.
TALKING = ModelConfig(
    vocab_size=49152,
    hidden_size=32,
    intermediate_size=64,
    num_layers=6,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position=2048,
    tied_embeddings=True,
)


# The shapes of the fixture `tiny`. A prefill program takes seconds to compile, so tests that are not about shapes use
# this model and these shapes.
CONFIG = EngineConfig(store_tokens=2048, page_size=16, max_num_seqs=4, chunk_rows=32)


@functools.cache
def tiny_params() -> Params:
    """Random weights of `TINY` on one device. Engines share them, since none changes them."""
    return random_params(TINY, "float32", make_mesh())


class SameShapes(Runner):
    """Runs an engine on the store and the shapes of another one's configuration, and so on its compiled programs.

    The host sees the engine's own configuration: how many pages there are, and how many sequences share a plan.
    """

    device = CONFIG

    def __init__(self, model, engine, params, mesh):
        self._shaped = dataclasses.replace(self.device, dtype=engine.dtype)
        super().__init__(model, self._shaped, params, mesh)
        self.engine = engine

    def start_decode(self, *args):
        with self._as_shaped():
            return super().start_decode(*args)

    def recover(self):
        with self._as_shaped():
            return super().recover()

    @contextlib.contextmanager
    def _as_shaped(self):
        asked, self.engine = self.engine, self._shaped
        try:
            yield
        finally:
            self.engine = asked


def same_shapes(model: ModelConfig, params: Params, device: EngineConfig, tokenizer=None, **changes) -> Engine:
    """An engine with changes to a configuration that only the host can tell, such as few pages."""
    config = dataclasses.replace(device, **changes)
    assert (config.page_size, config.chunk_rows, config.dtype) == (device.page_size, device.chunk_rows, device.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.engine.Runner", type("Shaped", (SameShapes,), {"device": device}))
        return Engine(model, params, tokenizer, config=config)


def tiny_engine(params: Params | None = None, **changes) -> Engine:
    """An engine of `TINY` on the programs of the fixture `tiny`."""
    return same_shapes(TINY, tiny_params() if params is None else params, CONFIG, **changes)


def sharded_tiny(devices: int) -> Engine:
    """An engine of `TINY` on a mesh of this many devices."""
    return Engine.from_config(TINY, mesh=make_mesh(devices), **vars(CONFIG))


@functools.cache
def closed_model() -> ModelConfig:
    """`TINY` over the closed vocabulary of the generated tasks, in three row buckets."""
    return dataclasses.replace(TINY, vocab_size=len(lexicon.vocabulary()), max_position=2048)


def closed_engine(number: int) -> Engine:
    """Random weights over the closed vocabulary, and its tokenizer, for `number` sequences at once."""
    device = EngineConfig(store_tokens=2048, page_size=16, chunk_rows=128, max_num_seqs=2, max_prefill_seqs=2)
    params = random_params(closed_model(), "float32", make_mesh())
    engine = same_shapes(closed_model(), params, device, max_num_seqs=number, max_prefill_seqs=number)
    engine.tokenizer = lexicon.ruler_tokenizer()
    return engine


@pytest.fixture
def tiny() -> Engine:
    """A small random model with pages of 16 tokens and an empty store."""
    return Engine(TINY, tiny_params(), config=CONFIG)


def run(loop, rounds=3000):
    """Step a loop until nothing is running or waiting."""
    for _ in range(rounds):
        if not loop.step():
            return
    raise AssertionError(f"not done after {rounds} rounds: {loop.stats}")


def idle(engine):
    """No sequence holds a page, and the cache's books are right."""
    engine.cache.check(held=[])
    return engine.stats()["active"] == 0


def report_of(kind, active, **figures) -> Report:
    """The report of a prompt by the kind of each token, and whether it is active, with these figures."""
    prompt = PromptMap(np.zeros(len(kind), np.int32), np.array(kind, np.uint8))
    report = make_report(prompt, [Phase(0, prompt.computed)], 1, 0.1, np.array([active]))
    return dataclasses.replace(report, **figures)


def found_in_segments(report: Report) -> int:
    """Tokens that were found in segments, whether they were recomputed or not."""
    return report.reused_tokens + report.recomputed_tokens


@contextlib.contextmanager
def losing_the_store(engine: Engine) -> Iterator[None]:
    """What is done here must prefill, which fails and takes the store with it."""

    def broken(*args, **kwargs):
        engine.runner.store.delete()
        raise RuntimeError("device lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.device.runner.prefill", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            yield
