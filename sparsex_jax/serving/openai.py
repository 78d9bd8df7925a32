"""The forms that answers have at OpenAI's endpoints: whole, and in the chunks of a stream."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import TokenLogprobs
from sparsex_jax.serving.faults import OutOfServiceError
from sparsex_jax.serving.tools import Call, Reader
from sparsex_jax.serving.worker import WorkerError
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


@dataclasses.dataclass
class PartialAnswer:
    """The answer to one prompt, as far as it has come.

    Attributes:
      token_ids: the new tokens.
      told: how many of them chunks have named.
      report: of the prefill, which comes with the first event.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    told: int = 0
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
        self.token_ids += event.token_ids
        self.report = event.report or self.report
        self.finish_reason = event.finish_reason or self.finish_reason
        self.logprobs += event.logprobs


class ReplyFormat(Protocol):
    """The parts of a reply that differ between the endpoints. Each answer has a format of its own.

    Attributes:
      prefix: of the reply's id.
      object, chunk_object: the type of a whole reply and of a chunk.
      one_prompt: all answers are to one prompt, so that the reply has its ids, and not each choice.
    """

    prefix: str
    object: str
    chunk_object: str
    one_prompt: bool

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        """The fields of a whole answer."""

    def opening(self) -> dict[str, Any] | None:
        """The fields of a chunk that comes before the first text, or None if there is no such chunk."""

    def delta(self, event: Event) -> dict[str, Any]:
        """The fields of the next chunk."""


class ChatFormat:
    """The format of `/v1/chat/completions`."""

    prefix, object, chunk_object, one_prompt = "chatcmpl", "chat.completion", "chat.completion.chunk", True

    def __init__(
        self,
        texts: TokenText,
        logprobs: bool,
        reader: Reader | None = None,
        *,
        names_are_ids: bool = False,
        one_call: bool = False,
        is_named: bool = False,
    ) -> None:
        """
        Args:
          logprobs: whether the request asks for log-probabilities.
          reader: finds tool calls in the answer. None: the answer has none.
          one_call: the answer has the first call at most.
          is_named: the request names the function that is called, so that the answer ends with `stop`.
          names_are_ids: tokens are named `token_id:ID`, not by their text.
        """
        self._texts, self._logprobs, self._reader = texts, logprobs, reader
        self._names_are_ids, self._one_call, self._is_named = names_are_ids, one_call, is_named
        self._num_calls = 0

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        content, calls = self._read(answer.text, answer.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._entries(answer.logprobs)} | self._end(answer.finish_reason)

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, event: Event) -> dict[str, Any]:
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
        if self._one_call:
            calls = calls[: 1 - self._num_calls]
        self._num_calls += len(calls)
        return "".join(part for part in parts if isinstance(part, str)), calls

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        """The finish reason, if tool calls change it."""
        calls = self._num_calls and not self._is_named
        return {"finish_reason": "tool_calls"} if calls and finish_reason == "stop" else {}

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
            "token": f"token_id:{token}" if self._names_are_ids else self._texts.text_of(token),
            "logprob": _finite(logprob),
            "bytes": list(self._texts.bytes_of(token)),
        }


class CompletionFormat:
    """The format of `/v1/completions`."""

    prefix, object, chunk_object, one_prompt = "cmpl", "text_completion", "text_completion", False

    def __init__(self, texts: TokenText, logprobs: int | None, *, names_are_ids: bool = False) -> None:
        """
        Args:
          logprobs: how many of the most probable tokens the request asks for. None: no log-probabilities.
          names_are_ids: tokens are named `token_id:ID`, not by their text.
        """
        self._texts, self._logprobs, self._names_are_ids = texts, logprobs, names_are_ids
        self._offset = 0  # characters of the tokens that were told

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": self._arrays(answer.logprobs)}

    def opening(self) -> None:
        return None

    def delta(self, event: Event) -> dict[str, Any]:
        return {"text": event.text, "logprobs": self._arrays(event.logprobs)}

    def _arrays(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """OpenAI's arrays over the next tokens."""
        if self._logprobs is None:
            return None
        lengths = [len(self._texts.text_of(token.token_id)) for token in logprobs]
        *offsets, self._offset = itertools.accumulate(lengths, initial=self._offset)
        return {
            "tokens": [self._name(token.token_id) for token in logprobs],
            "token_logprobs": [_finite(token.logprob) for token in logprobs],
            "top_logprobs": [self._top(token) for token in logprobs] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and the sampled one where it is not among them."""
        return {
            self._name(token_id): _finite(value) for token_id, value in (*token.top, (token.token_id, token.logprob))
        }

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._names_are_ids else self._texts.name_of(token)


def _finite(logprob: float) -> float:
    """A log-probability that JSON can hold: like OpenAI, -9999 in place of minus infinity."""
    return max(float(logprob), -9999.0)
