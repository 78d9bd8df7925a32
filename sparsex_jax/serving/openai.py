"""Turns the loop's events into OpenAI's objects: a whole reply, or the chunks of a stream."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sparsex_jax.reuse.report import Report, found_as
from sparsex_jax.scheduler.output import TokenLogprobs
from sparsex_jax.serving.faults import OutOfServiceError, fault_of
from sparsex_jax.serving.tools import Call, Reader
from sparsex_jax.serving.worker import Job, WorkerError
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event

DONE = b"data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return f"data: {json.dumps(data)}\n\n".encode()


@dataclasses.dataclass
class PartialAnswer:
    """The answer to one prompt, as far as it has come.

    Attributes:
      tokens: the number of new tokens.
      report: of the prefill, which comes with the first event.
    """

    text: str = ""
    tokens: int = 0
    report: Report | None = None
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> None:
        """Append an event. Raises the error if the request failed or was cancelled."""
        if event.error is not None:
            raise event.error
        if event.finish_reason == "error":
            raise WorkerError("the request failed")
        if event.finish_reason == "cancelled":  # by the server: after a client disconnects, nothing reads its events
            raise OutOfServiceError("the server is shutting down and gave this request up")
        self.text += event.text
        self.tokens += len(event.token_ids)
        self.report = event.report or self.report
        self.finish_reason = event.finish_reason or self.finish_reason
        self.logprobs += event.logprobs


class ReplyFormat(Protocol):
    """The parts of a reply that differ between the endpoints.

    Attributes:
      prefix: of the reply's id.
      object, chunk_object: the type of a whole reply and of a chunk.
    """

    prefix: str
    object: str
    chunk_object: str

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        """The fields of a whole answer."""

    def opening(self) -> dict[str, Any] | None:
        """The fields of a chunk that comes before the first text, or None if there is no such chunk."""

    def delta(self, event: Event, before: PartialAnswer) -> dict[str, Any]:
        """The fields of the next chunk. `before` is the answer up to it."""


class ChatFormat:
    """The format of `/v1/chat/completions`."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenText, logprobs: bool, reader: Reader | None = None) -> None:
        """
        Args:
          logprobs: whether the request asks for log-probabilities.
          reader: finds tool calls in the answer. None: the answer has none.
        """
        self._texts, self._logprobs, self._reader = texts, logprobs, reader
        self._num_calls = 0

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        content, calls = self._read(answer.text, answer.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._entries(answer.logprobs)} | self._end(answer.finish_reason)

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, event: Event, before: PartialAnswer) -> dict[str, Any]:
        first = self._num_calls
        content, calls = self._read(event.text, event.finish_reason)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(calls, start=first)]
        return {"delta": delta, "logprobs": self._entries(event.logprobs)} | self._end(event.finish_reason)

    def _read(self, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]]]:
        """Separate text from tool calls in the next piece of the answer. With a finish reason, it is the last piece."""
        if self._reader is None:
            return text, []
        parts = self._reader.push(text) + (self._reader.finish() if finish_reason else [])
        calls = [part.to_dict() for part in parts if isinstance(part, Call)]
        self._num_calls += len(calls)
        return "".join(part for part in parts if isinstance(part, str)), calls

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        """The finish reason, if tool calls change it."""
        return {"finish_reason": "tool_calls"} if self._num_calls and finish_reason == "stop" else {}

    def _entries(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top]}
            for token in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.text_of(token),
            "logprob": _finite(logprob),
            "bytes": list(self._texts.bytes_of(token)),
        }


class CompletionFormat:
    """The format of `/v1/completions`."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenText, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": self._arrays(answer.logprobs, ())}

    def opening(self) -> None:
        return None

    def delta(self, event: Event, before: PartialAnswer) -> dict[str, Any]:
        return {"text": event.text, "logprobs": self._arrays(event.logprobs, before.logprobs)}

    def _arrays(self, logprobs: Sequence[TokenLogprobs], before: Iterable[TokenLogprobs]) -> dict[str, Any] | None:
        """OpenAI's arrays over tokens. `before` has the tokens of earlier chunks, whose text the offsets count."""
        if not self._logprobs:
            return None
        name, start = self._texts.name_of, sum(len(self._texts.text_of(token.token_id)) for token in before)
        lengths = [len(self._texts.text_of(token.token_id)) for token in logprobs]
        return {
            "tokens": [name(token.token_id) for token in logprobs],
            "token_logprobs": [_finite(token.logprob) for token in logprobs],
            "top_logprobs": [{name(token_id): _finite(value) for token_id, value in t.top} for t in logprobs],
            "text_offset": list(itertools.accumulate(lengths, initial=start))[:-1],
        }


class Reply:
    """The reply to one request, in the format of its endpoint."""

    def __init__(
        self,
        reply_format: ReplyFormat,
        model: str,
        jobs: Sequence[Job],
        pieces: Sequence[list[str]] | None,
        *,
        usage: bool,
    ) -> None:
        """
        Args:
          pieces: the texts of each prompt's tokens, for the token map in `sparsex`. None: without a token map.
          usage: whether a stream ends with a chunk of token counts.
        """
        self.answers = [PartialAnswer() for _ in jobs]
        self._format, self._jobs, self._pieces, self._usage = reply_format, jobs, pieces, usage
        self._head = {
            "id": f"{reply_format.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> dict[str, Any]:
        """The reply, once every answer is complete. Raises the error of a request that failed."""
        async for number, event in events:
            self.answers[number].add(event)
        reports = [self._sparsex(number) for number in range(len(self._jobs))]
        choices = [
            {"index": number, "finish_reason": answer.finish_reason} | self._format.choice(answer)
            for number, answer in enumerate(self.answers)
        ]
        body = self._head | {"object": self._format.object, "choices": choices, "usage": self.usage()}
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
            if self._usage:
                yield sse(self._chunk([], usage=self.usage()))
        yield DONE

    def _chunks_of(self, number: int, event: Event) -> list[dict[str, Any]]:
        """The chunks of an event; the first one of a prompt carries its report."""
        answer = self.answers[number]
        first = answer.report is None and event.report is not None
        delta = self._format.delta(event, answer)
        answer.add(event)
        if not (first or event.text or event.logprobs or event.finish_reason):
            return []  # the new tokens are half a character, or special tokens
        chunks = [{"index": number, "finish_reason": event.finish_reason} | delta]
        if first and (opening := self._format.opening()):
            chunks.insert(0, {"index": number, "finish_reason": None} | opening)
        bodies = [self._chunk([choice]) for choice in chunks]
        if first:
            bodies[0]["sparsex"] = self._sparsex(number)
        return bodies

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self._head | {"object": self._format.chunk_object, "choices": choices}
        return body | {"usage": usage} if self._usage else body

    def usage(self) -> dict[str, Any]:
        """The token counts. `cached_tokens` are the prompt's tokens whose stored KV served: see `cached_tokens`."""
        prompt = sum(len(job.prompt) for job in self._jobs)
        completion = sum(answer.tokens for answer in self.answers)
        cached = sum(cached_tokens(answer.report) for answer in self.answers if answer.report)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _sparsex(self, number: int) -> dict[str, Any] | None:
        report = self.answers[number].report
        if report is None:
            return None
        fields = report.to_dict()
        if self._pieces is not None:
            fields["token_map"] = token_map(self._pieces[number], report)
        return fields


def cached_tokens(report: Report) -> int:
    """Tokens whose KV is the stored one: of prefixes, exact or approximate, and those reused and not recomputed."""
    return report.prefix_tokens + report.approximate_prefix_tokens + report.reused_tokens


def token_map(pieces: list[str], report: Report) -> dict[str, Any]:
    """The texts of a prompt's tokens, with the runs of their kinds and of whether they were computed."""
    return {
        "text": pieces,
        "kind": run_lengths(found_as(report.kind).tolist()),
        "active": run_lengths(report.active.tolist()),
    }


def run_lengths(values: Sequence[Any]) -> list[list[Any]]:
    """The maximal runs of equal values, with their lengths.

    >>> run_lengths("aab")
    [['a', 2], ['b', 1]]
    """
    return [[value, len(list(run))] for value, run in itertools.groupby(values)]


def _finite(logprob: float) -> float:
    """A log-probability that JSON can hold: like OpenAI, -9999 in place of minus infinity."""
    return max(float(logprob), -9999.0)
