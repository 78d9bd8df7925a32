"""Log-probabilities of a prompt's own tokens: which rows of a plan score what, and what was scored so far."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.device.scoring import Scores
from sparsex_jax.errors import InvalidRequestError, NonFiniteLogitsError
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.scheduler.output import TokenLogprobs

# Of one prompt: its tokens times 1 and the most probable ones. They are JSON of some 8 MB.
MOST_ENTRIES = 1 << 17


class PromptLogprobs:
    """What is known of one prompt's tokens.

    Attributes:
      tokens: int32 `[tokens]`.
      number: how many of the most probable tokens are told in each place.
      start: the first token that is scored. Token 0 has nothing before it, and never is.
      computed: how many tokens at the prompt's end are computed whatever is found, since they are scored or score.
    """

    def __init__(self, tokens: Int32[np.ndarray, "tokens"], number: int, start: int) -> None:
        """
        Args:
          start: as `SamplingParams.prompt_logprobs_start`.

        Raises:
          InvalidRequestError: the start is not in the prompt, or the prompt is too long for this number.
        """
        length = len(tokens)
        if not -length <= start < length:
            raise InvalidRequestError(
                f"prompt_logprobs_start={start} must be from {-length} to {length - 1}: the prompt has {length} tokens"
            )
        self.tokens, self.number = tokens, number
        self.start = max(start + length if start < 0 else start, 1)
        self.computed = length - self.start + 1 if start else 0
        told = (length - self.start) * (1 + number)
        if told > MOST_ENTRIES:
            raise InvalidRequestError(
                f"prompt_logprobs={number} of {length - self.start} tokens are {told} log-probabilities; "
                f"the limit is {MOST_ENTRIES}"
            )
        self._scores = _nothing(length, number)

    @classmethod
    def asked(cls, tokens: Int32[np.ndarray, "tokens"], sampling: SamplingParams) -> PromptLogprobs | None:
        """None if the request asks for none. Raises as the constructor."""
        if sampling.prompt_logprobs is None:
            return None
        return cls(tokens, sampling.prompt_logprobs, sampling.prompt_logprobs_start)

    def following(self, stage: RequestPlan, keep: Bool[np.ndarray, "tokens"] | None) -> Int32[np.ndarray, "rows"]:
        """The token that each row of a plan has to score; -1: none.

        Args:
          keep: which tokens the plan's prompt has of this one, where it is an excerpt. None: it is this one.
        """
        places = self._places(stage, keep)
        asked = (places >= self.start) & (places < len(self.tokens))
        return np.where(asked, self.tokens.take(places, mode="clip"), -1).astype(np.int32)

    def take(self, stage: RequestPlan, keep: Bool[np.ndarray, "tokens"] | None, scores: Scores) -> None:
        """Take up what the rows of a plan say. Arguments as `following`.

        Raises:
          NonFiniteLogitsError: some of it is not finite.
        """
        there = np.asarray(scores.rank) > 0
        scores = scores.of_rows(there)
        if not (np.isfinite(scores.chosen).all() and np.isfinite(scores.top).all()):
            raise NonFiniteLogitsError("the log-probabilities of the prompt's tokens are not all finite")
        places, mine = self._places(stage, keep)[there], self._scores
        mine.chosen[places], mine.rank[places] = scores.chosen, scores.rank
        mine.top[places], mine.top_ids[places] = scores.top[:, : self.number], scores.top_ids[:, : self.number]

    def _places(self, stage: RequestPlan, keep: Bool[np.ndarray, "tokens"] | None) -> np.ndarray:
        """Of each row of a plan, the place in the prompt of the token behind it."""
        behind = np.flatnonzero(stage.phases[0].forced) + 1
        if keep is None:
            return behind
        return np.append(np.flatnonzero(keep), len(keep)).take(behind)

    def entries(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each token of the prompt; None where there is no log-probability."""
        scores = self._scores
        arrays = (self.tokens, scores.chosen, scores.rank, scores.top, scores.top_ids)
        lines = zip(*(each.tolist() for each in arrays), strict=True)
        return tuple(
            TokenLogprobs(token, chosen, tuple(zip(top_ids, top, strict=True)), rank) if rank else None
            for token, chosen, rank, top, top_ids in lines
        )


def check_prompt_logprobs(tokens: Int32[np.ndarray, "tokens"], sampling: SamplingParams) -> None:
    """Raises InvalidRequestError if a prompt of these tokens cannot be scored as is asked."""
    PromptLogprobs.asked(tokens, sampling)


def _nothing(length: int, number: int) -> Scores:
    top = np.zeros((length, number), np.float32)
    return Scores(np.full(length, np.nan, np.float32), np.zeros(length, np.int32), top, top.astype(np.int32))


def reuse_when_scored(sampling: SamplingParams) -> ReuseConfig | None:
    """How a call that names no `reuse` is prefilled, if its prompt is scored: exactly. None: it is not scored."""
    if sampling.prompt_logprobs is None:
        return None
    return ReuseConfig(method="prefix" if sampling.prompt_logprobs_start else "full")
