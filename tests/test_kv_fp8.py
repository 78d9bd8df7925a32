"""A store in float8: prompts that find KV, whole or in pieces, get the answers of full recompute in float8."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, found_in_segments, idle, tiny_params

from sparsex_jax import Engine, EngineConfig, ReuseConfig, SamplingParams
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.model.sharding import make_mesh
from sparsex_kernels.layout import FLOAT8

FP8 = dataclasses.replace(CONFIG, kv_dtype="fp8")


@pytest.fixture(scope="module")
def engine():
    return Engine(TINY, tiny_params(), config=FP8)


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).astype(np.int32)


def ask(engine, prompt, method="full", namespace="default", number=6, **options):
    """The logits behind the prompt, the tokens of the answer, and the report."""
    reuse, sampling = ReuseConfig(method, **options), SamplingParams(number, ignore_eos=True)
    (out,) = engine.generate_batch([prompt], sampling, reuse=reuse, namespace=namespace, return_logits=True)
    return np.asarray(out.logits), out.token_ids, out.report


def same_answer(got, expected):
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    assert got[1] == expected[1]
    return got[2]


@pytest.mark.slow
def test_a_prefix_is_exact(engine):
    """Also behind decoded tokens: prefill and decode attend to rounded KV alike."""
    prompt = tokens(0, 150)
    first = ask(engine, prompt, namespace="prefix", number=20)
    assert engine.runner.store.dtype == FLOAT8
    same_answer(ask(engine, prompt, "full", "elsewhere", number=20), first)
    longer = np.concatenate([prompt, first[1], tokens(1, 30)]).astype(np.int32)
    report = same_answer(ask(engine, longer, "prefix", "prefix"), ask(engine, longer, "full", "third"))
    assert report.prefix_tokens >= 160
    assert idle(engine)


@pytest.mark.slow
def test_recomputing_everything_is_full_recompute(engine):
    """Each token of the segment, from the second layer or the third on; or all layers before the boundary."""
    text = tokens(2, 120)
    prompt = np.concatenate([tokens(3, 37), text, tokens(4, 20)])
    full = ask(engine, prompt, "full", "alone")
    for options in ({"recompute_ratio": 1.0, "boundary_layer": 2}, {"boundary_layer": TINY.num_layers}):
        engine.remember(text, namespace=str(options))
        report = same_answer(ask(engine, prompt, "sparsex", str(options), **options), full)
        assert found_in_segments(report) >= 100 or "recompute_ratio" not in options


@pytest.mark.slow
def test_moved_keys_are_those_of_the_new_position_rounded_twice(engine):
    """Layer 0's, where a key depends on its token and position alone; values are moved as they are."""
    text = tokens(5, 100)
    engine.remember(text, namespace="moved")
    prompt = np.concatenate([tokens(6, 41), text, tokens(7, 9)])
    moved, true = (
        stored(engine, prompt, method, namespace) for method, namespace in (("naive", "moved"), ("full", "x"))
    )
    keys, values = (np.s_[0, kind, 41:141] for kind in (0, 1))
    np.testing.assert_array_equal(moved[values], true[values])
    assert 0 < np.linalg.norm(moved[keys] - true[keys]) / np.linalg.norm(true[keys]) < 0.06


def stored(engine, prompt, method, namespace):
    """K and V `[layers, 2, tokens, kv_heads, head_dim]` once a method has prefilled the prompt."""
    with engine.prefilled(prompt, reuse=ReuseConfig(method), namespace=namespace) as sequence:
        page, offset = np.divmod(np.arange(len(prompt)), engine.config.page_size)
        kv = engine.runner.store[:, jnp.asarray(np.asarray(sequence.pages)[page]), :, :, jnp.asarray(offset)]
        return np.moveaxis(np.asarray(kv, np.float32), 0, 2)


@pytest.mark.slow
def test_a_sharded_store_gives_the_answers_of_one_device(engine):
    sharded = Engine.from_config(TINY, mesh=make_mesh(2), **vars(FP8))
    text, prompts = tokens(8, 100), []
    for each in (engine, sharded):
        each.remember(text, namespace="sharded")
        prompt = np.concatenate([tokens(9, 30), text, tokens(10, 10)])
        prompts.append([ask(each, prompt, method, "sharded") for method in ("sparsex", "full")])
    for one, other in zip(*prompts, strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=0.05)  # a sum in another order may round a number to the next


@pytest.mark.slow
def test_the_tiers_bring_back_what_was_stored(tmp_path):
    """From host memory, and from the disk after a restart. An engine of another dtype finds nothing."""
    config = dataclasses.replace(
        FP8, store_tokens=512, host_store_bytes=1 << 22, disk_store=str(tmp_path), disk_store_bytes=1 << 22
    )
    prompt = tokens(11, 200)
    with contextlib.closing(Engine(TINY, tiny_params(), config=config)) as engine:
        first = ask(engine, prompt)
        for seed in range(12, 18):
            ask(engine, tokens(seed, 300))  # evicts it
        assert same_answer(ask(engine, prompt, "prefix"), first).prefix_tokens > 100
    with contextlib.closing(Engine(TINY, tiny_params(), config=config)) as engine:
        assert same_answer(ask(engine, prompt, "prefix"), first).prefix_tokens > 100
    wide = dataclasses.replace(config, kv_dtype="auto")
    with contextlib.closing(Engine(TINY, tiny_params(), config=wide)) as engine:
        assert ask(engine, prompt, "prefix")[2].prefix_tokens == 0


@pytest.mark.parametrize("value", ["fp4", "FP8", None, 8])
def test_other_dtypes_are_refused(value):
    with pytest.raises(InvalidRequestError, match=r"kv_dtype=.* must be one of auto, fp8"):
        EngineConfig(kv_dtype=value)


def test_by_default_a_store_has_the_same_bytes():
    assert EngineConfig().store_tokens == 16384
    assert EngineConfig(kv_dtype="fp8").store_tokens == 32768
    assert EngineConfig(kv_dtype="fp8", store_tokens=100).store_tokens == 100


def test_keys_beyond_the_range_are_refused():
    params = tiny_params()
    bias = jnp.zeros((TINY.num_layers, TINY.num_kv_heads, TINY.head_dim))
    bias = bias.at[1, 0, jnp.array([2, 6])].set(jnp.array([300.0, 400.0]))  # a pair, which a rotation makes 500 and 0
    large = params.replace(layers=params.layers.replace(bk=bias))
    with pytest.raises(InvalidRequestError, match=r"kv_dtype='fp8' holds numbers up to 448; .* to 500"):
        Engine(TINY, large, config=FP8)
