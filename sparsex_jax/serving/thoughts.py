"""Takes thoughts, text and tool calls of an answer apart while it comes.

White space around a thought is dropped, as is a mark that is repeated at the beginning of an open thought. A thought
whose end mark is missing goes on to the end of the answer. A call in it counts if the end mark does not follow: models
forget the mark, and they also write down calls that they only consider.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsex_jax.config import Behind
from sparsex_jax.serving.tools import Call, Reader
from sparsex_jax.text.thoughts import ThoughtForm
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


@dataclasses.dataclass(frozen=True)
class Thought:
    """A piece of what the model thought."""

    text: str


Part = str | Call | Thought  # of an answer


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How the answers to a prompt think.

    Attributes:
      is_open: they begin within a thought.
      behind: the thought that may stand before what an answer must be; None: there is none before such answers.
    """

    form: ThoughtForm
    is_open: bool
    behind: Behind | None = None


class _Stage(enum.Enum):
    BEGIN = enum.auto()  # a mark may come
    THOUGHT = enum.auto()
    ANSWER = enum.auto()


class ThoughtReader:
    """Separates the thought from the answer, and the calls from both. It holds back what may be part of a mark.

    Attributes:
      thought_bytes: UTF-8 bytes of the thought so far, with its marks.
      bytes_behind: of the text that came together with the end mark, and stands behind it.
      is_thinking: the thought has begun, and its end is not seen yet.
      is_over: the thought has ended, or there is none.
      ended_in_call: the thought had no end mark, and ended where a call began.
    """

    def __init__(self, thinking: Thinking, make_reader: Callable[[], Reader | None]) -> None:
        """
        Args:
          make_reader: makes a reader of calls, where there can be any.
        """
        self._form, self._is_open = thinking.form, thinking.is_open
        self._answer, self._within = make_reader(), make_reader()
        self._stage = _Stage.BEGIN
        self._held, self._cut = "", False
        self._looked = self._fed = 0  # characters of what is held that were searched, and that `_within` got
        self._ending: list[str | Call] = []  # the answer, if the thought never ends: its first call, and all behind it
        self._space: str | None = None  # at the end of the thought so far; None where it has no text yet
        self._strips = False  # the answer has no text yet, and a thought comes before it
        self.thought_bytes = self.bytes_behind = 0
        self.ended_in_call = False

    @property
    def is_thinking(self) -> bool:
        return self._stage is _Stage.THOUGHT

    @property
    def is_over(self) -> bool:
        return self._stage is _Stage.ANSWER

    def push(self, text: str) -> list[Part]:
        """Add new text, and return the parts that later text cannot change. A call is returned as a whole."""
        self._held += text
        return self._advance(ended=False)

    def finish(self, *, cut: bool = False) -> list[Part]:
        """Return what was held back. The answer has ended. Argument as of `Reader.finish`."""
        self._cut = cut
        return self._advance(ended=True)

    def _advance(self, *, ended: bool) -> list[Part]:
        parts: list[Part] = []
        if self._stage is _Stage.BEGIN:
            self._begin(ended)
        if self._stage is _Stage.THOUGHT:
            parts += self._think(ended)
        if self._stage is _Stage.ANSWER:
            parts += self._read_answer(ended)
        return parts

    def _begin(self, ended: bool) -> None:
        begun, mark = self._held.lstrip(), self._form.begin
        if mark.startswith(begun) and begun != mark and not ended:
            return
        marked = begun.startswith(mark)
        if marked:
            self._take(len(self._held) - len(begun) + len(mark))
        self._stage = _Stage.THOUGHT if marked or self._is_open else _Stage.ANSWER

    def _think(self, ended: bool) -> list[Part]:
        at = self._held.find(self._form.end, self._looked)
        if at >= 0:
            thought = self._take(at + len(self._form.end))[:at]
            self._stage, self._strips = _Stage.ANSWER, True
            self.bytes_behind = _num_bytes(self._held)
            return self._tell(thought)  # what looked like a call in it is thought too
        certain = len(self._held) - (0 if ended else _begun(self._held, self._form.end))
        self._looked = certain
        return self._tell(self._take(certain)) if self._within is None else self._watch(self._within, certain, ended)

    def _watch(self, within: Reader, certain: int, ended: bool) -> list[Part]:
        """Tell the thought up to the first place where a call may begin."""
        parts = within.push(self._held[self._fed : certain]) + (within.finish(cut=self._cut) if ended else [])
        self._fed = certain
        thoughts: list[Part] = []
        if not self._ending:
            first = next((number for number, part in enumerate(parts) if isinstance(part, Call)), len(parts))
            length = sum(len(part) for part in parts[:first] if isinstance(part, str))
            thoughts, parts = self._tell(self._take(length)), parts[first:]
        self._ending += parts
        if not (ended and self._ending):
            return thoughts
        self._held, self._stage, self.ended_in_call = "", _Stage.ANSWER, True
        return thoughts + self._ending

    def _take(self, length: int) -> str:
        """Cut the next part of the thought off what is held."""
        text, self._held = self._held[:length], self._held[length:]
        self._looked, self._fed = max(self._looked - length, 0), max(self._fed - length, 0)
        self.thought_bytes += _num_bytes(text)
        return text

    def _tell(self, text: str) -> list[Part]:
        text = text.lstrip() if self._space is None else self._space + text
        told = text.rstrip()
        if told:
            self._space = ""
        if self._space is not None:
            self._space = text[len(told) :]
        return [Thought(told)] if told else []

    def _read_answer(self, ended: bool) -> list[Part]:
        text, self._held = self._held.lstrip() if self._strips else self._held, ""
        self._strips = self._strips and not text
        if self._answer is None:
            return [text] if text else []
        return [*self._answer.push(text), *(self._answer.finish(cut=self._cut) if ended else [])]


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


class AnswerReader:
    """Reads one answer's events.

    Attributes:
      thought_tokens: tokens of the thought so far, with its marks.
    """

    def __init__(
        self,
        texts: TokenText,
        thinking: Thinking | None,
        make_reader: Callable[[], Reader | None],
        *,
        one_call: bool = False,
        only_calls: bool = False,
        tells_thoughts: bool = True,
    ) -> None:
        """
        Args:
          thinking: None: thoughts are not taken apart.
          make_reader: makes a reader of calls, where there can be any.
          one_call: the answer has the first call at most.
          only_calls: the answer has no text. What it has of a call that was cut is dropped.
          tells_thoughts: thoughts are returned, and not dropped.
        """
        self._texts, self._tells_thoughts, self._only_calls = texts, tells_thoughts, only_calls
        self._most_calls = 1 if one_call else None
        self._thoughts = None if thinking is None else ThoughtReader(thinking, make_reader)
        self._reader = self._thoughts or make_reader()
        self._num_calls = 0
        self._ids: list[int] = []
        self.thought_tokens = 0

    @property
    def has_thoughts(self) -> bool:
        """Whether thoughts are taken apart."""
        return self._thoughts is not None

    def read(self, event: Event) -> list[Part]:
        """The next parts of the answer. With a finish reason, the event is the last one."""
        was_over = self._thoughts is not None and self._thoughts.is_over
        parts = self._parts(event)
        if self._thoughts is not None and not was_over:
            self._count(self._thoughts, event)
        return [part for part in parts if self._keeps(part)]

    def _parts(self, event: Event) -> list[Part]:
        if self._reader is None:
            return [event.text] if event.text else []
        parts: list[Part] = [*self._reader.push(event.text)]
        if event.finish_reason is None:
            return parts
        was_cut = event.finish_reason == "length" or event.stopped_by is not None
        return [*parts, *self._reader.finish(cut=was_cut)]

    def _keeps(self, part: Part) -> bool:
        if isinstance(part, Call):
            self._num_calls += 1
            return self._most_calls is None or self._num_calls <= self._most_calls
        return self._tells_thoughts if isinstance(part, Thought) else not self._only_calls

    def _count(self, thoughts: ThoughtReader, event: Event) -> None:
        """Count an event's tokens. Where the thought ends within their text, those that begin before its end count."""
        self._ids += event.token_ids
        if thoughts.ended_in_call:
            self.thought_tokens = self._num_within(thoughts.thought_bytes, self._ids)
        elif thoughts.is_thinking:
            self.thought_tokens += len(event.token_ids)
        elif thoughts.thought_bytes:
            within = _num_bytes(event.text) - thoughts.bytes_behind
            self.thought_tokens += self._num_within(within, event.token_ids)

    def _num_within(self, num_bytes: int, ids: Sequence[int]) -> int:
        """How many of these tokens begin within so many bytes."""
        starts = itertools.accumulate((len(self._texts.bytes_of(id_)) for id_ in ids), initial=0)
        return sum(start < num_bytes for start, _ in zip(starts, ids, strict=False))
