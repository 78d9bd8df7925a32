"""Calls of tools, and what the forms in which models write them have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import string
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from sparsex_jax.text.plain_json import LENIENT_DECODER

_ID_LENGTH = 9  # letters and digits, the only ids that Mistral's chat templates take
_ALPHABET = string.ascii_letters + string.digits


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
        id_ = "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))
        return {"id": id_, "type": "function", "function": function}


class Tools:
    """The tools that a request offers: the schemas of their arguments, by name.

    Attributes:
      any_strict: calls of one of them at least follow its schema.
    """

    def __init__(self, tools: Iterable[Any]) -> None:
        """
        Args:
          tools: as OpenAI describes them. Those without a name are left out.
        """
        functions = [_mapping(_mapping(tool).get("function")) for tool in tools]
        self.any_strict = any(function.get("strict") is True for function in functions)
        self._schemas = {
            function["name"]: _mapping(function.get("parameters"))
            for function in functions
            if isinstance(function.get("name"), str)
        }

    def __len__(self) -> int:
        return len(self._schemas)

    def types_of(self, name: str, argument: str) -> set[str]:
        """The JSON types that an argument may have; empty if the tool's schema does not say."""
        return _types(_mapping(self._schemas.get(name, {}).get("properties")).get(argument))

    def call(self, name: Any, arguments: Any) -> Call:
        """A call of an offered tool.

        Args:
          arguments: an object, or a text of JSON that is one.

        Raises:
          NotACallError: the tool was not offered, or the arguments are no object.
        """
        arguments = decode(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or name not in self._schemas or not isinstance(arguments, dict):
            raise NotACallError
        return Call(name, _json(arguments))


class NotACallError(Exception):
    """What looked like a call is text."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Calls in a text.

    Attributes:
      calls: in their order, at least one.
      end: where the text goes on behind them.
    """

    calls: list[Call]
    end: int


class Form(Protocol):
    """A form in which models write calls.

    Attributes:
      marker: what a call begins with.
      only_first: whether it can only be the first thing in an answer.
    """

    marker: ClassVar[str]
    only_first: ClassVar[bool]

    def read(self, text: str, tools: Tools, *, ended: bool) -> Found | None:
        """Read calls at the beginning of a text, which is the marker. None: what comes next decides.

        Args:
          ended: nothing comes next.

        Raises:
          NotACallError: the text does not begin with a call, whatever comes next.
        """

    def whole_calls(self, text: str, tools: Tools) -> list[Call]:
        """The first calls of a text that begins with the marker and was cut within a later one."""


_LONGEST_LITERAL = 8  # an escape in a string or a literal that has begun makes an error where it begins


def decode(text: str) -> Any:
    """The value of a text of JSON. Raises NotACallError if it is none."""
    try:
        return LENIENT_DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        raise NotACallError from error


def decode_at(text: str, start: int, *, ended: bool) -> tuple[Any, int] | None:
    """A value of JSON in a text and its end. None: what comes next decides. Raises NotACallError if there is none."""
    try:
        return LENIENT_DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        begun = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
        if begun and not ended:
            return None
        raise NotACallError from error
    except (ValueError, RecursionError) as error:
        raise NotACallError from error


def whole_objects(text: str, start: int, between: str) -> list[Any]:
    """The values of JSON from a place of a text on, as far as they are whole, with this character between them."""
    values: list[Any] = []
    with contextlib.suppress(NotACallError):
        while (value := decode_at(text, skip_space(text, start), ended=True)) is not None:
            values.append(value[0])
            start = skip_space(text, value[1])
            if not text.startswith(between, start):
                break
            start += len(between)
    return values


def skip_space(text: str, start: int) -> int:
    """The index of the first character from `start` on that is no white space."""
    return len(text) - len(text[start:].lstrip())


def _json(arguments: dict[str, Any]) -> str:
    try:
        text = json.dumps(arguments, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which many clients' decoders refuse
        return json.dumps(arguments)
    except (ValueError, RecursionError) as error:
        raise NotACallError from error
    return text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _types(schema: Any) -> set[str]:
    """The types that a JSON schema names, itself or in its alternatives."""
    named = _mapping(schema).get("type")
    types = {each for each in ([named] if isinstance(named, str) else _list(named)) if isinstance(each, str)}
    alternatives = [*_list(_mapping(schema).get("anyOf")), *_list(_mapping(schema).get("oneOf"))]
    return types.union(*map(_types, alternatives))
