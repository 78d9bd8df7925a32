"""The cost model of a prefill, and admission that uses it."""

import dataclasses

import numpy as np
import pytest

from sparsex_jax import Engine, ReuseConfig
from sparsex_jax.config import named_config
from sparsex_jax.reuse.cost import SPEEDS, Speeds, prefill_seconds

H100 = SPEEDS["NVIDIA H100 80GB HBM3"]
LLAMA = named_config("llama-3.1-8b")
DOCUMENT, NEW = np.split(np.random.default_rng(0).integers(1, 97, 340).astype(np.int32), [300])
PROMPT = np.concatenate([NEW, DOCUMENT, NEW])


@pytest.fixture
def engine(tiny) -> Engine:
    tiny.remember(DOCUMENT, namespace="n")
    return tiny


def seconds(engine: Engine, speeds: Speeds = H100, **options) -> float:
    with engine.prefilled(PROMPT, reuse=ReuseConfig(**options), namespace="n") as sequence:
        return prefill_seconds(LLAMA, sequence.plan, speeds)


def test_less_work_is_predicted_to_take_less_time(engine):
    fine = dataclasses.replace(H100, tile=1)
    full, late, early, none = (
        seconds(engine, fine, **options)
        for options in (
            {"method": "full"},
            {"boundary_layer": 3},
            {"boundary_layer": 1},
            {"method": "naive"},
        )
    )
    assert full > late > early > none > fine.start


def test_a_full_prefill_takes_the_sum_of_its_operations(engine):
    """Computed by hand: 380 tokens of an 8B model, only matrix products and the reading of their weights."""
    speeds = Speeds(linear=1e12, attention=1e30, bandwidth=1e30, layer=0.0, start=0.0, tile=1)
    per_token = 2 * 32 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 14336)
    assert seconds(engine, speeds, method="full") == pytest.approx(380 * per_token / 1e12)
    wide = dataclasses.replace(speeds, tile=256)
    assert seconds(engine, wide, method="full") == pytest.approx(512 * per_token / 1e12)


def test_each_layer_a_probe_runs_is_counted(engine):
    probe, plain = (seconds(engine, method=name) for name in ("prophetkv", "sparsex"))
    assert probe > seconds(engine, method="sparsex", boundary_layer=0) > 0
    assert plain > 0


@pytest.mark.parametrize(("tile", "reused"), [(1, 300), (4096, 0)], ids=["pays", "does not pay"])
def test_segments_that_do_not_save_time_are_recomputed(engine, tile, reused):
    engine.admission.speeds = Speeds(linear=1e12, attention=1e30, bandwidth=1e30, layer=0.0, start=0.0, tile=tile)
    asked = ReuseConfig("naive", only_if_faster=True)
    out = engine.prefill(PROMPT, reuse=asked, namespace="n", keep=False)
    assert out.report.reused_tokens == reused
    expected = engine.prefill(
        PROMPT,
        reuse=asked.updated(method="naive" if reused else "full", only_if_faster=False),
        namespace="n",
        keep=False,
    )
    np.testing.assert_allclose(out.logits, expected.logits, atol=2e-5)
    engine.cache.check(held=[])


def test_without_known_speeds_every_segment_found_is_reused(engine):
    assert engine.admission.speeds is None  # a CPU
    report = engine.prefill(PROMPT, reuse=ReuseConfig("naive", only_if_faster=True), namespace="n", keep=False).report
    assert report.reused_tokens == 300
