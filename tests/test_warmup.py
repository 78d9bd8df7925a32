"""After the warm-up a crowd of requests compiles nothing: every program was there before the first of them came."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY

from sparsex_jax import Engine, NonFiniteLogitsError, ReuseConfig, SamplingParams
from sparsex_jax.device.compilation import keep_on_disk, num_compilations
from sparsex_jax.device.state import batch_slots
from sparsex_jax.scheduler import warmup

TEXT = np.random.default_rng(5).integers(1, 90, 4000).astype(np.int32)
MODEL = dataclasses.replace(TINY, eos_token_ids=(94, 95, 96))
# Other shapes than those of all other tests and of each other, so that nothing is compiled for them yet.
MODELS = (dataclasses.replace(MODEL, vocab_size=size) for size in range(98, 200))


def make_engine(reuse=None, max_num_seqs=2, model=MODEL):
    """With two row buckets only, since each has programs of its own."""
    engine = Engine.from_config(model, store_tokens=2048, page_size=16, max_num_seqs=max_num_seqs, chunk_rows=256)
    engine.reuse = reuse or engine.reuse
    return engine


def crowd(engine, number, rng):
    """Requests of all sizes, a few at a time, that share pieces; documents are remembered and forgotten meanwhile."""
    loop, events = engine.loop, []
    for at in range(number):
        pieces = [TEXT[start : start + rng.integers(1, 200)] for start in 150 * rng.integers(0, 9, rng.integers(1, 5))]
        sampling = SamplingParams(
            int(rng.integers(1, 40)),
            temperature=float(rng.random()),
            top_k=int(rng.integers(9)),
            ignore_eos=bool(at % 2),
            logprobs=3 if at % 5 == 1 else None,
            prompt_logprobs=(None, None, 0, 4)[at % 4],
            presence_penalty=float(at % 4 == 2),
        )
        method = ("full", "prefix", "naive", engine.reuse.method)[rng.integers(4)]
        reuse = engine.reuse if method == engine.reuse.method else ReuseConfig(method)
        loop.submit(np.concatenate(pieces), sampling, reuse=reuse, keep=at % 3 > 0, listener=events.append)
        for _ in range(rng.integers(4)):
            loop.step()
        if at % 8 == 0:
            document = TEXT[(start := 90 * at) : start + rng.integers(16, 300)]
            engine.forget(engine.remember(document, preamble=TEXT[:20] if at % 16 else None))
    while loop.step():
        pass
    assert (loop.stats.failed, loop.stats.cancelled) == (0, 0)
    assert sum(event.finish_reason in ("stop", "length") for event in events) == number
    return [event.report for event in events if event.report is not None]


@pytest.mark.parametrize(
    "reuse",
    [
        pytest.param(ReuseConfig(), marks=pytest.mark.slow),
        pytest.param(ReuseConfig("excerpt", piece_tokens=32), marks=pytest.mark.slow),
        *(
            pytest.param(ReuseConfig(**fields), marks=pytest.mark.slow)
            for fields in ({"second_boundary": 3}, {"method": "cacheblend"}, {"method": "prophetkv"})
        ),
    ],
    ids=["sparsex", "excerpt", "sparsex-3", "cacheblend", "prophetkv"],
)
def test_a_crowd_compiles_nothing_after_the_warm_up(reuse):
    engine = make_engine(reuse, model=next(MODELS))
    cold = num_compilations()
    for step in warmup.steps(engine.loop):
        step()
    warm = num_compilations()
    assert warm > cold
    assert engine.stats()["free"] == engine.stats()["pages"]
    reports = crowd(engine, 32, np.random.default_rng(0))
    assert num_compilations() == warm
    assert any(0 < report.computed_fraction < 1 for report in reports)


@pytest.mark.parametrize("steers", [False, True])
@pytest.mark.parametrize(("most", "numbers"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_every_size_of_a_batch_is_decoded_once(most, numbers, steers, monkeypatch):
    decoded = []
    monkeypatch.setattr(warmup, "_decode", lambda _, number, structure: decoded.append(number))
    monkeypatch.setattr(warmup, "_prefill", lambda *_: None)
    monkeypatch.setattr(warmup, "_probe", lambda *_: None)
    monkeypatch.setattr(warmup, "_generate", lambda *_: None)
    loop = make_engine(max_num_seqs=most).loop
    loop.runner.host_steers = steers
    for step in warmup.steps(loop):
        step()
    # Plain, ranked where the host decides that, and with every wish but a structure, which its tokens cannot have.
    assert decoded == (3 if steers else 2) * numbers


@pytest.mark.parametrize(("multiple", "numbers"), [(1, [1, 2, 4, 8, 12]), (8, [1, 8, 12]), (32, [1, 12])])
def test_few_sizes_of_batches_where_rows_are_padded_anyway(multiple, numbers):
    assert warmup._batches(12, multiple) == numbers
    sizes = {batch_slots(number, multiple) for number in range(1, 13)}
    assert sizes == {batch_slots(number, multiple) for number in numbers}


@pytest.mark.slow
def test_a_model_that_fails_says_so_before_it_is_served():
    engine = make_engine()
    params = engine.runner.params
    engine.runner.params = dataclasses.replace(params, final_norm=params.final_norm * np.nan)
    for step in warmup.steps(engine.loop)[-2:]:  # whole requests
        with pytest.raises(NonFiniteLogitsError):
            step()


# What is kept on disk ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """JAX without a directory of its own yet, and a user's cache directory."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(disk):
    keep_on_disk()
    assert jax.config.jax_compilation_cache_dir.startswith(str(disk / "sparsex-jax"))
    assert jax.config.jax_compilation_cache_max_size > 0


def test_a_directory_that_jax_was_given_stays(disk):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    keep_on_disk()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
