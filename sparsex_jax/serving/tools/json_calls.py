"""Calls as JSON: the forms of Hermes, Mistral and Llama 3."""

from __future__ import annotations

import contextlib
import re
from typing import Any, ClassVar

from sparsex_jax.serving.tools.calls import Call, Found, NotACallError, Tools, decode_at, skip_space, whole_objects

_END = "</tool_call>"


class Hermes:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. The end tag may be missing."""

    marker: ClassVar[str] = "<tool_call>"
    only_first: ClassVar[bool] = False

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        start = skip_space(text, len(self.marker))
        if start == len(text) and not ended:
            return None
        value = _object_at(text, start, ended=ended)
        if value is None:
            return None
        end = behind_end_tag(text, value[1], ended=ended)
        given = value[0] | {"arguments": {}} if _lacks_arguments(value[0]) else value[0]
        calls = [_call(given, tools)]
        return None if end is None else Found(calls, end)

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        with contextlib.suppress(NotACallError):  # its end tag may be missing
            if (found := self.read(text, tools, ended=True)) is not None:
                return found.calls
        return []


class Mistral:
    """`[TOOL_CALLS]` and a list of calls, or a name and its arguments."""

    marker: ClassVar[str] = "[TOOL_CALLS]"
    only_first: ClassVar[bool] = False

    # Newer models write name[CALL_ID]id[ARGS]{...}, and the newest name[ARGS]{...} or name{...}.
    _named = re.compile(r"([\w.-]{1,128})\s{0,8}(?:\[CALL_ID\]\s{0,8}\w{1,64}\s{0,8})?(?:\[ARGS\])?\s{0,8}(?=\{)")
    _longest_name = 256

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        start = skip_space(text, len(self.marker))
        if start == len(text) and not ended:
            return None
        if text.startswith(("[", "{"), start):
            value = decode_at(text, start, ended=ended)
            return None if value is None else Found(_calls(value[0], tools), value[1])
        return self._read_named(text, start, tools, ended=ended)

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        start = skip_space(text, len(self.marker))
        return _whole_calls(text, start + 1, ",", tools) if text.startswith("[", start) else []

    def _read_named(self, text: str, start: int, tools: Tools, *, ended: bool) -> Found | None:
        named = self._named.match(text, start)
        if named is None:
            if ended or "{" in text[start:] or len(text) - start > self._longest_name:
                raise NotACallError
            return None
        value = _object_at(text, named.end(), ended=ended)
        return None if value is None else Found([tools.call(named[1], value[0])], value[1])


class MistralList:
    """A list of calls and nothing else, where `[TOOL_CALLS]` is not in the text."""

    marker: ClassVar[str] = "["
    only_first: ClassVar[bool] = True

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        value = decode_at(text, 0, ended=ended)
        if value is None or not _is_whole(text, value[1], ended=ended):
            return None
        return Found(_calls(value[0], tools), len(text))

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        return _whole_calls(text, len(self.marker), ",", tools)


class Llama:
    """`{"name": ..., "parameters": {...}}` and nothing else; several with `;` between them."""

    marker: ClassVar[str] = "{"
    only_first: ClassVar[bool] = True

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        calls, at = [], 0
        while True:
            value = _object_at(text, at, ended=ended)
            if value is None:
                return None
            calls.append(_call(value[0], tools))
            at = skip_space(text, value[1])
            if text.startswith(";", at):
                at = skip_space(text, at + 1)
            elif at < len(text):
                raise NotACallError
            if at == len(text):
                return Found(calls, at) if ended else None

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        return _whole_calls(text, max(text.find("{"), 0), ";", tools)


class LlamaMarked(Llama):
    """The same behind `<|python_tag|>`, which may follow text."""

    marker: ClassVar[str] = "<|python_tag|>"
    only_first: ClassVar[bool] = False

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        start = skip_space(text, len(self.marker))
        if start == len(text) and not ended:
            return None
        found = super().read(text[start:], tools, ended=ended)
        return None if found is None else Found(found.calls, start + found.end)


def _lacks_arguments(value: Any) -> bool:
    return all(value.get(name) is None for name in ("arguments", "parameters"))


def behind_end_tag(text: str, start: int, *, ended: bool) -> int | None:
    """Where the text goes on behind a call: behind its end tag, if there is one. None: what comes next decides."""
    at = skip_space(text, start)
    closed = len(text) - len(text[at:].lstrip("}] \t\r\n"))  # models close more braces than they opened
    if text.startswith(_END, closed):
        return closed + len(_END)
    begun = _END.startswith(text[closed:])  # of an answer that was cut there, nothing is left but white space
    return (len(text) if begun else start) if ended else (None if begun else start)


def _object_at(text: str, start: int, *, ended: bool) -> tuple[Any, int] | None:
    if start < len(text) and text[start] != "{":
        raise NotACallError
    return decode_at(text, start, ended=ended)


def _is_whole(text: str, end: int, *, ended: bool) -> bool:
    """Whether the text ends here. Raises NotACallError if it goes on."""
    if text[end:].strip():
        raise NotACallError
    return ended


def _calls(value: Any, tools: Tools) -> list[Call]:
    calls = [_call(each, tools) for each in (value if isinstance(value, list) else [value])]
    if not calls:
        raise NotACallError
    return calls


def _whole_calls(text: str, start: int, between: str, tools: Tools) -> list[Call]:
    """Calls as objects that were cut, from a place of the text on."""
    calls: list[Call] = []
    with contextlib.suppress(NotACallError):
        for value in whole_objects(text, start, between):
            calls.append(_call(value, tools))
    return calls


def _call(value: Any, tools: Tools) -> Call:
    """The call that an object describes. Models mix up the two names of what holds the arguments."""
    if not isinstance(value, dict):
        raise NotACallError
    given = [value[name] for name in ("arguments", "parameters") if name in value]
    return tools.call(value.get("name"), given[0] if given else None)
