"""A store in float8: engines that prefill, find and move what was rounded give the answers of full recompute in float8."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, tiny_params

from sparsex_jax import Engine, EngineConfig, ReuseConfig, SamplingParams
from sparsex_jax.errors import InvalidRequestError

FP8 = dataclasses.replace(CONFIG, kv_dtype="fp8")


@pytest.fixture(scope="module")
def engine():
    return Engine(TINY, tiny_params(), config=FP8)


def logits(engine, tokens, method="full", namespace="default", **options):
    reuse = ReuseConfig(method, **options)
    (out,) = engine.generate_batch([tokens], SamplingParams(1), reuse=reuse, namespace=namespace, return_logits=True)
    return np.asarray(out.logits)


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).astype(np.int32)


def test_x(engine):
    prompt = tokens(0, 150)
    full = logits(engine, prompt, namespace="a")
    a = logits(engine, prompt, "prefix", namespace="a")
    print(np.abs(full).max(), np.abs(a - full).max())
    engine.remember(prompt[20:120], namespace="b")
    b = logits(engine, prompt, "sparsex", namespace="b", recompute_ratio=1.0)
    print(np.abs(b - full).max())
    c = logits(engine, prompt, "naive", namespace="b")
    print(np.abs(c - full).max())
    exact = Engine(TINY, tiny_params(), config=CONFIG)
    d = logits(exact, prompt)
    print(np.abs(d - full).max())
    assert 0
