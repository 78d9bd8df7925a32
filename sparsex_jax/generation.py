"""A request's output as it grows on the host, and the device state that makes it grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from sparsex_jax.config import SamplingParams
from sparsex_jax.decode import DecodeState
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.planner import page_tables
from sparsex_jax.report import Report
from sparsex_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What `Engine.generate` gives.

    Attributes:
      text: the new text, without special tokens and without the stop string that ended it.
      token_ids: the new tokens, the end token included if one came.
      finish_reason: `stop` (an end token or a stop string) or `length` (max_new_tokens).
      logits: float32 `[vocab]` of the first token, if they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    report: Report
    logits: Float32[np.ndarray, "vocab"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """What `Engine.prefill` gives: float32 logits `[vocab]` of the token after the prompt."""

    logits: Float32[np.ndarray, "vocab"]
    report: Report


class Output:
    """The tokens generated for one request so far, and whether it is done."""

    def __init__(self, sampling: SamplingParams, end_tokens: Sequence[int], tokenizer: Any | None) -> None:
        if sampling.stop and tokenizer is None:
            raise InvalidRequestError(f"stop={sampling.stop!r} is text, but this model has no tokenizer")
        self.sampling = sampling
        self.end_tokens = () if sampling.ignore_eos else tuple(end_tokens)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._text: str | None = None

    def extend(self, tokens: Iterable[int]) -> None:
        """Take new tokens up to the one that ends the request; those behind it are dropped."""
        for token in tokens:
            if self.finish_reason is not None or token < 0:
                return
            self.token_ids.append(token)
            self._check_finished(token)

    def _check_finished(self, token: int) -> None:
        if token in self.end_tokens:
            self.finish_reason = "stop"
        elif self.sampling.stop and (found := self._find_stop()) is not None:
            self._text, self.finish_reason = found, "stop"
        elif len(self.token_ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _find_stop(self) -> str | None:
        """The text before the earliest stop string, if there is one."""
        text = self.text
        ends = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else None

    @property
    def text(self) -> str:
        if self._text is not None:
            return self._text
        return self._tokenizer.decode(self.token_ids, skip_special_tokens=True) if self._tokenizer else ""


def sampling_arrays(params: Sequence[SamplingParams], lines: int) -> Sampling:
    """One line for each request, greedy ones to fill up."""
    filled = [*params, *[SamplingParams()] * (lines - len(params))]
    return Sampling(
        temperature=jnp.array([p.temperature for p in filled], jnp.float32),
        top_p=jnp.array([p.top_p for p in filled], jnp.float32),
        top_k=jnp.array([p.top_k for p in filled], jnp.int32),
        seed=jnp.array([p.seed for p in filled], jnp.uint32),
    )


def decode_state(
    outputs: Sequence[Output], prompt_lengths: Sequence[int], pages: Sequence[Sequence[int]], max_pages: int
) -> DecodeState:
    """The state behind the first token of each request, for a number of lines that is a power of two."""
    lines = 1 << (len(outputs) - 1).bit_length()
    width = max(1, *(len(output.end_tokens) for output in outputs))
    stops = np.full((lines, width), -1)
    for line, output in enumerate(outputs):
        stops[line, : len(output.end_tokens)] = output.end_tokens
    running = [-1 if output.finish_reason else length for output, length in zip(outputs, prompt_lengths, strict=True)]
    return DecodeState(
        token=_line_array([output.token_ids[-1] for output in outputs], lines, 0),
        position=_line_array(running, lines, -1),
        remaining=_line_array([output.sampling.max_new_tokens - 1 for output in outputs], lines, 0),
        stops=jnp.asarray(stops, jnp.int32),
        page_tables=page_tables(pages, lines, max_pages),
        sampling=sampling_arrays([output.sampling for output in outputs], lines),
    )


def stop_finished(state: DecodeState, outputs: Sequence[Output]) -> DecodeState:
    """The state without the requests that a stop string ended, which the device cannot see."""
    ended = _line_array([output.finish_reason is not None for output in outputs], len(state.token), 1)
    return dataclasses.replace(state, position=jnp.where(ended > 0, -1, state.position))


def _line_array(values: Sequence[int], lines: int, fill: int) -> Array:
    return jnp.array([*values, *[fill] * (lines - len(values))], jnp.int32)
