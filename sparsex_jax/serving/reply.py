"""Makes a reply of the loop's events: a whole one, or the chunks of a stream."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsex_jax.cache import PinState
from sparsex_jax.reuse.report import Report, found_as
from sparsex_jax.scheduler.pinning import PinRefused
from sparsex_jax.serving.evaluation import best, prompt_entries
from sparsex_jax.serving.faults import fault_of
from sparsex_jax.serving.openai import PartialAnswer, ReplyFormat
from sparsex_jax.serving.pins import pin_fields
from sparsex_jax.serving.schemas import Generate
from sparsex_jax.serving.thoughts import AnswerReader
from sparsex_jax.serving.worker import Job
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event

DONE = b"data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return f"data: {json.dumps(data)}\n\n".encode()


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a request wants to be told beside its answers.

    Attributes:
      answers: to each prompt.
      shown: how many of them are returned: the best, if those are fewer.
      usage: a stream ends with a chunk of token counts.
      running_usage: every chunk has the counts so far.
      token_ids: the ids of prompts and answers.
      prompt_logprobs: how many of the most probable tokens are told in each place of the prompts. None: nothing is.
    """

    answers: int = 1
    shown: int = 1
    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    prompt_logprobs: int | None = None

    @classmethod
    def of(cls, request: Generate) -> Extent:
        stream = request.stream_options
        usage = bool(stream and stream.include_usage)
        running = usage and bool(stream and stream.continuous_usage_stats)
        told = bool(request.return_token_ids), request.prompt_logprobs
        return cls(request.num_answers, request.n or 1, usage, running, *told)


class Reply:
    """The reply to one request, in the format of its endpoint."""

    def __init__(
        self,
        make_format: Callable[[int], ReplyFormat],
        texts: TokenText,
        model: str,
        jobs: Sequence[Job],
        pieces: Sequence[list[str]] | None,
        extent: Extent,
        make_reader: Callable[[], AnswerReader | None] = lambda: None,
    ) -> None:
        """
        Args:
          make_format: of the answer of a number.
          jobs: one for each answer; those to one prompt come together.
          pieces: the texts of each prompt's tokens, for the token map in `sparsex`. None: without a token map.
          make_reader: makes what takes an answer's text apart. None: it is only text.
        """
        self.answers = [PartialAnswer(reader=make_reader()) for _ in jobs]
        self._formats, self._texts = [make_format(number) for number in range(len(jobs))], texts
        self._format, self._jobs, self._pieces, self._extent = self._formats[0], jobs, pieces, extent
        self._head = {
            "id": f"{self._format.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> dict[str, Any]:
        """The reply, once every answer is complete. Raises the error of a request that failed."""
        async for number, event in events:
            self.answers[number].add(event)
        if any(answer.prompt_logprobs for answer in self.answers):
            return await asyncio.to_thread(self._whole)  # long prompts have many
        return self._whole()

    def _whole(self) -> dict[str, Any]:
        numbers = self._best()
        choices = [self._choice(number) | {"index": index} for index, number in enumerate(numbers)]
        body = self._head | {"object": self._format.object, "choices": choices, "usage": self.usage()}
        body |= self._of_prompt(0) if self._format.one_prompt else {}
        if len(choices) == 1:
            return body | {"sparsex": self._sparsex(numbers[0])}
        for choice, number in zip(choices, numbers, strict=True):
            choice["sparsex"] = self._sparsex(number)
        return body

    def _best(self) -> list[int]:
        """The numbers of the answers that are returned."""
        if self._extent.shown == self._extent.answers:
            return list(range(len(self.answers)))
        numbered = [(number, answer.logprobs) for number, answer in enumerate(self.answers)]
        groups = itertools.batched(numbered, self._extent.answers)
        return [number for group in groups for number in best(group, self._extent.shown)]

    def _choice(self, number: int) -> dict[str, Any]:
        answer = self.answers[number]
        answer.prompt_logprobs = self.answers[number - number % self._extent.answers].prompt_logprobs
        choice = {"index": number, "finish_reason": answer.finish_reason} | self._formats[number].choice(answer)
        choice |= self._ids(number, answer.token_ids, first=True)
        return choice if self._format.one_prompt else choice | self._scores(number)

    async def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncGenerator[bytes]:
        """The reply as server-sent events. An error before the first event is raised; a later one becomes an event."""
        begun = False
        try:
            async for number, event in events:
                for chunk in self._chunks_of(number, event):
                    begun = True
                    yield sse(chunk)
        except Exception as error:
            if not begun:
                raise
            yield sse(fault_of(error).body())
        else:
            if self._extent.usage:
                yield sse(self._chunk([], usage=self.usage()))
        yield DONE

    def _chunks_of(self, number: int, event: Event) -> list[dict[str, Any]]:
        """The chunks of an event; the first one of an answer carries its report, and the last one its pin."""
        answer = self.answers[number]
        first = answer.report is None and event.report is not None
        delta = self._formats[number].delta(event, answer.add(event))
        if not (first or event.text or event.logprobs or event.finish_reason):
            return []  # the new tokens are half a character, or special tokens
        told = answer.token_ids[answer.told :] if self._extent.token_ids else []
        answer.told += len(told)
        chunks = [
            {"index": number, "finish_reason": event.finish_reason} | delta | self._ids(number, told, first=first)
        ]
        if first and (opening := self._formats[number].opening()):
            chunks.insert(0, {"index": number, "finish_reason": None} | opening)
        bodies = [self._chunk([choice]) for choice in chunks]
        if first:
            bodies[0] |= {"sparsex": self._sparsex(number)} | (
                self._prompt_ids(number) if self._format.one_prompt else {}
            )
        elif answer.pin is not None:
            bodies[-1] |= {"sparsex": {"pin": pin_fields(answer.pin)}}
        return bodies

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self._head | {"object": self._format.chunk_object, "choices": choices}
        if self._extent.running_usage:
            usage = self.usage()
        return body | {"usage": usage} if self._extent.usage else body

    def _ids(self, number: int, token_ids: Sequence[int], *, first: bool) -> dict[str, Any]:
        """As vLLM has them: the prompt's with the first chunk of an answer."""
        if not self._extent.token_ids:
            return {}
        of_prompt = self._prompt_ids(number) if first and not self._format.one_prompt else {}
        return {"token_ids": list(token_ids)} | of_prompt

    def _of_prompt(self, number: int) -> dict[str, Any]:
        """What a whole reply says of a prompt, if it is the only one."""
        return self._prompt_ids(number) | self._scores(number)

    def _scores(self, number: int) -> dict[str, Any]:
        """The log-probabilities of a prompt's tokens, if the request asks for them as vLLM does."""
        scores, most = self.answers[number].prompt_logprobs, self._extent.prompt_logprobs
        if scores is None or most is None:
            return {}
        return {"prompt_logprobs": prompt_entries(self._texts, scores.entries(), most)}

    def _prompt_ids(self, number: int) -> dict[str, Any]:
        if not self._extent.token_ids:
            return {}
        return {"prompt_token_ids": np.asarray(self._jobs[number].prompt).tolist()}

    def usage(self) -> dict[str, Any]:
        """The token counts. `cached_tokens` are the prompt's tokens whose stored KV served: see `cached_tokens`."""
        firsts = slice(None, None, self._extent.answers)  # a prompt counts once, however many answers it has
        prompt = sum(len(job.prompt) for job in self._jobs[firsts])
        completion = sum(len(answer.token_ids) for answer in self.answers)
        cached = sum(cached_tokens(answer.report) for answer in self.answers[firsts] if answer.report)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        } | self._thought_tokens()

    def _thought_tokens(self) -> dict[str, Any]:
        readers = [answer.reader for answer in self.answers if answer.reader and answer.reader.has_thoughts]
        tokens = sum(reader.thought_tokens for reader in readers)
        return {"completion_tokens_details": {"reasoning_tokens": tokens}} if readers else {}

    def _sparsex(self, number: int) -> dict[str, Any] | None:
        report = self.answers[number].report
        if report is None:
            return None
        pieces = self._pieces[number // self._extent.answers] if self._pieces else None
        return report_fields(report, pieces, self.answers[number].pin)


def report_fields(report: Report, pieces: list[str] | None, pin: PinState | PinRefused | None = None) -> dict[str, Any]:
    """What `sparsex` says of a prompt.

    Args:
      pieces: the texts of its tokens, for the token map. None: without a token map.
      pin: what is pinned of it and its answer, or why they are not. None: that was not asked for.
    """
    told = {} if pieces is None else {"token_map": token_map(pieces, report)}
    return report.to_dict() | told | ({} if pin is None else {"pin": pin_fields(pin)})


def cached_tokens(report: Report) -> int:
    """Tokens that were found and not computed: of prefixes, reused as they are, or left out of an excerpt."""
    return report.prompt_tokens - report.recomputed_tokens - report.fresh_tokens


def token_map(pieces: list[str], report: Report) -> dict[str, Any]:
    """The texts of a prompt's tokens, with the runs of their kinds and of whether they were computed, by layers too."""
    layers = [
        {"start": each.start, "end": each.end, "computed": run_lengths(each.computed.tolist())}
        for each in report.layers
    ]
    return {
        "text": pieces,
        "kind": run_lengths(found_as(report.kind).tolist()),
        "active": run_lengths(report.active.tolist()),
        "layers": layers,
    }


def run_lengths(values: Sequence[Any]) -> list[list[Any]]:
    """The maximal runs of equal values, with their lengths.

    >>> run_lengths("aab")
    [['a', 2], ['b', 1]]
    """
    return [[value, len(list(run))] for value, run in itertools.groupby(values)]
