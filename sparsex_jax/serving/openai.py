"""From the loop's events to OpenAI's objects: one answer, or chunks of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sparsex_jax.device.generation import TokenLogprobs
from sparsex_jax.reuse.report import Report
from sparsex_jax.serving.faults import OutOfServiceError, fault_of
from sparsex_jax.serving.metrics import tokens_by_kind
from sparsex_jax.serving.tools import Call, Reader
from sparsex_jax.serving.worker import Job, WorkerError
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event

DONE = b"data: [DONE]\n\n"
_KIND_NAMES = np.array(["prefix", "reused", "fresh"])


def sse(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


@dataclasses.dataclass
class Answer:
    """What has come for one prompt so far."""

    text: str = ""
    tokens: int = 0
    report: Report | None = None
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> None:
        """Raises what the loop says went wrong."""
        if event.error is not None:
            raise event.error
        if event.finish_reason == "error":
            raise WorkerError("the request failed")
        if event.finish_reason == "cancelled":  # and not by the client, who would not be there to hear
            raise OutOfServiceError("the server is shutting down and gave this request up")
        self.text += event.text
        self.tokens += len(event.token_ids)
        self.report = event.report or self.report
        self.finish_reason = event.finish_reason or self.finish_reason
        self.logprobs += event.logprobs


class Shape(Protocol):
    """How an endpoint's objects differ from another's."""

    prefix: str
    object: str
    chunk_object: str

    def choice(self, answer: Answer) -> dict[str, Any]:
        """The whole answer."""

    def opening(self) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text."""

    def delta(self, event: Event, before: Answer) -> dict[str, Any]:
        """The next bit of it, behind what was said before."""


class ChatShape:
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenText, logprobs: bool, reader: Reader | None = None) -> None:
        """
        Args:
          reader: of the one answer, where the model may call tools.
        """
        self._texts, self._logprobs, self._reader = texts, logprobs, reader
        self._num_calls = 0

    def choice(self, answer: Answer) -> dict[str, Any]:
        content, calls = self._read(answer.text, answer.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._entries(answer.logprobs)} | self._end(answer.finish_reason)

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, event: Event, before: Answer) -> dict[str, Any]:
        first = self._num_calls
        content, calls = self._read(event.text, event.finish_reason)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(calls, start=first)]
        return {"delta": delta, "logprobs": self._entries(event.logprobs)} | self._end(event.finish_reason)

    def _read(self, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]]]:
        """What is text and what are calls in the next bit of the answer, which ends where there is a finish reason."""
        if self._reader is None:
            return text, []
        parts = self._reader.push(text) + (self._reader.finish() if finish_reason else [])
        calls = [part.to_dict() for part in parts if isinstance(part, Call)]
        self._num_calls += len(calls)
        return "".join(part for part in parts if isinstance(part, str)), calls

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        """The finish reason, where calls make it another than the loop's."""
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


class CompletionShape:
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenText, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": self._arrays(answer.logprobs, ())}

    def opening(self) -> None:
        return None

    def delta(self, event: Event, before: Answer) -> dict[str, Any]:
        return {"text": event.text, "logprobs": self._arrays(event.logprobs, before.logprobs)}

    def _arrays(self, logprobs: Sequence[TokenLogprobs], before: Iterable[TokenLogprobs]) -> dict[str, Any] | None:
        """Arrays over tokens; `before` are those that an earlier chunk had, whose text the offsets count."""
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
    """A request's answer, in the shape of its endpoint."""

    def __init__(
        self, shape: Shape, model: str, jobs: Sequence[Job], pieces: Sequence[list[str]] | None, *, usage: bool
    ) -> None:
        """
        Args:
          pieces: the texts of the prompts' tokens, for `sparsex` to say what each of them was; None: it does not.
          usage: end a stream with a chunk of it.
        """
        self.answers = [Answer() for _ in jobs]
        self._shape, self._jobs, self._pieces, self._usage = shape, jobs, pieces, usage
        self._head = {"id": f"{shape.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> dict[str, Any]:
        """The answer once it is complete. Raises what went wrong."""
        async for number, event in events:
            self.answers[number].add(event)
        reports = [self._sparsex(number) for number in range(len(self._jobs))]
        choices = [
            {"index": number, "finish_reason": answer.finish_reason} | self._shape.choice(answer)
            for number, answer in enumerate(self.answers)
        ]
        body = self._head | {"object": self._shape.object, "choices": choices, "usage": self.usage()}
        if len(choices) == 1:
            return body | {"sparsex": reports[0]}
        for choice, report in zip(choices, reports, strict=True):
            choice["sparsex"] = report
        return body

    async def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncGenerator[bytes]:
        """The answer as server-sent events. Raises what goes wrong before the first; later errors are events."""
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
        delta = self._shape.delta(event, answer)
        answer.add(event)
        if not (first or event.text or event.logprobs or event.finish_reason):
            return []  # half a character, or special tokens
        chunks = [{"index": number, "finish_reason": event.finish_reason} | delta]
        if first and (opening := self._shape.opening()):
            chunks.insert(0, {"index": number, "finish_reason": None} | opening)
        bodies = [self._chunk([choice]) for choice in chunks]
        if first:
            bodies[0]["sparsex"] = self._sparsex(number)
        return bodies

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self._head | {"object": self._shape.chunk_object, "choices": choices}
        return body | {"usage": usage} if self._usage else body

    def usage(self) -> dict[str, Any]:
        """`cached_tokens` are those whose stored KV was used to the last layer: the prefix, and what was reused and
        not recomputed."""
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
    kinds = tokens_by_kind(report)
    return kinds["prefix"] + kinds["reused"]


def token_map(pieces: list[str], report: Report) -> dict[str, Any]:
    """What each token of a prompt was: its text, and runs of kinds and of whether they were computed."""
    return {
        "text": pieces,
        "kind": run_lengths(_KIND_NAMES[report.kind].tolist()),
        "active": run_lengths(report.active.tolist()),
    }


def run_lengths(values: Sequence[Any]) -> list[list[Any]]:
    """Maximal runs of equal values.

    >>> run_lengths("aab")
    [['a', 2], ['b', 1]]
    """
    return [[value, len(list(run))] for value, run in itertools.groupby(values)]


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is next to impossible."""
    return max(float(logprob), -9999.0)
