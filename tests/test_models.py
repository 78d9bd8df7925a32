"""Real models: their greedy answers. The files are not part of the project; SPARSEX_MODELS names their folder."""

import os
from pathlib import Path

import numpy as np
import pytest
from dense import engine_logits

from sparsex_jax import Engine, ReuseConfig, SamplingParams

pytestmark = pytest.mark.models
FULL = ReuseConfig(method="full")


def model(file):
    path = Path(os.environ.get("SPARSEX_MODELS", ".")) / file
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return Engine.from_pretrained(path, store_tokens=4096)


@pytest.fixture(scope="module")
def gemma():
    return model("gemma-3-270m-q4_k_m.gguf")


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("Water boils at a temperature of", " 100 degrees Celsius."),
        ("1, 2, 3, 4, 5,", " 6, 7, 8, 9, 10,"),
        ("def fibonacci(n):\n", "    if n == 0:\n        return 0\n    elif n == 1:\n"),
    ],
)
def test_gemma_answers_sensibly(gemma, prompt, begins):
    answer = gemma.generate(prompt, SamplingParams(max_new_tokens=24, temperature=0.0), reuse=FULL, keep=False)
    assert answer.text.startswith(begins)


def test_gemma_with_a_prompt_longer_than_its_window(gemma):
    """A list goes on with its next number, also where all of it was found elsewhere and everything is recomputed."""
    text = "".join(f"Item {number}: the price is {number * 7} dollars.\n" for number in range(1, 61)) + "Item"
    head, listed = gemma.encode("Prices:\n", 0), gemma.encode(text, 0)[1:]
    gemma.remember(listed[:-1])
    prompt = np.concatenate([head, listed])
    assert len(prompt) > 512 + 256
    answer = gemma.generate(prompt, SamplingParams(max_new_tokens=5, temperature=0.0), reuse=FULL, keep=False)
    assert answer.text.startswith(" 61:")
    expected = engine_logits(gemma, prompt, reuse=FULL, keep=False)
    out = gemma.prefill(prompt, reuse=ReuseConfig(recompute_ratio=1.0), keep=False)
    assert out.report.segments
    np.testing.assert_allclose(out.logits, expected, atol=2e-2)
