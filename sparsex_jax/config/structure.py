"""What an answer must be, and where that begins: `Structure`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsex_jax.config.checks import require

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
MAX_STRUCTURE_LENGTH = 131072
MAX_CHOICES = 4096
MAX_MARKS = 16
MAX_MARK_LENGTH = 256  # UTF-8 bytes


@dataclasses.dataclass(frozen=True)
class Behind:
    """What stands before a structure, such as a thought: any text, up to a mark.

    Attributes:
      end: the mark behind which the structure begins. A model that would end its answer before is made to write it.
      begin: the mark that opens what stands before the structure. An answer that does not begin with it is the
        structure from its first token on. None: the answer begins within it, because the prompt has opened it.

    Raises:
      InvalidRequestError: a mark is no text of 1 to 256 bytes.
    """

    end: str
    begin: str | None = None

    def __post_init__(self) -> None:
        _check_mark("behind.end", self.end)
        if self.begin is not None:
            _check_mark("behind.begin", self.begin)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Marks at which a structure begins in an answer that is any text before. The structure begins with the mark.

    Attributes:
      marks: count wherever they are, in what stands before the structure too (`Behind`).
      first: count only where the answer begins with them.
      repeats: behind the structure comes any text again, up to the next mark. Otherwise the answer ends with it.

    Raises:
      InvalidRequestError: there are no marks or more than 16, or one is no text of 1 to 256 bytes.
    """

    marks: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    repeats: bool = False

    def __post_init__(self) -> None:
        number = len(self.marks) + len(self.first)
        require(1 <= number <= MAX_MARKS, f"structure.lazy has {number} marks; it must have 1 to {MAX_MARKS}")
        for mark in (*self.marks, *self.first):
            _check_mark("lazy", mark)


def _check_mark(name: str, mark: Any) -> None:
    ok = isinstance(mark, str) and 1 <= len(mark.encode(errors="replace")) <= MAX_MARK_LENGTH
    require(ok, f"structure.{name} is {mark!r:.60}; a mark must be a text of 1 to {MAX_MARK_LENGTH} bytes")


@dataclasses.dataclass(frozen=True)
class Structure:
    r"""What an answer must be. Tokens that lead to nothing of the kind cannot be drawn, and the answer ends where
    nothing can follow.

    Attributes:
      kind: json_schema, json_object, regex, choice or grammar.
      value: of a json_schema the schema, as an object, true, or JSON; of a regex, the expression that the whole answer
        matches, in the syntax of Rust's crate `regex`; of a choice a list of texts; of a grammar one in llguidance's
        Lark, or in llama.cpp's GBNF, which has `::=`. A json_object has none. It is kept as text: schemas and choices
        as JSON, at most 131,072 characters. In all expressions `\d` and `\w` are ASCII, as JSON Schema has them.
      behind: what may stand before the structure, such as a thought; None: nothing.
      lazy: the answer need not have the structure, which begins where a mark does; None: the whole answer is it.

    JSON has one space behind a colon and a comma between values and none elsewhere, as Python's `json.dumps` writes it.

    Raises:
      InvalidRequestError: the kind is unknown, or the value is not of its kind. What no grammar can express is refused
        when it is used, by a `StructureError`.
    """

    kind: str
    value: Any = None
    behind: Behind | None = None
    lazy: Lazy | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"structure.kind={self.kind!r:.60} must be one of {', '.join(KINDS)}")
        text = _READERS[self.kind](self.value)
        require(
            len(text) <= MAX_STRUCTURE_LENGTH,
            f"structure of kind {self.kind} has {len(text)} characters; the limit is {MAX_STRUCTURE_LENGTH}",
        )
        behind, lazy = self.behind, self.lazy
        require(isinstance(behind, Behind | None), f"structure.behind={behind!r:.60} must be a Behind or None")
        require(isinstance(lazy, Lazy | None), f"structure.lazy={lazy!r:.60} must be a Lazy or None")
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
    text = _text("regex", value)
    alone = (len(text) - len(text.rstrip("\\"))) % 2 == 1  # llguidance would leave it out
    require(not alone, "structure of kind regex ends with a backslash, which must stand before what it escapes")
    return text


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
