"""Adapters that share KV: who shares nothing has the answers of merged weights, and who shares finds what all wrote."""

import numpy as np
import pytest
from adapting import DEVICE, dense_of, greedy, make_adapter
from conftest import TINY, idle, same_shapes, tiny_params

from sparsex_jax import ReuseConfig, SamplingParams

SHARED = dict(vars(DEVICE), share_adapters=True)
TARGETS = ("wq", "wv", "wo", "w_gate", "w_up", "w_down")
ONE, TWO = make_adapter(1, targets=TARGETS), make_adapter(2, rank=8, targets=("wq", "wv"))
TEXT = np.random.default_rng(7).integers(1, 89, 200).astype(np.int32)
PREFIX = ReuseConfig("prefix")
FEW = SamplingParams(max_new_tokens=4, ignore_eos=True)


def sharing_engine(**changes):
    """An engine whose adapters share KV, on the programs of all such engines."""
    device = type(DEVICE)(**SHARED)
    engine = same_shapes(TINY, tiny_params(), device, **changes)
    for name, weights in (("one", ONE), ("two", TWO)):
        engine.load_adapter(name, weights)
    return engine


@pytest.fixture
def engine():
    return sharing_engine()


def test_who_shares_nothing_has_the_answers_of_merged_weights(engine):
    prompts, names = [TEXT[:12], TEXT[:12], TEXT[:12], TEXT[20:37]], ["one", "two", None, "one"]
    outs = engine.generate_batch(prompts, FEW, adapter=names, return_logits=True, reuse=PREFIX)
    of_name = {"one": dense_of(ONE), "two": dense_of(TWO), None: dense_of(None)}
    for prompt, name, out in zip(prompts, names, outs, strict=True):
        logits, tokens = greedy(of_name[name], prompt, 4)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert list(out.token_ids) == tokens
    again = engine.prefill(TEXT[:12], adapter="one", reuse=PREFIX)
    assert again.report.prefix_tokens == 11
    np.testing.assert_allclose(again.logits, outs[0].logits, atol=1e-4)
    assert idle(engine)
