"""The model against transformers (golden files of `scripts/make_golden.py`) and against the dense reference."""

from pathlib import Path

import numpy as np
import pytest
from dense import Dense, engine_logits

from sparsex_jax import Engine, ReuseConfig, SamplingParams

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen3", "qwen3_moe"]
EXPERTS = ["mixtral", "olmoe", "qwen3_moe"]
FULL = ReuseConfig(method="full")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        *((name, (1, 17, 33, 48)) for name in NAMES if name not in EXPERTS),
        *((name, (48,)) for name in EXPERTS),
        *(pytest.param(name, (1, 17, 33), marks=pytest.mark.slow) for name in EXPERTS),
    ],
)
def test_logits_are_those_of_transformers(name, lengths):
    expected = np.load(GOLDEN / name / "expected.npz")
    engine = Engine.from_pretrained(GOLDEN / name, dtype="float32", store_tokens=256, page_size=16)
    for length in lengths:
        logits = engine_logits(engine, expected["tokens"][:length], reuse=FULL)
        np.testing.assert_allclose(logits, expected["logits"][length - 1], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_dense_reference_are_those_of_transformers(name):
    expected = np.load(GOLDEN / name / "expected.npz")
    engine = Engine.from_pretrained(GOLDEN / name, dtype="float32", store_tokens=256, page_size=16)
    logits, _ = Dense(engine.model, engine.runner.params).full(expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_smollm_knows_the_capital_of_france(smollm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    out = smollm.generate(messages, SamplingParams(max_new_tokens=32, temperature=0.0), reuse=FULL, namespace="france")
    assert out.text == "The capital of France is Paris."
    assert out.finish_reason == "stop"
    assert smollm.tokenizer.decode(out.token_ids) == "The capital of France is Paris.<|im_end|>"


def test_smollm_matches_the_dense_reference(smollm):
    tokens = np.asarray(smollm.tokenizer("In 1492, Columbus sailed the ocean blue. " * 12)["input_ids"])
    dense = Dense(smollm.model, smollm.runner.params)
    logits, _ = dense.full(tokens)
    np.testing.assert_allclose(engine_logits(smollm, tokens, reuse=FULL, namespace="dense"), logits[-1], atol=1e-3)
