"""What reuse costs: scores of an answer, and how far it is from what full recompute gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from sparsex_jax.reuse.report import Report


def task_score(text: str, answers: Sequence[str]) -> float:
    """RULER's score: the share of the expected strings that are in the text, whatever their case.

    >>> task_score("They are Red and green.", ("red", "blue"))
    0.5
    """
    return float(np.mean([answer.lower() in text.lower() for answer in answers]))


def log_softmax(logits: Float[np.ndarray, "vocab"]) -> Float64[np.ndarray, "vocab"]:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl_divergence(reference: Float[np.ndarray, "vocab"], logits: Float[np.ndarray, "vocab"]) -> float:
    """KL(reference || other) of two next-token distributions, in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float(np.sum(np.exp(p) * (p - q)))


def agreement(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """The share of the reference's tokens up to the first that is different or missing.

    >>> agreement([5, 6, 7, 8], [5, 6, 9, 8])
    0.5
    """
    same = [a == b for a, b in zip(reference, tokens, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(reference)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a method made of a prompt: greedy continuation, float32 logits `[vocab]` of its first token, report.

    Attributes:
      ttft_s: where the prompt was timed alone; the report's time is that of a whole batch.
    """

    text: str
    token_ids: Sequence[int]
    logits: Float[np.ndarray, "vocab"]
    report: Report
    ttft_s: float | None = None


# What `compare` gives, and in which unit.
UNITS = {
    "score": "share",
    "kl": "nats",
    "top1": "share",
    "agreement": "share",
    "computed_fraction": "share",
    "active_tokens": "tokens",
    "reused_tokens": "tokens",
    "prompt_tokens": "tokens",
    "ttft_s": "s",
}


def compare(answer: Answer, full: Answer, expected: Sequence[str]) -> dict[str, float]:
    """The figures of `UNITS` for an answer, where `full` is what full recompute answers. No time if none was taken."""
    report = answer.report
    return {
        "score": task_score(answer.text, expected),
        "kl": kl_divergence(full.logits, answer.logits),
        "top1": float(full.logits.argmax() == answer.logits.argmax()),
        "agreement": agreement(full.token_ids, answer.token_ids),
        "computed_fraction": report.computed_fraction,
        "active_tokens": report.active_tokens,
        "reused_tokens": report.reused_tokens,
        "prompt_tokens": report.prompt_tokens,
    } | ({} if answer.ttft_s is None else {"ttft_s": answer.ttft_s})
