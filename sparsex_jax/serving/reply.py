"""Makes a reply of the loop's events: a whole one, or the chunks of a stream."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsex_jax.reuse.report import Report, found_as
from sparsex_jax.serving.faults import fault_of
from sparsex_jax.serving.openai import PartialAnswer, ReplyFormat
from sparsex_jax.serving.schemas import Generate
from sparsex_jax.serving.thoughts import AnswerReader
from sparsex_jax.serving.worker import Job

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
      usage: a stream ends with a chunk of token counts.
      running_usage: every chunk has the counts so far.
      token_ids: the ids of prompts and answers.
    """

    answers: int = 1
    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False

    @classmethod
    def of(cls, request: Generate) -> Extent:
        stream = request.stream_options
        usage = bool(stream and stream.include_usage)
        running = usage and bool(stream and stream.continuous_usage_stats)
        return cls(request.n or 1, usage, running, bool(request.return_token_ids))


class Reply:
    """The reply to one request, in the format of its endpoint."""

    def __init__(
        self,
        make_format: Callable[[], ReplyFormat],
        model: str,
        jobs: Sequence[Job],
        pieces: Sequence[list[str]] | None,
        extent: Extent,
        make_reader: Callable[[], AnswerReader | None] = lambda: None,
    ) -> None:
        """
        Args:
          jobs: one for each answer; those to one prompt come together.
          pieces: the texts of each prompt's tokens, for the token map in `sparsex`. None: without a token map.
          make_reader: makes what takes an answer's text apart. None: it is only text.
        """
        self.answers = [PartialAnswer(reader=make_reader()) for _ in jobs]
        self._formats = [make_format() for _ in jobs]
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
        reports = [self._sparsex(number) for number in range(len(self._jobs))]
        choices = [
            {"index": number, "finish_reason": answer.finish_reason}
            | self._formats[number].choice(answer)
            | self._ids(number, answer.token_ids, first=True)
            for number, answer in enumerate(self.answers)
        ]
        body = self._head | {"object": self._format.object, "choices": choices, "usage": self.usage()}
        body |= self._prompt_ids(0) if self._format.one_prompt else {}
        if len(choices) == 1:
            return body | {"sparsex": reports[0]}
        for choice, report in zip(choices, reports, strict=True):
            choice["sparsex"] = report
        return body

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
        """The chunks of an event; the first one of an answer carries its report."""
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
        return report_fields(report, self._pieces[number // self._extent.answers] if self._pieces else None)


def report_fields(report: Report, pieces: list[str] | None) -> dict[str, Any]:
    """What `sparsex` says of a prompt.

    Args:
      pieces: the texts of its tokens, for the token map. None: without a token map.
    """
    return report.to_dict() | ({} if pieces is None else {"token_map": token_map(pieces, report)})


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
