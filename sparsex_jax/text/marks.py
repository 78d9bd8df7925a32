"""Finds marks in the text of an answer that comes in tokens: those at which a structure begins.

A mark may be one token or several, and a token may go on behind it:

    tokens          I   ask .  <tool _call >{"
    text held back  -   -   -  <tool <tool_call
    found                                    the mark, of which this token has `>`, and `{"` behind it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsex_jax.config.structure import Behind, Lazy


@dataclasses.dataclass(frozen=True)
class Hit:
    """A mark that a token completes.

    Attributes:
      mark: the whole mark.
      own: the part of it that the token has.
      rest: what the token has behind the mark.
    """

    mark: bytes
    own: bytes
    rest: bytes


class Marks:
    """Watches one answer for the marks of a structure.

    In a lazy structure, what stands before the structure matters for marks that are the first thing in the answer: they
    count behind it.
    """

    def __init__(self, behind: Behind | None, lazy: Lazy | None) -> None:
        """
        Args:
          lazy: None: the only mark is the end of what stands before the structure.
        """
        end = () if behind is None else (behind.end,)
        self._marks = _bytes(end if lazy is None else lazy.marks)
        self._first = _bytes(() if lazy is None else lazy.first)
        self._passed = _bytes(end if self._first else ())  # the end of a thought, behind which the answer begins
        self._opens = _bytes((behind.begin,) if behind is not None and behind.begin and self._first else ())
        self._within = bool(self._passed) and not self._opens
        self._is_first = bool(self._first) and not self._within
        self._held = b""  # the end of the text, which may be the beginning of a mark

    @property
    def names(self) -> tuple[bytes, ...]:
        """All marks, also those that nothing begins at."""
        return (*self._marks, *self._first, *self._passed, *self._opens)

    def copy(self) -> Marks:
        """Another one at the same place."""
        other = object.__new__(Marks)
        other.__dict__.update(self.__dict__)
        return other

    def push(self, piece: bytes) -> Hit | None:
        """Add a token's text. A hit is the last one until `restart`."""
        text = self._held + piece
        found = self._find(text)
        if found is not None:
            at, mark = found
            end = at + len(mark)
            return Hit(mark, text[max(at, len(text) - len(piece)) : end], text[end:])
        return None

    def restart(self) -> None:
        """Go on behind a structure."""
        self._held, self._is_first = b"", False

    def _find(self, text: bytes) -> tuple[int, bytes] | None:
        found = self._anywhere(text, self._marks) or self._at_first(text, 0)
        passed = self._anywhere(text, self._passed) if self._within else None
        if passed is not None and (found is None or passed[0] < found[0]):
            start = passed[0] + len(passed[1])
            self._within, self._is_first = False, True
            found = self._anywhere(text, self._marks, start) or self._at_first(text, start)
            text = text[start:] if found is None else text
        self._held = text if self._is_first else self._tail(text)
        return found

    def _anywhere(self, text: bytes, marks: Sequence[bytes], start: int = 0) -> tuple[int, bytes] | None:
        places = ((text.find(mark, start), mark) for mark in marks)
        return min((place for place in places if place[0] >= 0), default=None)

    def _at_first(self, text: bytes, start: int) -> tuple[int, bytes] | None:
        """The mark that the answer begins with, behind white space."""
        said = text[start:].lstrip()
        if not self._is_first or not said:
            return None
        found = next((mark for mark in self._first if said.startswith(mark)), None)
        self._is_first = found is None and any(mark.startswith(said) for mark in (*self._first, *self._opens))
        self._within = self._within or any(said.startswith(mark) for mark in self._opens)
        return None if found is None else (len(text) - len(said), found)

    def _tail(self, text: bytes) -> bytes:
        longest = max((len(mark) for mark in (*self._marks, *self._passed)), default=1)
        return text[-(longest - 1) :] if longest > 1 else b""


def _bytes(marks: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(mark.encode() for mark in marks)
