"""What a sequence has generated so far, and what callers of the engine get in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from sparsex_jax.cache import PinState
from sparsex_jax.config import SamplingParams
from sparsex_jax.device.sampling import NON_FINITE, Logprobs, Sampled
from sparsex_jax.errors import InvalidRequestError, NonFiniteLogitsError
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.pinning import PinRefused
from sparsex_jax.text.detokenizer import Detokenizer
from sparsex_jax.text.matcher import Matcher


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability under the model, before temperature, filters and penalties.

    Attributes:
      top: the most probable tokens with theirs, best first: as many as `SamplingParams.logprobs` says of a new token,
        and `SamplingParams.prompt_logprobs` of one of the prompt.
      rank: of a token of the prompt: how many tokens are more probable, and 1.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What `Engine.generate` gives.

    Attributes:
      text: the new text, without special tokens and without what ended it, if `SamplingParams` does not ask for them.
        It is what stands behind the prompt: where words carry the space before them, it may begin with one.
      token_ids: the new tokens, the end token included if one came.
      finish_reason: `stop` (an end token, a stop token or a stop string) or `length` (max_new_tokens).
      logits: float32 `[vocab]` of the first token, if they were asked for.
      logprobs: one for each new token if `SamplingParams.logprobs` asked for them; otherwise empty.
      prompt_logprobs: one for each token of the prompt if `SamplingParams.prompt_logprobs` asked for them, and None for
        tokens that have none: the first one, at least. Otherwise empty.
      pin: what is pinned of prompt and answer, or why they are not. None: that was not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    report: Report
    logits: Float32[np.ndarray, "vocab"] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    pin: PinState | PinRefused | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """What `Engine.prefill` gives: float32 logits `[vocab]` of the token after the prompt."""

    logits: Float32[np.ndarray, "vocab"]
    report: Report


_ONLY_PREFILLED = SamplingParams()  # of sequences that say nothing: made once, since all its fields are checked


class Output:
    """The tokens generated for one sequence so far, their text, and whether it is done.

    Attributes:
      sampling: how tokens are chosen.
      max_new_tokens: 0 for a sequence that is only prefilled.
      end_tokens: the model's tokens that end it, which the device looks for. The host looks for stop tokens and stop
        strings too, and drops what was generated behind them.
      matcher: of the structure that the answer has, if it has one.
    """

    def __init__(
        self,
        sampling: SamplingParams | None,
        end_tokens: Sequence[int],
        tokenizer: Any | None,
        matcher: Matcher | None = None,
    ) -> None:
        """
        Args:
          sampling: None for a sequence that is only prefilled. A token is sampled all the same, greedily and only to
            see that the logits are finite.
        """
        self.matcher = matcher
        self.max_new_tokens = 0 if sampling is None else sampling.max_new_tokens
        self.sampling = sampling = sampling or _ONLY_PREFILLED
        if sampling.stop and tokenizer is None:
            raise InvalidRequestError(f"stop={sampling.stop!r} is text, but this model has no tokenizer")
        # -1 is no token. The number of end tokens is always the same, so that any batch runs the same program.
        self.end_tokens = tuple(-1 if sampling.ignore_eos else token for token in end_tokens)
        self._ends = {*self.end_tokens, *sampling.stop_token_ids}
        _check_allowed(sampling, self._ends)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self._detokenizer = _detokenizer(sampling, end_tokens, tokenizer) if tokenizer is not None else None
        self._text: list[str] = []  # in the pieces that became certain together
        self._num_told = 0  # pieces that `new_text` has returned

    def follow(self, prompt: Int32[np.ndarray, "tokens"]) -> None:
        """Make the text one that stands behind this prompt. Call it before the first token comes."""
        if self._detokenizer is not None:
            self._detokenizer.follow(prompt.tolist())

    def extend(self, tokens: Iterable[int], logprobs: Logprobs | None = None) -> None:
        """Take new tokens up to the one that ends the sequence; those behind it are dropped.

        Args:
          logprobs: theirs, in arrays `[tokens]`; needed if the request asks for them.

        Raises:
          NonFiniteLogitsError: one of them is `NON_FINITE`. Those before it were taken.
        """
        if logprobs is None and self._detokenizer is not None and not self._detokenizer.may_stop:
            tokens = self._extend_together(list(tokens))
        for step, token in enumerate(tokens):
            if self.finish_reason is None and token == NON_FINITE:
                raise NonFiniteLogitsError(f"the logits of new token {len(self.token_ids)} are not all finite")
            if self.finish_reason is not None or token < 0:
                return
            if self.max_new_tokens == 0:
                return
            self.token_ids.append(token)
            if self.sampling.logprobs is not None and logprobs is not None:
                self.logprobs.append(_token_logprobs(token, logprobs, step, self.sampling.logprobs))
            self._take_text(token)

    def _extend_together(self, tokens: list[int]) -> list[int]:
        """Take the leading tokens that end nothing, whose text is made at once. Returns the others."""
        most = self.max_new_tokens - len(self.token_ids) - 1 if self.finish_reason is None else 0
        number = next(
            (n for n, token in enumerate(tokens) if n >= most or token < 0 or token in self._ends), len(tokens)
        )
        if number > 1:
            assert self._detokenizer is not None
            self.token_ids += tokens[:number]
            self._text.append(self._detokenizer.push_all(tokens[:number]))
            return tokens[number:]
        return tokens

    def take(self, sampled: Sampled, slot: int) -> None:
        """Extend by what was sampled in one batch slot, as NumPy arrays, as far as the structure allows it.

        Raises as `extend`, and StructureError if the structure's grammar got too complex.
        """
        logprobs = None if sampled.logprobs is None else jax.tree.map(lambda array: array[slot], sampled.logprobs)
        tokens = sampled.token[slot].tolist()
        if self.matcher is None or self.max_new_tokens == 0:
            self.extend(tokens, logprobs)
            return
        self.extend(self.matcher.accept(tokens), logprobs)
        if self.matcher.done:
            self._end("stop")

    def _take_text(self, token: int) -> None:
        """Add the text that the token makes certain, and see whether the token ends the sequence."""
        ends = token in self._ends
        if not ends or self.sampling.include_stop:
            self._push(token)
        if ends or (self._detokenizer is not None and self._detokenizer.stopped):
            self._end("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self._end("length")

    def _push(self, token: int) -> None:
        if self._detokenizer is not None:
            may_stop = len(self.token_ids) > self.sampling.min_new_tokens
            self._text.append(self._detokenizer.push(token, may_stop=may_stop))

    def cut(self) -> None:
        """End it here: there is no room for more."""
        self._end("length")

    def _end(self, reason: str) -> None:
        if self.finish_reason is None and self._detokenizer is not None:
            self._text.append(self._detokenizer.finish())
        self.finish_reason = reason

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return None if self._detokenizer is None else self._detokenizer.stopped_by

    @property
    def text(self) -> str:
        """All of it that is certain: no half character, and nothing that may begin a stop string."""
        return "".join(self._text)

    def new_text(self) -> str:
        """The text that came since this was called last."""
        told, self._num_told = self._num_told, len(self._text)
        return "".join(self._text[told:])


def _token_logprobs(token: int, logprobs: Logprobs, step: int, number: int) -> TokenLogprobs:
    top_ids, top = logprobs.top_ids[step, :number].tolist(), logprobs.top[step, :number].tolist()
    return TokenLogprobs(token, float(logprobs.chosen[step]), tuple(zip(top_ids, top, strict=True)))


def _detokenizer(sampling: SamplingParams, end_tokens: Sequence[int], tokenizer: Any) -> Detokenizer:
    return Detokenizer(
        tokenizer,
        sampling.stop,
        end_tokens=end_tokens,
        shown_tokens=sampling.shown_token_ids,
        include_stop=sampling.include_stop,
        skip_special_tokens=sampling.skip_special_tokens,
    )


def _check_allowed(sampling: SamplingParams, ends: set[int]) -> None:
    """Raises InvalidRequestError if no token could be drawn before the answer may end."""
    allowed = sampling.allowed_token_ids
    if sampling.min_new_tokens and allowed is not None and ends.issuperset(allowed):
        raise InvalidRequestError(
            f"allowed_token_ids has only tokens that end the answer, and min_new_tokens={sampling.min_new_tokens} "
            "forbids these"
        )
