"""Separates text from calls while an answer comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsex_jax.serving.tools.calls import Call, Form, Found, NotACallError, Tools, skip_space

Part = str | Call


class Reader(Protocol):
    """Separates text from calls while an answer comes. `push` and `finish` together return all parts, in order."""

    def push(self, text: str) -> list[Part]:
        """Add new text, and return the parts that later text cannot change. A call is returned as a whole."""

    def finish(self, *, cut: bool = False) -> list[Part]:
        """Return the text that was held back. The answer has ended.

        Args:
          cut: the model had not ended it. What there is of a call, or of its mark, is left out.
        """


class CallReader:
    """Reads calls of several forms. White space before and behind a call is dropped.

    Text is held back from the first place on where a call may begin. Whether one does is asked again with each piece:

        "I ask.\\n\\n<tool_"     "I ask." is returned, and the rest held
        "call>{"                 held
        "}</tool_call>\\n"       the call is returned, and the white space around it dropped
    """

    def __init__(self, forms: Sequence[Form], tools: Tools) -> None:
        """
        Args:
          forms: where several of them begin at one place, the first that reads a call there counts.
        """
        self._forms, self._tools = forms, tools
        self._held = ""
        self._look_again_at = 0
        self._is_first = True  # nothing was returned, and nothing but white space was dropped
        self._follows_call = False

    def push(self, text: str) -> list[Part]:
        self._held += text
        # A long call is not read again for each of its characters.
        if len(self._held) < self._look_again_at and not any(closing in text for closing in "]}>"):
            return []
        return self._take(ended=False)

    def finish(self, *, cut: bool = False) -> list[Part]:
        return self._take(ended=True, cut=cut)

    def _take(self, *, ended: bool, cut: bool = False) -> list[Part]:
        parts: list[Part] = []
        self._look_again_at = at = 0
        self._drop_space_behind_call()
        while (begin := self._next_marker(at)) is not None:
            try:
                found = self._read(begin, ended=ended and not (cut and self._is_surely_a_call(begin)))
            except NotACallError:
                at = begin + 1  # the marker is text; another may follow
                continue
            if found is None and cut:
                return parts + self._release(len(self._held[:begin].rstrip())) + self._whole_calls(begin)
            if found is None:
                length = len(self._held) - begin
                self._look_again_at = length + length // 16
                return parts + self._release(len(self._held[:begin].rstrip()))
            parts, at = parts + self._calls(begin, found), 0
        keeps_all = ended and not (cut and self._ends_in_marker(at))
        return parts + self._release(len(self._held) if keeps_all else self._certain(at))

    def _calls(self, begin: int, found: Found) -> list[Part]:
        """The text before the calls at a place, and the calls."""
        rest = self._held[begin + found.end :]
        parts = [*self._release(len(self._held[:begin].rstrip())), *found.calls]
        self._held, self._follows_call, self._is_first = rest, True, False
        self._drop_space_behind_call()
        return parts

    def _drop_space_behind_call(self) -> None:
        if self._follows_call:
            self._held = self._held.lstrip()

    def _next_marker(self, start: int) -> int | None:
        """Where a call may begin, from `start` on."""
        places = [self._place(form, start) for form in self._forms]
        return min((place for place in places if place is not None), default=None)

    def _place(self, form: Form, start: int) -> int | None:
        if form.only_first:
            at = skip_space(self._held, 0)
            return at if self._is_first and at >= start and self._held.startswith(form.marker, at) else None
        at = self._held.find(form.marker, start)
        return at if at >= 0 else None

    def _read(self, begin: int, *, ended: bool) -> Found | None:
        """The calls at a place. None: what comes next decides. Raises NotACallError if there are none."""
        text, waits = self._held[begin:], False
        for form in self._forms:
            if not text.startswith(form.marker) or self._place(form, begin) != begin:
                waits = waits or (not ended and form.marker.startswith(text))
                continue
            try:
                found = form.read(text, self._tools, ended=ended)
            except NotACallError:
                continue
            if found is not None:
                return found
            waits = True
        if not waits:
            raise NotACallError
        return None

    def _is_surely_a_call(self, begin: int) -> bool:
        """Whether what begins with a marker at a place is no answer in JSON, which looks like a call without a mark."""
        forms = (form for form in self._forms if self._held.startswith(form.marker, begin))
        return self._tools.any_strict or not all(form.only_first for form in forms)

    def _whole_calls(self, begin: int) -> list[Part]:
        """Those that are whole, of several calls at a place that were cut."""
        text, self._held = self._held[begin:], ""
        forms = (form for form in self._forms if text.startswith(form.marker))
        return next((list(calls) for form in forms if (calls := form.whole_calls(text, self._tools))), [])

    def _ends_in_marker(self, start: int) -> bool:
        """Whether the text ends in more than one character of a marker."""
        markers = [form.marker for form in self._forms if not form.only_first]
        tails = [self._held[start:][-length:] for length in range(2, max(map(len, markers), default=0))]
        return any(len(tail) > 1 and marker.startswith(tail) for tail in tails for marker in markers)

    def _certain(self, start: int) -> int:
        """How much text can be returned: all but an end that may begin a call, and white space before that.

        Args:
          start: no call begins before it.
        """
        longest = max(len(form.marker) for form in self._forms) - 1
        tail = range(max(start, len(self._held) - longest), len(self._held))
        markers = [form.marker for form in self._forms if not form.only_first]
        begun = next((at for at in tail if any(marker.startswith(self._held[at:]) for marker in markers)), None)
        return len(self._held[:begun].rstrip())

    def _release(self, length: int) -> list[Part]:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._is_first = self._follows_call = False
        return [text] if text else []
