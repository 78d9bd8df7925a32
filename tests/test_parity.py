"""The embedded model: what it says, and the dense reference. Other families are in `test_families.py`."""

import numpy as np
from dense import Dense, engine_logits

from sparsex_jax import ReuseConfig, SamplingParams

FULL = ReuseConfig(method="full")


def test_smollm_knows_the_capital_of_france(smollm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    out = smollm.generate(messages, SamplingParams(max_new_tokens=32, temperature=0.0), reuse=FULL, namespace="france")
    assert out.text == "The capital of France is Paris."
    assert out.finish_reason == "stop"
    assert smollm.tokenizer.decode(out.token_ids) == "The capital of France is Paris.<|im_end|>"


def test_smollm_matches_the_dense_reference(smollm):
    tokens = np.asarray(smollm.tokenizer("In 1492, Columbus sailed the ocean blue. " * 4)["input_ids"])
    dense = Dense(smollm.model, smollm.runner.params)
    logits, _ = dense.full(tokens)
    np.testing.assert_allclose(engine_logits(smollm, tokens, reuse=FULL, namespace="dense"), logits[-1], atol=1e-3)
