"""Calls as tags: the form of Qwen3-Coder, `<function=tide><parameter=port>north</parameter></function>`.

Values are written as they are: what they mean follows from the tool's schema.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any, ClassVar

from sparsex_jax.serving.tools.calls import Call, Found, NotACallError, Tools, decode, decode_at, skip_space
from sparsex_jax.serving.tools.json_calls import behind_end_tag

_END = "</function>"
_OPEN = "<parameter="
_HEAD = re.compile(r"<function=([^<>\n]{1,128})>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,128})>")
# A value may be a text that has these tags too, so what follows must be the next tag.
_PARAMETER_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>|</tool_call>)")
_LAST_END = re.compile(r"</parameter>\s*\Z")
_LONGEST_TAG = 160


class Function:
    """A call without `<tool_call>` around it, which models leave out. The end tag may be missing."""

    marker: ClassVar[str] = "<function="
    only_first: ClassVar[bool] = False

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        found = _Function(text, tools, ended).read()
        end = None if found is None else behind_end_tag(text, found.end, ended=ended)
        return None if found is None or end is None else Found(found.calls, end)

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        with contextlib.suppress(NotACallError):
            if (found := _Function(text, tools, ended=False).read()) is not None:
                return found.calls
        return []


class TaggedFunction:
    """A call between `<tool_call>` and `</tool_call>`, of which the latter may be missing."""

    marker: ClassVar[str] = "<tool_call>"
    only_first: ClassVar[bool] = False

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        start = skip_space(text, len(self.marker))
        tag = text[start : start + len(Function.marker)]
        if (ended and tag != Function.marker) or not Function.marker.startswith(tag):
            raise NotACallError
        found = None if tag != Function.marker else Function().read(text[start:], tools, ended=ended)
        return None if found is None else Found(found.calls, start + found.end)

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        return Function().whole_calls(text[skip_space(text, len(self.marker)) :], tools)


class _Function:
    """One call in a text that begins with it."""

    def __init__(self, text: str, tools: Tools, ended: bool) -> None:
        self._text, self._tools, self._ended = text, tools, ended

    def read(self) -> Found | None:
        head = _HEAD.match(self._text)
        if head is None:
            return self._wait_for(_LONGEST_TAG, 0)
        name = head[1].strip()
        if self._text.startswith("{", head.end()):  # as Llama 3.1 writes the arguments
            value = decode_at(self._text, head.end(), ended=self._ended)
            return None if value is None else self._closed(self._tools.call(name, value[0]), value[1])
        return self._read_parameters(name, head.end())

    def _read_parameters(self, name: str, at: int) -> Found | None:
        arguments: dict[str, Any] = {}
        while (parameter := _PARAMETER.match(self._text, at)) is not None:
            end = _PARAMETER_END.search(self._text, at) or (_LAST_END.search(self._text, at) if self._ended else None)
            if end is None:
                return self._wait_for(math.inf, at)
            argument = parameter[1].strip()
            value = self._text[parameter.end() : end.start()].removeprefix("\n").removesuffix("\n")
            arguments[argument] = _typed(value, self._tools.types_of(name, argument))
            at = end.end()
        rest = self._text[at:]
        if rest.startswith((_END, "</tool_call>")) or (self._ended and arguments and not rest):
            return self._closed(self._tools.call(name, arguments), at)
        begun = any(tag.startswith(rest) for tag in (_OPEN, _END, "</tool_call>")) or rest.startswith(_OPEN)
        return self._wait_for(_LONGEST_TAG if begun else 0, at)

    def _wait_for(self, most: float, at: int) -> Found | None:
        """None, if so many more characters behind a place may make it a call. Otherwise raises NotACallError."""
        if self._ended or len(self._text) - at > most:
            raise NotACallError
        return None

    def _closed(self, call: Call, at: int) -> Found | None:
        at = skip_space(self._text, at)
        if self._text.startswith(_END, at):
            return Found([call], at + len(_END))
        return None if _END.startswith(self._text[at:]) and not self._ended else Found([call], at)


def _typed(text: str, types: set[str]) -> Any:
    """A value as the schema's types have it: text where the schema says so or nothing, otherwise JSON if it is that."""
    if not types or "string" in types:
        return text
    lowered = text.strip().lower()
    try:
        return decode(lowered if lowered in ("true", "false", "null") else text)
    except NotACallError:
        return text
