"""Scores of an answer: how right it is, and how far it is from full recompute's answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from sparsex_jax.reuse.report import Report


def task_score(text: str, answers: Sequence[str]) -> float:
    """The share of the expected strings that are in the text, ignoring case (RULER's string match).

    >>> task_score("They are Red and green.", ("red", "blue"))
    0.5
    """
    return float(np.mean([answer.lower() in text.lower() for answer in answers]))


def log_softmax(logits: Float[np.ndarray, "vocab"]) -> Float64[np.ndarray, "vocab"]:
    """Natural log-probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl_divergence(reference: Float[np.ndarray, "vocab"], logits: Float[np.ndarray, "vocab"]) -> float:
    """KL(reference || other) of the next-token distributions of two logits, in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float(np.sum(np.exp(p) * (p - q)))


def agreement(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """The share of the reference's tokens before the first one that is different or missing.

    >>> agreement([5, 6, 7, 8], [5, 6, 9, 8])
    0.5
    """
    same = [a == b for a, b in zip(reference, tokens, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(reference)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A method's answer to a prompt.

    Attributes:
      text, token_ids: the greedy continuation.
      logits: float32, those of its first token.
      report: of the prefill. Its `ttft_s` is the time of the whole batch.
      ttft_s: the time to the first token of the prompt alone, in seconds. None if it was not measured.
    """

    text: str
    token_ids: Sequence[int]
    logits: Float[np.ndarray, "vocab"]
    report: Report
    ttft_s: float | None = None


# The figures of a row, with their units. `compare` gives all but `flops_fraction`, and `confidence` where there is one.
UNITS = {
    "score": "share",
    "kl": "nats",
    "top1": "share",
    "agreement": "share",
    "computed_fraction": "share",
    "flops_fraction": "share",
    "confidence": "share",
    "active_tokens": "tokens",
    "reused_tokens": "tokens",
    "recomputed_tokens": "tokens",
    "prompt_tokens": "tokens",
    "ttft_s": "s",
    "full_ttft_s": "s",
    "speedup": "ratio",
}


def compare(answer: Answer, full: Answer, expected: Sequence[str]) -> dict[str, float]:
    """The figures of an answer, compared with full recompute's. Without times if they were not measured."""
    report = answer.report
    return {
        "score": task_score(answer.text, expected),
        "kl": kl_divergence(full.logits, answer.logits),
        "top1": float(full.logits.argmax() == answer.logits.argmax()),
        "agreement": agreement(full.token_ids, answer.token_ids),
        "computed_fraction": report.computed_fraction,
        **({} if report.confidence is None else {"confidence": report.confidence}),
        "active_tokens": report.active_tokens,
        "reused_tokens": report.reused_tokens,
        "recomputed_tokens": report.recomputed_tokens,
        "prompt_tokens": report.prompt_tokens,
    } | _times(answer.ttft_s, full.ttft_s)


def _times(own: float | None, full: float | None) -> dict[str, float]:
    """TTFT, full recompute's on the same prompt, and how many times earlier the first token came than that."""
    if own is None or full is None:
        return {}
    return {"ttft_s": own, "full_ttft_s": full, "speedup": full / own}
