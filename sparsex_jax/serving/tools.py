"""Finds tool calls in a model's text. Its chat template tells in which form the model was trained to write them.

    Hermes, Qwen   <tool_call>{"name": "tide", "arguments": {"port": "north"}}</tool_call>, among text
    Llama 3        {"name": "tide", "parameters": {"port": "north"}}, and nothing else; several with ; between them

Text that only looks like a call, or calls a tool that was not offered, stays text.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterable
from typing import Any, Protocol

_BEGIN, _END = "<tool_call>", "</tool_call>"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool by the model.

    Attributes:
      name: of the tool.
      arguments: an object, as JSON.
    """

    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's object of the call, with a new id."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class Reader(Protocol):
    """Separates text from calls while an answer comes. `push` and `finish` together return all parts, in order."""

    def push(self, text: str) -> list[str | Call]:
        """Add new text, and return the parts that later text cannot change. A call is returned as a whole."""

    def finish(self) -> list[str | Call]:
        """Return the text that was held back. The answer has ended."""


def reader_for(template: str | None, tools: Iterable[Any]) -> Reader | None:
    """A reader for one answer. None if no tools are offered, or the template's form of calls is unknown.

    Args:
      template: the model's chat template.
      tools: the offered tools, as OpenAI describes them.
    """
    names = {name for tool in tools if (name := _name_of(tool)) is not None}
    if not names or not isinstance(template, str):
        return None
    if _BEGIN in template:
        return _TaggedReader(names)
    return _WholeReader(names) if "<|start_header_id|>" in template and '"parameters"' in template else None


def _name_of(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _call(value: Any, field: str, names: set[str]) -> Call | None:
    """The call that a JSON value describes, or None if it is not a call of a tool with one of these names."""
    name, arguments = (value.get("name"), value.get(field)) if isinstance(value, dict) else (None, None)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


class _TaggedReader:
    """Reads calls between tags, among text. White space before and behind a call is dropped."""

    def __init__(self, names: set[str]) -> None:
        self._names, self._held = names, ""
        self._follows_call = False

    def push(self, text: str) -> list[str | Call]:
        self._hold(text)
        parts: list[str | Call] = []
        while (begin := self._held.find(_BEGIN)) >= 0 and (end := self._held.find(_END, begin)) >= 0:
            upto = end + len(_END)
            call = self._parse(self._held[begin + len(_BEGIN) : end])
            parts += [self._held[:upto]] if call is None else [self._held[:begin].rstrip(), call]
            rest, self._held, self._follows_call = self._held[upto:], "", call is not None
            self._hold(rest)
        certain = len(self._held[:begin].rstrip()) if begin >= 0 else self._certain()
        parts.append(self._held[:certain])
        self._held, self._follows_call = self._held[certain:], self._follows_call and not certain
        return [part for part in parts if part]

    def _hold(self, text: str) -> None:
        self._held += text
        if self._follows_call:
            self._held = self._held.lstrip()

    def finish(self) -> list[str | Call]:
        held, self._held = self._held, ""
        return [held] if held else []

    def _certain(self) -> int:
        """How many characters can be returned: all but an end that may begin a call, and white space before that."""
        lengths = range(min(len(_BEGIN) - 1, len(self._held)), 0, -1)
        begun = next((length for length in lengths if self._held.endswith(_BEGIN[:length])), 0)
        return len(self._held[: len(self._held) - begun].rstrip())

    def _parse(self, body: str) -> Call | None:
        try:
            return _call(_JSON.decode(body.strip()), "arguments", self._names)
        except (ValueError, RecursionError):
            return None


class _WholeReader:
    """Reads answers that are calls and nothing else. An answer that begins with a brace is held back to its end."""

    def __init__(self, names: set[str]) -> None:
        self._names, self._held = names, ""
        self._is_text = False

    def push(self, text: str) -> list[str | Call]:
        self._held += text
        begin = self._held.lstrip()[:1]
        self._is_text = self._is_text or begin not in ("", "{")
        return self._release() if self._is_text else []

    def finish(self) -> list[str | Call]:
        calls = self._parse(self._held)
        return self._release() if calls is None else list(calls)

    def _release(self) -> list[str | Call]:
        held, self._held = self._held, ""
        return [held] if held else []

    def _parse(self, text: str) -> list[Call] | None:
        """The calls in the text, or None if it has anything else."""
        calls: list[Call] = []
        text = text.strip()
        while text:
            try:
                value, end = _JSON.raw_decode(text)
            except (ValueError, RecursionError):
                return None
            call, text = _call(value, "parameters", self._names), text[end:].lstrip()
            if call is None or not (not text or text.startswith(";")):
                return None
            calls.append(call)
            text = text.removeprefix(";").lstrip()
        return calls or None
