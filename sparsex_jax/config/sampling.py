"""How new tokens are chosen: `SamplingParams`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sparsex_jax.config.checks import is_int, is_number, require

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How new tokens are chosen and when to stop.

    Attributes:
      max_new_tokens: at most this many are generated, at least 1.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: nucleus, in (0, 1]; 1 keeps all.
      top_k: keep the k most probable tokens; 0 keeps all.
      seed: of the request's own random stream; a batch-mate changes nothing.
      stop: strings that end the text; they are not part of it.
      ignore_eos: go on past the model's end tokens.
      min_p: keep tokens at least this share as probable as the most probable one, in [0, 1]; 0 keeps all.
      repetition_penalty: divides positive logits of tokens that are in the prompt or the answer, and multiplies
        negative ones; above 0, 1 changes nothing.
      presence_penalty: taken from the logits of tokens that are in the answer, in [-2, 2].
      frequency_penalty: taken from them once for each time that they are, in [-2, 2].
      logit_bias: what is added to the logits of these token ids, in [-100, 100]; at most 1024 of them.
      logprobs: report the log-probability of each new token and of this many most probable ones, 0 to 20. They are the
        model's own, before anything above changes them. None reports nothing.

    Temperature and filters come after bias and penalties, in the order min_p, top_k, top_p; each sees what the one
    before it left. This is what vLLM does.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        require(
            is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens={self.max_new_tokens!r} must be an integer >= 1",
        )
        require(
            is_number(self.temperature) and math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature={self.temperature!r} must be a finite number >= 0",
        )
        require(is_number(self.top_p) and 0 < self.top_p <= 1, f"top_p={self.top_p!r} must be in (0, 1]")
        require(is_int(self.top_k) and self.top_k >= 0, f"top_k={self.top_k!r} must be an integer >= 0")
        require(is_int(self.seed) and 0 <= self.seed < 2**32, f"seed={self.seed!r} must be an integer in [0, 2**32)")
        require(isinstance(self.stop, (str, list, tuple)), f"stop={self.stop!r} must be a string or a list of strings")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        require(all(isinstance(s, str) and s for s in stop), f"stop={self.stop!r} must be non-empty strings")
        object.__setattr__(self, "stop", stop)
        self._check_logits()

    def _check_logits(self) -> None:
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, f"min_p={self.min_p!r} must be in [0, 1]")
        repetition = self.repetition_penalty
        require(
            is_number(repetition) and math.isfinite(repetition) and repetition > 0,
            f"repetition_penalty={repetition!r} must be a finite number > 0",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_number(value) and -2 <= value <= 2, f"{name}={value!r} must be in [-2, 2]")
        require(isinstance(self.logit_bias, Mapping), f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}",
        )
        for token, bias in self.logit_bias.items():
            require(is_int(token) and token >= 0, f"logit_bias has the key {token!r}; it must be a token id")
            require(
                is_number(bias) and -100 <= bias <= 100,
                f"logit_bias of token {token} is {bias!r}; it must be in [-100, 100]",
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        number = self.logprobs
        require(
            number is None or (is_int(number) and 0 <= number <= MAX_LOGPROBS),
            f"logprobs={number!r} must be an integer from 0 to {MAX_LOGPROBS}, or None",
        )

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits themselves, which takes an array of the vocabulary on the device."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequestError if `logit_bias` names a token that a model of this vocabulary has not."""
        beyond = max(self.logit_bias, default=0)
        require(beyond < vocab_size, f"logit_bias has token id {beyond}; ids must be from 0 to {vocab_size - 1}")
