"""The quality that a candidate must have, and what few prompts can show of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import summaries

LOSS, DISAGREEMENT = "loss", "disagreement"
MAX_LOSS = 0.02
_MIN_SCORE = 0.25  # if full recompute scores less, there are hardly any right answers that reuse could spoil


@dataclasses.dataclass(frozen=True)
class Target:
    """The quality that a candidate must have.

    Attributes:
      metric: `loss` or `disagreement`, each a share from 0 to 1 for every prompt.
      most: what its mean over the prompts may be at most.
      confident: whether the upper end of its 95 % interval may be at most that too.
    """

    metric: str = LOSS
    most: float = MAX_LOSS
    confident: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.most < 1:
            raise InvalidRequestError(f"{self.metric}={self.most} must be at least 0 and less than 1")

    def __str__(self) -> str:
        return f"{self.metric} <= {self.most}"

    def met_by(self, shortfalls: Sequence[float]) -> bool:
        """Whether a candidate with these losses or disagreements meets the target."""
        interval = Interval.of(shortfalls)
        return (interval.high if self.confident else interval.mean) <= self.most + 1e-9

    def in_reach(self, shortfalls: Sequence[float], total: int) -> bool:
        """Whether `total` prompts meet the target, if those that were not measured yet have no shortfall."""
        return self.met_by([*shortfalls, *[0.0] * (total - len(shortfalls))])


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of a share over prompts, with its 95 % interval (`summaries.wilson_interval`)."""

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, shares: Sequence[float]) -> Interval:
        """The interval of the mean of these shares."""
        values = np.asarray(shares, np.float64)
        return cls(float(values.mean()), *summaries.wilson_interval(values), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} (95 %: {self.low:.3f} to {self.high:.3f}, {self.samples} prompts)"


def check_samples(target: Target, total: int) -> None:
    """Raise InvalidRequestError if not even perfect answers to `total` prompts would meet the target."""
    if not target.in_reach([], total):
        needed = f"at least {samples_needed(target.most)}" if target.most else "more than any number of"
        raise InvalidRequestError(
            f"samples: {total} prompts of each regime cannot show with confidence that {target.metric} is at most "
            f"{target.most}; it takes {needed} prompts"
        )


def samples_needed(most: float) -> int:
    """How many perfect answers show with confidence that a mean is at most `most`.

    The Wilson interval of 0 of n ends at z^2 / (n + z^2).

    >>> samples_needed(0.02)
    189
    """
    return math.ceil(summaries.Z95**2 * (1 - most) / most)


def check_score(target: Target, full_score: float) -> None:
    """Raise InvalidRequestError if full recompute scores so little that no loss would show."""
    if target.metric == LOSS and full_score < _MIN_SCORE:
        raise InvalidRequestError(
            f"tasks: full recompute itself scores only {full_score:.2f}, so a loss would not show; take tasks that the "
            "model can do, shorter prompts, or an agreement as the target"
        )
