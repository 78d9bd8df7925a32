"""Follows one answer through its structure: which tokens may come next, and that those that came are among them.

Where the grammar leaves one text only, its tokens are forced: each of them is the only one allowed in its turn, so that
the text is written with the tokens that a tokenizer would choose.

What stands before the structure is free: nothing is masked, up to a mark (`marks`):

    thought                             </think>   {"name": ...        behind a mark
    text        <tool_call> {"name": ... } </tool_call>   text ...     at a mark, which the grammar begins with

A token that cannot stand there is not taken, and others are forced in its place: where a token goes on behind the mark
with what the grammar does not take, the rest of the mark; where the model would end its answer within a thought, the
mark. The first token of an answer has a mask that leaves such tokens out.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Collection, Sequence

from sparsex_jax.config.structure import Structure
from sparsex_jax.errors import StructureError
from sparsex_jax.text.marks import Hit, Marks
from sparsex_jax.text.place import Place, Tokens, Words, allowing


class Matcher:
    """One answer's place in its structure.

    Attributes:
      forced: the tokens that come next, whatever the model says.
    """

    def __init__(self, structure: Structure, begin: Callable[[], Place], tokens: Tokens, ends: Collection[int]) -> None:
        """
        Args:
          begin: a place at the beginning of the structure's grammar.
          ends: the end tokens that may be drawn.
        """
        self._structure, self._begin, self._tokens, self._ends = structure, begin, tokens, ends
        self.forced: collections.deque[int] = collections.deque()
        self._marks = Marks(structure.behind, structure.lazy)
        self._place: Place | None = None  # None: any text comes
        self._opening: collections.deque[int] = collections.deque()  # what is left of a mark that may come or not
        self._first: Words | None = None  # the mask of a first token that is nearly free
        self._start()

    def _start(self) -> None:
        behind, lazy = self._structure.behind, self._structure.lazy
        if lazy is None and behind is None:
            self._follow(self._begin())
        elif lazy is None and behind is not None and behind.begin is not None:
            self._opening += self._tokens.encode(behind.begin.encode())
            self._place = self._begin()
        else:
            for mark in () if lazy is None else (*lazy.marks, *lazy.first):
                self._place_at(mark.encode())
            self._first = self._tokens.all_but([*self._replaced(), *(() if lazy else self._ends)])

    @property
    def done(self) -> bool:
        """Whether nothing but an end can follow."""
        return not self.forced and not self._opening and self._place is not None and self._place.is_stopped

    def copy(self) -> Matcher:
        """Another one at the same place."""
        other = copy.copy(self)
        other.forced, other._opening, other._marks = self.forced.copy(), self._opening.copy(), self._marks.copy()
        other._place = None if self._place is None else self._place.copy()
        return other

    def allowed(self) -> Words:
        """Which tokens may come next: 32 in a word, the lowest bit first.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        if self.forced:
            return self._tokens.only(self.forced[0])
        if self._first is not None:
            return self._first
        if self._place is None:
            return self._tokens.all_but(())
        allowed = self._place.allowed()
        return allowing(allowed, self._opening[0]) if self._opening else allowed

    def accept(self, tokens: Sequence[int]) -> list[int]:
        """Take the tokens that came next, up to the end of the answer, or to one that others are forced in place of.

        Args:
          tokens: negative ones are none, and end what came.

        Returns:
          Those that count, and the negative one behind them if there is one.

        Raises:
          StructureError: the grammar got too complex for this answer, or a token is not one that it allowed.
        """
        taken: list[int] = []
        for token in tokens:
            bound = self._is_bound
            if token >= 0 and not self._takes(token):
                if bound:
                    raise StructureError(f"structure: the grammar does not take token {token}, which it had allowed")
                break
            taken.append(token)
            if token < 0 or self.done or token in self._ends:
                break
        return taken

    @property
    def _is_bound(self) -> bool:
        """Whether the next token is forced, or in the grammar."""
        return bool(self.forced) or self._place is not None

    def _takes(self, token: int) -> bool:
        self._first = None
        if self.forced:
            expected = token == self.forced[0]
            if expected:
                self.forced.popleft()
            return expected
        if self._opening:
            return self._opens(token)
        if self._place is None:
            return self._hears(token)
        if not self._place.takes(token):
            return False
        self._follow(self._place)
        return True

    def _opens(self, token: int) -> bool:
        """Take a token of the structure, or of the mark that may stand before it."""
        assert self._place is not None
        follows, marked = self._place.takes(token), token == self._opening[0]
        if marked:
            self._opening.popleft()
            if not follows or not self._opening:
                self.forced += self._opening
                self._opening.clear()
                self._place = None
        elif follows:
            self._opening.clear()
            self._follow(self._place)
        return marked or follows

    def _hears(self, token: int) -> bool:
        """Take a token of any text, at whose end the structure may begin."""
        if token in self._ends:
            return self._may_end()
        hit = self._marks.push(self._tokens.text_of(token, self._marks.names))
        if hit is None:
            return True
        place = self._place_behind(hit)
        if place is not None:
            self._follow(place)
            return True
        self.forced += self._tokens.encode(hit.own)
        self._follow(self._place_at(hit.mark))
        return False

    def _may_end(self) -> bool:
        """Whether the answer may end within any text. What must come before a structure gets its end mark instead."""
        behind = self._structure.behind
        if self._structure.lazy is not None or behind is None:
            return True
        self.forced += self._tokens.encode(behind.end.encode())
        self._follow(self._begin())
        return False

    def _place_behind(self, hit: Hit) -> Place | None:
        """The place in the grammar behind a token that ends a mark; None if the grammar does not take the token."""
        place = self._begin()
        text = hit.rest.lstrip() if self._structure.lazy is None else hit.mark + hit.rest
        return place if place.reads(text) else None

    def _place_at(self, mark: bytes) -> Place:
        place = self._begin()
        if self._structure.lazy is not None and not place.reads(mark):
            raise StructureError(f"structure.lazy has the mark {mark.decode()!r}; the grammar does not begin with it")
        return place

    def _follow(self, place: Place) -> None:
        """Go on in the grammar, through what it leaves no choice about, and out of it where any text may come again."""
        self._place = place
        self.forced += place.force()
        lazy = self._structure.lazy
        if lazy is not None and lazy.repeats and place.is_stopped:
            self._place = None
            self._marks.restart()

    def _replaced(self) -> list[int]:
        """The tokens that would not be taken as the first ones of an answer."""
        names = self._marks.names
        candidates = {token for mark in names for token in self._tokens.containing(mark)}
        hits = {token: self._marks.copy().push(self._tokens.text_of(token, names)) for token in candidates}
        return [token for token, hit in hits.items() if hit is not None and self._place_behind(hit) is None]
