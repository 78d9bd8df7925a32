"""The forms that answers have at OpenAI's endpoints: whole, and in the chunks of a stream."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sparsex_jax.cache import PinState
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import TokenLogprobs
from sparsex_jax.scheduler.pinning import PinRefused
from sparsex_jax.scheduler.prompt_logprobs import PromptLogprobs
from sparsex_jax.serving.evaluation import Echo, finite
from sparsex_jax.serving.faults import OutOfServiceError
from sparsex_jax.serving.thoughts import AnswerReader, Part, Thought
from sparsex_jax.serving.tools import Call
from sparsex_jax.serving.worker import WorkerError
from sparsex_jax.text.thoughts import FIELDS
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


@dataclasses.dataclass
class PartialAnswer:
    """The answer to one prompt, as far as it has come.

    Attributes:
      token_ids: the new tokens.
      told: how many of them chunks have named.
      reader: takes the text apart. None: it is only text.
      parts: of the text, where there is a reader.
      report: of the prefill, which comes with the first event.
      prompt_logprobs: of the prompt's tokens, where they were asked for; with the first event too.
      pin: what is pinned, or why it is not, with the last event. None: that was not asked for.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    told: int = 0
    report: Report | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    stopped_by: str | None = None
    pin: PinState | PinRefused | None = None
    reader: AnswerReader | None = None
    parts: list[Part] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> list[Part]:
        """Append an event, and return its parts. Raises the error if the request failed or was cancelled."""
        if event.error is not None:
            raise event.error
        if event.finish_reason == "error":
            raise WorkerError("the request failed")
        if event.finish_reason == "cancelled":  # by the server: after a client disconnects, nothing reads its events
            raise OutOfServiceError("the server is shutting down and gave this request up")
        self.text += event.text
        self.token_ids += event.token_ids
        self.report = event.report or self.report
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = event.finish_reason or self.finish_reason
        self.logprobs += event.logprobs
        self.stopped_by, self.pin = event.stopped_by, event.pin
        new = [] if self.reader is None else self.reader.read(event)
        self.parts += new
        return new


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

    def delta(self, event: Event, parts: Sequence[Part]) -> dict[str, Any]:
        """The fields of the next chunk. Its parts are those of the event's text, where there is a reader."""


class ChatFormat:
    """The format of `/v1/chat/completions`."""

    prefix, object, chunk_object, one_prompt = "chatcmpl", "chat.completion", "chat.completion.chunk", True

    def __init__(
        self,
        texts: TokenText,
        logprobs: bool,
        *,
        names_are_ids: bool = False,
        is_named: bool = False,
    ) -> None:
        """
        Args:
          logprobs: whether the request asks for log-probabilities.
          names_are_ids: tokens are named `token_id:ID`, not by their text.
          is_named: the request names the function that is called, so that the answer ends with `stop`.
        """
        self._texts, self._logprobs, self._names_are_ids = texts, logprobs, names_are_ids
        self._is_named = is_named
        self._num_calls = 0

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        content, thought, calls = _sorted(answer.parts)
        self._num_calls = len(calls)
        nothing = None if calls or thought else content
        message: dict[str, Any] = {"role": "assistant", "content": content or nothing, "refusal": None}
        message |= _told(thought) | ({"tool_calls": [call.to_dict() for call in calls]} if calls else {})
        return {"message": message, "logprobs": self._entries(answer.logprobs)} | self._end(answer.finish_reason)

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, event: Event, parts: Sequence[Part]) -> dict[str, Any]:
        content, thought, calls = _sorted(parts)
        delta: dict[str, Any] = ({"content": content} if content else {}) | _told(thought)
        if calls:
            delta["tool_calls"] = [
                {"index": index} | call.to_dict() for index, call in enumerate(calls, start=self._num_calls)
            ]
        self._num_calls += len(calls)
        return {"delta": delta, "logprobs": self._entries(event.logprobs)} | self._end(event.finish_reason)

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        """The finish reason, if tool calls change it."""
        calls = self._num_calls and not self._is_named
        return {"finish_reason": "tool_calls"} if calls and finish_reason == "stop" else {}

    def _entries(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = [token_entry(self._texts, token, names_are_ids=self._names_are_ids) for token in logprobs]
        return {"content": entries, "refusal": None}


class CompletionFormat:
    """The format of `/v1/completions`."""

    prefix, object, chunk_object, one_prompt = "cmpl", "text_completion", "text_completion", False

    def __init__(
        self, texts: TokenText, logprobs: int | None, *, names_are_ids: bool = False, echo: Echo | None = None
    ) -> None:
        """
        Args:
          logprobs: how many of the most probable tokens the request asks for. None: no log-probabilities.
          names_are_ids: tokens are named `token_id:ID`, not by their text.
          echo: the prompt, which stands before the answer. None: it does not.
        """
        self._texts, self._logprobs, self._names_are_ids = texts, logprobs, names_are_ids
        self._echo = echo  # until it is told
        self._offset = len(echo.text) if echo else 0  # characters of the tokens that were told

    def choice(self, answer: PartialAnswer) -> dict[str, Any]:
        return self._fields(answer.text, answer.logprobs, answer.prompt_logprobs)

    def opening(self) -> None:
        return None

    def delta(self, event: Event, parts: Sequence[Part]) -> dict[str, Any]:
        return self._fields(event.text, event.logprobs, event.prompt_logprobs)

    def _fields(self, text: str, logprobs: Sequence[TokenLogprobs], of_prompt: PromptLogprobs | None) -> dict[str, Any]:
        """Text and arrays, behind those of the prompt where they are the first."""
        echo, self._echo = self._echo, None
        if echo is None:
            return {"text": text, "logprobs": self._arrays(logprobs)}
        return {"text": echo.text + text, "logprobs": self._arrays(logprobs, echo, of_prompt)}

    def _arrays(
        self, logprobs: Sequence[TokenLogprobs], echo: Echo | None = None, of_prompt: PromptLogprobs | None = None
    ) -> dict[str, Any] | None:
        """OpenAI's arrays over the next tokens."""
        if self._logprobs is None:
            return None
        lengths = [len(self._texts.text_of(token.token_id)) for token in logprobs]
        *offsets, self._offset = itertools.accumulate(lengths, initial=self._offset)
        prompt, ids = (of_prompt.entries(), of_prompt.tokens.tolist()) if echo and of_prompt else ((), [])
        tokens = [*prompt, *logprobs]
        return {
            "tokens": [self._name(token) for token in (*ids, *(each.token_id for each in logprobs))],
            "token_logprobs": [token and finite(token.logprob) for token in tokens],
            "top_logprobs": [token and self._top(token) for token in tokens] if self._logprobs else None,
            "text_offset": [*(echo.offsets if echo else ()), *offsets],
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and the token that is there where it is not among them."""
        top = (*token.top[: self._logprobs], (token.token_id, token.logprob))
        return {self._name(token_id): finite(value) for token_id, value in top}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._names_are_ids else self._texts.name_of(token)


def token_entry(texts: TokenText, token: TokenLogprobs, *, names_are_ids: bool = False) -> dict[str, Any]:
    """What a chat says of a token and its log-probability.

    Args:
      names_are_ids: tokens are named `token_id:ID`, not by their text.
    """

    def entry(id_: int, logprob: float) -> dict[str, Any]:
        name = f"token_id:{id_}" if names_are_ids else texts.text_of(id_)
        return {"token": name, "logprob": finite(logprob), "bytes": list(texts.bytes_of(id_))}

    return entry(token.token_id, token.logprob) | {"top_logprobs": [entry(id_, value) for id_, value in token.top]}


def _sorted(parts: Sequence[Part]) -> tuple[str, str, list[Call]]:
    """Text, thought and calls."""
    text = "".join(part for part in parts if isinstance(part, str))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    return text, thought, [part for part in parts if isinstance(part, Call)]


def _told(thought: str) -> dict[str, str]:
    """A thought under DeepSeek's name, which most clients read, and under vLLM's newer one."""
    return dict.fromkeys(FIELDS, thought) if thought else {}
