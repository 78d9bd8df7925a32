"""What is told of prompts' own tokens, and which answers are returned of more that were generated.

Prompts are repeated and scored as OpenAI's older completions have it (`echo`), and scored as vLLM has it
(`prompt_logprobs`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.scheduler.output import TokenLogprobs
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, Generate
from sparsex_jax.text.token_text import TokenText
from sparsex_jax.text.tokenizer import token_pieces


@dataclasses.dataclass(frozen=True)
class Echo:
    """A prompt that its answers begin with.

    Attributes:
      offsets: where the text of each token begins in it, in characters.
    """

    text: str
    offsets: list[int]

    @classmethod
    def of(cls, prompt: Any, tokens: np.ndarray, tokenizer: Any | None) -> Echo:
        """
        Args:
          prompt: as it was sent: a text, or something else. Its text is that of all its tokens then.
          tokens: those that were prefilled. Special tokens before a text are no part of it.
        """
        pieces = list(token_pieces(tokenizer, tokens.tolist())) if tokenizer is not None else [""] * len(tokens)
        whole = "".join(pieces)
        text = prompt if isinstance(prompt, str) and whole.endswith(prompt) else whole
        hidden = len(whole) - len(text)
        ends = itertools.accumulate(map(len, pieces), initial=-hidden)
        return cls(text, [max(end, 0) for end in ends][:-1])


def prompt_logprobs_of(request: Generate) -> int | None:
    """How many of the most probable tokens are found out in each place of the prompt; None: it is not scored.

    Raises:
      RequestError: it is asked for in a form that does not exist.
    """
    if request.prompt_logprobs is not None and request.stream:
        raise _unsupported("prompt_logprobs is not available with stream: true", "prompt_logprobs")
    if request.echo and isinstance(request, ChatRequest):
        raise _unsupported("echo is not supported: chats are not repeated, only the prompts of completions", "echo")
    echoed = request.logprobs if request.echo and isinstance(request, CompletionRequest) else None
    asked = [number for number in (request.prompt_logprobs, echoed) if number is not None]
    if not asked and request.prompt_logprobs_start:
        said = "prompt_logprobs_start needs prompt_logprobs, or echo with logprobs"
        raise RequestError(said, param="prompt_logprobs_start", code="invalid_value")
    return max(asked, default=None)


def check_best_of(request: Generate) -> None:
    """Raises RequestError if the best answers cannot be chosen of as many as the request says."""
    if request.best_of is None:
        return
    if request.best_of < (request.n or 1):
        said = f"best_of={request.best_of} must be at least n, which is {request.n or 1}"
        raise RequestError(said, param="best_of", code="invalid_value")
    if request.stream and request.num_answers > (request.n or 1):
        raise _unsupported("best_of above n is not available with stream: true", "best_of")


def answer_logprobs_of(request: Generate, asked: int | None) -> int | None:
    """How many of the most probable tokens are found out in each place of an answer; None: no log-probabilities.

    Args:
      asked: as the request has it.
    """
    return 0 if asked is None and request.num_answers > (request.n or 1) else asked


def each_answer(
    request: Generate, sampling: SamplingParams, reuse: ReuseConfig
) -> list[tuple[SamplingParams, ReuseConfig]]:
    """How each answer to a prompt is generated. All but the first find the prompt's KV; their seeds follow its seed.

    One scores the prompt for all of them, except in a stream, where each tells the scores as it begins.
    """
    seeds = [(sampling.seed + number) % 2**32 for number in range(request.num_answers)]
    first, *others = [dataclasses.replace(sampling, seed=seed) for seed in seeds]
    if request.stream and sampling.prompt_logprobs is not None:
        return [(each, reuse) for each in (first, *others)]
    behind = reuse if reuse.uses_prefix else ReuseConfig(method="prefix")
    unscored = [dataclasses.replace(each, prompt_logprobs=None, prompt_logprobs_start=0) for each in others]
    return [(first, reuse), *((each, behind) for each in unscored)]


def best(candidates: Sequence[tuple[int, Sequence[TokenLogprobs]]], number: int) -> list[int]:
    """The answers of highest log-probability per token, which is how OpenAI ranks them; the best first.

    Args:
      candidates: numbers of answers, and the log-probabilities of their tokens.
    """

    def mean(candidate: tuple[int, Sequence[TokenLogprobs]]) -> float:
        _, logprobs = candidate
        return sum(each.logprob for each in logprobs) / max(len(logprobs), 1)

    return [answer for answer, _ in sorted(candidates, key=mean, reverse=True)[:number]]


def prompt_entries(
    texts: TokenText, entries: Sequence[TokenLogprobs | None], number: int
) -> list[dict[str, Any] | None]:
    """What vLLM tells of a prompt's tokens: by the id of each token and of `number` most probable ones."""

    def entry(id_: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.text_of(id_)}

    return [
        None
        if each is None
        else {str(each.token_id): entry(each.token_id, each.logprob, each.rank)}
        | {str(id_): entry(id_, value, rank) for rank, (id_, value) in enumerate(each.top[:number], start=1)}
        for each in entries
    ]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: like OpenAI, -9999 in place of minus infinity."""
    return max(float(logprob), -9999.0)


def _unsupported(said: str, param: str) -> RequestError:
    return RequestError(said, param=param, code="unsupported_parameter")
