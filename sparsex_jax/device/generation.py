"""A request's output as it grows on the host, and the device state that makes it grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from sparsex_jax.config import SamplingParams
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.sampling import NON_FINITE, Adjustment, Logprobs, Sampled, Sampling
from sparsex_jax.errors import InvalidRequestError, NonFiniteLogitsError
from sparsex_jax.reuse.planner import page_tables
from sparsex_jax.reuse.report import Report
from sparsex_jax.text.detokenizer import Detokenizer


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A new token's log-probability under the model, before temperature, filters and penalties.

    Attributes:
      top: the most probable tokens with theirs, best first: as many as `SamplingParams.logprobs` says.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What `Engine.generate` gives.

    Attributes:
      text: the new text, without special tokens and without the stop string that ended it.
      token_ids: the new tokens, the end token included if one came.
      finish_reason: `stop` (an end token or a stop string) or `length` (max_new_tokens).
      logits: float32 `[vocab]` of the first token, if they were asked for.
      logprobs: one for each new token if `SamplingParams.logprobs` asked for them; otherwise empty.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    report: Report
    logits: Float32[np.ndarray, "vocab"] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """What `Engine.prefill` gives: float32 logits `[vocab]` of the token after the prompt."""

    logits: Float32[np.ndarray, "vocab"]
    report: Report


class Output:
    """The tokens generated for one request so far, their text, and whether it is done."""

    def __init__(self, sampling: SamplingParams, end_tokens: Sequence[int], tokenizer: Any | None) -> None:
        if sampling.stop and tokenizer is None:
            raise InvalidRequestError(f"stop={sampling.stop!r} is text, but this model has no tokenizer")
        self.sampling = sampling
        # None of them is -1. There are as many either way, so that a batch of any requests runs the same program.
        self.end_tokens = tuple(-1 if sampling.ignore_eos else token for token in end_tokens)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self._detokenizer = Detokenizer(tokenizer, sampling.stop) if tokenizer is not None else None
        self._text: list[str] = []  # in the pieces that became certain together
        self._told = 0  # so many of them were asked for

    def extend(self, tokens: Iterable[int], logprobs: Logprobs | None = None) -> None:
        """Take new tokens up to the one that ends the request; those behind it are dropped.

        Args:
          logprobs: theirs, of lines `[tokens]`; needed if the request asks for them.

        Raises:
          NonFiniteLogitsError: one of them is `NON_FINITE`. Those before it were taken.
        """
        for step, token in enumerate(tokens):
            if self.finish_reason is None and token == NON_FINITE:
                raise NonFiniteLogitsError(f"the logits of new token {len(self.token_ids)} are not all finite")
            if self.finish_reason is not None or token < 0:
                return
            self.token_ids.append(token)
            if self.sampling.logprobs is not None and logprobs is not None:
                self.logprobs.append(_token_logprobs(token, logprobs, step, self.sampling.logprobs))
            self._take_text(token)

    def take(self, sampled: Sampled, line: int) -> None:
        """Extend by one line of what was sampled, as NumPy arrays. Raises as `extend`."""
        logprobs = None if sampled.logprobs is None else jax.tree.map(lambda array: array[line], sampled.logprobs)
        self.extend(sampled.token[line].tolist(), logprobs)

    def _take_text(self, token: int) -> None:
        """The text that the token makes certain, and whether the request is done with it."""
        stopped = False
        if self._detokenizer is not None:
            self._text.append(self._detokenizer.push(token))
            stopped = self._detokenizer.stopped
        if stopped or token in self.end_tokens:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            self._text.append(self._detokenizer.finish())

    @property
    def text(self) -> str:
        """All of it that is certain: no half character, and nothing that may begin a stop string."""
        return "".join(self._text)

    def new_text(self) -> str:
        """What came since this was called last."""
        told, self._told = self._told, len(self._text)
        return "".join(self._text[told:])


def _token_logprobs(token: int, logprobs: Logprobs, step: int, number: int) -> TokenLogprobs:
    top_ids, top = logprobs.top_ids[step, :number].tolist(), logprobs.top[step, :number].tolist()
    return TokenLogprobs(token, float(logprobs.chosen[step]), tuple(zip(top_ids, top, strict=True)))


def sampling_arrays(
    outputs: Sequence[Output], prompts: Sequence[Sequence[int] | np.ndarray], lines: int, vocab_size: int
) -> Sampling:
    """How the next token of each output is chosen, one line each, greedy ones to fill up.

    Depends on the prompts and on the tokens that the outputs hold now, so it can be made anew between any two
    dispatches, for any batch.
    """
    params = [output.sampling for output in outputs]
    filled = [*params, *[SamplingParams()] * (lines - len(params))]
    return Sampling(
        temperature=jnp.array([p.temperature for p in filled], jnp.float32),
        top_p=jnp.array([p.top_p for p in filled], jnp.float32),
        top_k=jnp.array([p.top_k for p in filled], jnp.int32),
        min_p=jnp.array([p.min_p for p in filled], jnp.float32),
        seed=jnp.array([p.seed for p in filled], jnp.uint32),
        adjustment=_adjustment(filled, outputs, prompts, vocab_size) if any(p.adjusts_logits for p in params) else None,
        logprobs=any(p.logprobs is not None for p in params),
    )


def _adjustment(
    filled: Sequence[SamplingParams],
    outputs: Sequence[Output],
    prompts: Sequence[Sequence[int] | np.ndarray],
    vocab_size: int,
) -> Adjustment:
    """The arrays of the vocabulary. `filled` has a line more for each one without an output."""
    shape = (len(filled), vocab_size)
    bias, in_prompt, counts = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, np.int32)
    for line, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
        for token, value in output.sampling.logit_bias.items():
            bias[line, token] = value
        in_prompt[line, np.asarray(prompt)] = True
        counts[line] = np.bincount(np.array(output.token_ids, np.int64), minlength=vocab_size)
    return Adjustment(
        repetition=jnp.array([p.repetition_penalty for p in filled], jnp.float32),
        presence=jnp.array([p.presence_penalty for p in filled], jnp.float32),
        frequency=jnp.array([p.frequency_penalty for p in filled], jnp.float32),
        bias=jnp.asarray(bias),
        in_prompt=jnp.asarray(in_prompt),
        counts=jnp.asarray(counts),
    )


def decode_state(
    outputs: Sequence[Output],
    prompts: Sequence[Sequence[int] | np.ndarray],
    pages: Sequence[Sequence[int]],
    max_pages: int,
    vocab_size: int,
) -> DecodeState:
    """The state behind the last token of each output, for a number of lines that is a power of two.

    Made of what the host knows: between dispatches, requests may come and go. Every output has a token at least.
    """
    lines = 1 << (len(outputs) - 1).bit_length()
    width = max(1, *(len(output.end_tokens) for output in outputs))
    stops = np.full((lines, width), -1)
    for line, output in enumerate(outputs):
        stops[line, : len(output.end_tokens)] = output.end_tokens
    running = [
        -1 if output.finish_reason else len(prompt) + len(output.token_ids) - 1
        for output, prompt in zip(outputs, prompts, strict=True)
    ]
    return DecodeState(
        token=_line_array([output.token_ids[-1] for output in outputs], lines, 0),
        position=_line_array(running, lines, -1),
        remaining=_line_array([o.sampling.max_new_tokens - len(o.token_ids) for o in outputs], lines, 0),
        stops=jnp.asarray(stops, jnp.int32),
        page_tables=jnp.asarray(page_tables(pages, lines, max_pages)),
        sampling=sampling_arrays(outputs, prompts, lines, vocab_size),
    )


def stop_finished(state: DecodeState, outputs: Sequence[Output]) -> DecodeState:
    """The state without the requests that a stop string ended, which the device cannot see."""
    ended = _line_array([output.finish_reason is not None for output in outputs], len(state.token), 1)
    return dataclasses.replace(state, position=jnp.where(ended > 0, -1, state.position))


def _line_array(values: Sequence[int], lines: int, fill: int) -> Array:
    return jnp.array([*values, *[fill] * (lines - len(values))], jnp.int32)
