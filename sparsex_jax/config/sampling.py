"""How new tokens are chosen: `SamplingParams`."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from sparsex_jax.config.checks import Count, Flag, Limit, Share, checked, is_int, is_number, require
from sparsex_jax.config.structure import Structure

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
MAX_INT32 = 2**31 - 1


def _within(low: float, high: float) -> Limit:
    return Limit(
        lambda value: is_number(value) and math.isfinite(value) and low <= value <= high,
        f"a number from {low:g} to {high:g}",
    )


def _integer(low: int, high: int, says: str) -> Limit:
    return Limit(lambda value: is_int(value) and low <= value <= high, f"an integer {says}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How new tokens are chosen and when to stop.

    Attributes:
      max_new_tokens: at most this many are generated; with 0 the prompt is prefilled and no more.
      temperature: 0 is greedy; otherwise logits are divided by it; at most 100.
      top_p: nucleus, in [0, 1]; 1 keeps all, 0 the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      seed: of the request's own random stream; a batch-mate changes nothing.
      stop: strings that end the text; at most 16, of 1024 characters at most. They are not part of it.
      ignore_eos: go on past the model's end tokens.
      min_p: keep tokens at least this share as probable as the most probable one, in [0, 1]; 0 keeps all.
      repetition_penalty: divides positive logits of tokens that are in the prompt or the answer, and multiplies
        negative ones; from 0.01 to 100, 1 changes nothing.
      presence_penalty: taken from the logits of tokens that are in the answer, in [-2, 2].
      frequency_penalty: taken from them once for each time that they are, in [-2, 2].
      logit_bias: what is added to the logits of these token ids, in [-100, 100]; at most 1024 of them.
      logprobs: report the log-probability of each new token and of this many most probable ones, 0 to 20. They are the
        model's own, before anything above changes them. None reports nothing.
      prompt_logprobs: report the log-probability of each token of the prompt and of this many most probable ones, 0 to
        20; the first token has none. None reports nothing. Without a `reuse` of the call, the prompt is then computed
        in full; with one, tokens whose predecessor was reused have none.
      prompt_logprobs_start: only tokens from this place of the prompt on have one, counted from the end if negative.
        What stands before it may be reused, exactly if the call names no `reuse`; they themselves, and the token before
        them, are computed. 0: see `prompt_logprobs`.
      min_new_tokens: before this many are generated, tokens that would end the answer cannot be drawn, and stop strings
        are not looked for; at most max_new_tokens.
      stop_token_ids: tokens that end the answer besides the model's end tokens; at most 1024.
      allowed_token_ids: only these tokens can be drawn; None allows all.
      include_stop: the text has the stop string, or the token, that ended it.
      skip_special_tokens: the text has no special tokens.
      shown_token_ids: special tokens that the text has all the same, such as those that mark the calls of tools.
      ends_where_full: the answer ends before max_new_tokens where frozen texts leave no room for more. Otherwise a
        request that has no room for all of them is refused.
      structure: what the answer must be, such as JSON of a schema; None: any text. It ends where the structure is
        complete, also before min_new_tokens, and is cut at max_new_tokens. Needs a tokenizer.

    Temperature and filters come after bias and penalties, in the order min_p, top_k, top_p; each sees what the one
    before it left. This is what vLLM does.
    """

    max_new_tokens: Annotated[int, _integer(0, MAX_INT32, ">= 0 and below 2**31")] = 128
    temperature: Annotated[float, _within(0, 100)] = 0.0
    top_p: Share = 1.0
    top_k: Annotated[int, _integer(0, MAX_INT32, ">= 0 and below 2**31")] = 0
    seed: Annotated[int, _integer(0, 2**32 - 1, "in [0, 2**32)")] = 0
    stop: tuple[str, ...] = ()
    ignore_eos: Flag = False
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, _within(0.01, 100)] = 1.0
    presence_penalty: Annotated[float, _within(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, _within(-2, 2)] = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    logprobs: Annotated[int, _integer(0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")] | None = None
    prompt_logprobs: Annotated[int, _integer(0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")] | None = None
    prompt_logprobs_start: Annotated[int, _integer(-MAX_INT32, MAX_INT32, "above -2**31 and below 2**31")] = 0
    min_new_tokens: Count = 0
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    include_stop: Flag = False
    skip_special_tokens: Flag = True
    shown_token_ids: tuple[int, ...] = ()
    ends_where_full: Flag = False
    structure: Structure | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given |= {"stop": _stops(self.stop), "logit_bias": _bias(self.logit_bias)}
        for name in ("stop_token_ids", "shown_token_ids"):
            given[name] = _token_ids(name, given[name])
        require(
            len(given["stop_token_ids"]) <= MAX_STOP_TOKENS,
            f"stop_token_ids has {len(given['stop_token_ids'])} entries; the limit is {MAX_STOP_TOKENS}",
        )
        if self.allowed_token_ids is not None:
            given["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
            require(bool(given["allowed_token_ids"]), "allowed_token_ids has no entries; it must have 1 at least")
        for name, value in checked(type(self), given).items():
            object.__setattr__(self, name, value)
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}",
        )

        require(
            self.prompt_logprobs is not None or self.prompt_logprobs_start == 0,
            f"prompt_logprobs_start={self.prompt_logprobs_start} needs prompt_logprobs",
        )
        require(
            self.structure is None or isinstance(self.structure, Structure),
            f"structure={self.structure!r:.60} must be a Structure or None",
        )
        require(
            self.structure is None or self.allowed_token_ids is None,
            "structure and allowed_token_ids exclude each other: there may be no token that both allow",
        )

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits themselves, which takes an array of the vocabulary on the device."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        restricts = self.allowed_token_ids is not None or self.min_new_tokens > 0
        return penalties != (1, 0, 0) or bool(self.logit_bias) or restricts

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequestError if a field names a token that a model of this vocabulary has not."""
        named = {
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        for name, ids in named.items():
            beyond = max(ids, default=0)
            require(beyond < vocab_size, f"{name} has token id {beyond}; ids must be from 0 to {vocab_size - 1}")


def _stops(stop: Any) -> tuple[str, ...]:
    require(isinstance(stop, (str, list, tuple)), f"stop={stop!r} must be a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    require(len(stops) <= MAX_STOPS, f"stop has {len(stops)} strings; the limit is {MAX_STOPS}")
    require(all(isinstance(each, str) and each for each in stops), f"stop={stop!r} must be non-empty strings")
    longest = max(map(len, stops), default=0)
    require(
        longest <= MAX_STOP_LENGTH, f"stop has a string of {longest} characters; the limit is {MAX_STOP_LENGTH} each"
    )
    return stops


def _bias(bias: Any) -> dict[int, float]:
    require(isinstance(bias, Mapping), f"logit_bias={bias!r} must map token ids to numbers")
    require(len(bias) <= MAX_LOGIT_BIAS, f"logit_bias has {len(bias)} entries; the limit is {MAX_LOGIT_BIAS}")
    for token, value in bias.items():
        require(is_int(token) and token >= 0, f"logit_bias has the key {token!r}; it must be a token id")
        require(
            is_number(value) and -100 <= value <= 100,
            f"logit_bias of token {token} is {value!r}; it must be in [-100, 100]",
        )
    return dict(bias)


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    ok = isinstance(ids, Iterable) and not isinstance(ids, (str, bytes, Mapping))
    require(ok, f"{name}={ids!r} must be a list of token ids")
    ids = tuple(ids)
    wrong = next((reprlib.repr(each) for each in ids if not is_int(each) or each < 0), None)
    require(wrong is None, f"{name} has {wrong}; it must be a token id")
    return tuple(map(int, ids))
