"""Follows one answer through its structure: which tokens may come next, and which of those that came are taken.

Where the grammar leaves one text only, its tokens are forced: they are taken without a draw. Behind them comes a token
that is drawn among the allowed ones. So what comes next is known for a few tokens:

    answer so far     forced                         drawn with the mask     drawn without one
    {                 "name":  "                     Ann                     a   ",
                                                                             taken as far as the grammar allows

A device that computes several tokens at once draws those behind the mask freely, and `accept` says how many of them
count. For greedy answers, and for random ones without filters, a free draw that the grammar allows is what the draw
with the mask would have been, since the random numbers are those of the position: the most probable token of all is the
most probable one of those allowed. So answers do not depend on how many tokens are computed at once.

What stands before the structure is free: nothing is masked, and all that is drawn counts, up to a mark (`marks`):

    thought                             </think>   {"name": ...        behind a mark
    text        <tool_call> {"name": ... } </tool_call>   text ...     at a mark, which the grammar begins with

A token that cannot stand there is not taken, and others are forced in its place: where a token goes on behind the mark
with what the grammar does not take, the rest of the mark; where the model would end its answer within a thought, the
mark. The first token of an answer has a mask that leaves such tokens out.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Sequence

from sparsex_jax.config.structure import Structure
from sparsex_jax.errors import StructureError
from sparsex_jax.text.marks import Hit, Marks
from sparsex_jax.text.place import Place, Tokens, Words, allowing

_FIRST_GUESS = 0.9
_LEARNS = 0.1  # the weight of one free draw in the estimate
_HOPES = 0.01  # where none was tried, the estimate slowly rises, so that one is


class Matcher:
    """One answer's place in its structure.

    Attributes:
      forced: the tokens that come next, whatever the model says.
      likely: an estimate of the probability that the grammar allows a free draw.
    """

    def __init__(self, structure: Structure, begin: Callable[[], Place], tokens: Tokens, ends: Collection[int]) -> None:
        """
        Args:
          begin: a place at the beginning of the structure's grammar.
          ends: the end tokens that may be drawn.
        """
        self._structure, self._begin, self._tokens, self._ends = structure, begin, tokens, ends
        self.forced: collections.deque[int] = collections.deque()
        self.likely = _FIRST_GUESS
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

    @property
    def masks(self) -> bool:
        """Whether what comes behind the forced tokens is drawn with a mask."""
        return self._place is not None or self._first is not None

    def allowed(self) -> Words:
        """Which tokens may come behind the forced ones, where `masks`: 32 in a word, the lowest bit first.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        if self._first is not None:
            return self._first
        assert self._place is not None
        allowed = self._place.allowed()
        return allowing(allowed, self._opening[0]) if self._opening else allowed

    def expected(self, steps: int, *, freely: bool) -> float:
        """How many of the tokens of so many steps will count.

        Args:
          freely: also those drawn without a mask where there is one may.
        """
        if self._place is None:
            return steps
        certain = len(self.forced) + 1
        free = max(steps - certain, 0) if freely else 0
        more = free if self.likely == 1 else self.likely * (1 - self.likely**free) / (1 - self.likely)
        return min(steps, certain) + more

    def accept(self, tokens: Sequence[int], *, freely: bool) -> list[int]:
        """Take what was computed next: the forced tokens, the one drawn with the mask, and those drawn freely.

        Args:
          tokens: negative ones are none, and end what was computed.
          freely: take also those drawn without the mask that they should have had, as far as they are allowed.

        Returns:
          Those that count, and the negative one behind them if there is one.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        certain = len(self.forced) + self.masks
        taken: list[int] = []
        for number, token in enumerate(tokens):
            if token < 0:
                return [*taken, token]
            guessed = number >= certain and self._is_bound
            if guessed and not freely:
                break
            allowed = self._takes(token)
            if guessed:
                self.likely += _LEARNS * (allowed - self.likely)
            elif not allowed and number < certain:
                raise StructureError(f"structure: the grammar does not take token {token}, which it had allowed")
            if not allowed:
                break
            taken.append(token)
            if self.done or token in self._ends:
                break
        if len(tokens) <= certain:
            self.likely += _HOPES * (1 - self.likely)
        return taken

    @property
    def _is_bound(self) -> bool:
        """Whether the next token is forced or drawn with a mask."""
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
