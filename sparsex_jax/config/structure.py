"""What an answer must be: `Structure`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsex_jax.config.checks import require

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
MAX_STRUCTURE_LENGTH = 131072
MAX_CHOICES = 4096


@dataclasses.dataclass(frozen=True)
class Structure:
    """What an answer must be. Tokens that lead to nothing of the kind cannot be drawn, and the answer ends where
    nothing can follow.

    Attributes:
      kind: json_schema, json_object, regex, choice or grammar.
      value: of a json_schema the schema, as an object, true, or JSON; of a regex, the expression that the whole answer
        matches, in the syntax of Rust's crate `regex`; of a choice a list of texts; of a grammar one in llguidance's
        Lark, or in llama.cpp's GBNF, which has `::=`. A json_object has none. It is kept as text: schemas and choices
        as JSON, at most 131,072 characters.

    JSON has one space behind a colon and a comma between values and none elsewhere, as Python's `json.dumps` writes it.

    Raises:
      InvalidRequestError: the kind is unknown, or the value is not of its kind. What no grammar can express is refused
        when it is used, by a `StructureError`.
    """

    kind: str
    value: Any = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"structure.kind={self.kind!r:.60} must be one of {', '.join(KINDS)}")
        text = _READERS[self.kind](self.value)
        require(
            len(text) <= MAX_STRUCTURE_LENGTH,
            f"structure of kind {self.kind} has {len(text)} characters; the limit is {MAX_STRUCTURE_LENGTH}",
        )
        object.__setattr__(self, "value", text)

    @property
    def is_json(self) -> bool:
        return self.kind in ("json_schema", "json_object")


def _schema(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            require(False, f"structure of kind json_schema is no JSON: {error}")
    require(
        isinstance(value, Mapping) or value is True,
        f"structure of kind json_schema is {value!r:.60}; it must be an object, or true",
    )
    try:
        return json.dumps({} if value is True else value)
    except (TypeError, ValueError, RecursionError) as error:
        require(False, f"structure of kind json_schema cannot be written as JSON: {error}")
        raise


def _nothing(value: Any) -> str:
    require(value in (None, ""), f"structure of kind json_object has the value {value!r:.60}; it must have none")
    return ""


def _regex(value: Any) -> str:
    return _text("regex", value)


def _grammar(value: Any) -> str:
    return _text("grammar", value)


def _text(kind: str, value: Any) -> str:
    require(isinstance(value, str) and bool(value), f"structure of kind {kind} is {value!r:.60}; it must be a text")
    return value


def _choice(value: Any) -> str:
    if isinstance(value, str):  # as it is kept
        value = _listed(value)
    ok = isinstance(value, Sequence) and bool(value) and all(isinstance(each, str) and each for each in value)
    require(ok, f"structure of kind choice is {value!r:.60}; it must be a list of texts that are not empty")
    require(len(value) <= MAX_CHOICES, f"structure of kind choice has {len(value)} texts; the limit is {MAX_CHOICES}")
    return json.dumps(list(value))


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


_READERS = {"json_schema": _schema, "json_object": _nothing, "regex": _regex, "choice": _choice, "grammar": _grammar}
