"""Follows one answer through its grammar: which tokens may come next, and which of those that came are taken.

Where the grammar leaves one text only, its tokens are forced: they are taken without a draw. Behind them comes a token
that is drawn among the allowed ones. So what comes next is known for a few tokens:

    answer so far     forced                         drawn with the mask     drawn without one
    {                 "name":  "                     Ann                     a   ",
                                                                             taken as far as the grammar allows

A device that computes several tokens at once draws those behind the mask freely, and `accept` says how many of them
count. For greedy answers, and for random ones without filters, a free draw that the grammar allows is what the draw
with the mask would have been, since the random numbers are those of the position: the most probable token of all is the
most probable one of those allowed. So answers do not depend on how many tokens are computed at once.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from sparsex_jax.errors import StructureError

_FIRST_GUESS = 0.9
_LEARNS = 0.1  # the weight of one free draw in the estimate
_HOPES = 0.01  # where none was tried, the estimate slowly rises, so that one is


class Matcher:
    """One answer's place in its grammar.

    Attributes:
      forced: the tokens that come next, whatever the model says.
      likely: an estimate of the probability that the grammar allows a free draw.
    """

    def __init__(self, grammar: Any, vocab_size: int, end_tokens: Sequence[int], ends: Collection[int]) -> None:
        """
        Args:
          grammar: llguidance's matcher, at its beginning.
          end_tokens: all that the grammar takes for an end.
          ends: those of them that may be drawn.
        """
        self._grammar, self._vocab_size = grammar, vocab_size
        self._end_tokens, self._ends = frozenset(end_tokens), ends
        self.forced: collections.deque[int] = collections.deque()
        self.likely = _FIRST_GUESS
        self._force()

    @property
    def done(self) -> bool:
        """Whether nothing but an end can follow."""
        return not self.forced and self._grammar.is_stopped()

    def allowed(self) -> UInt32[np.ndarray, "words"]:
        """Which tokens may come behind the forced ones: 32 in a word, the lowest bit first.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        words = np.frombuffer(self._grammar.compute_bitmask(), np.uint32)[: -(-self._vocab_size // 32)]
        self._require_sound()
        return words if self._ends else self._without_ends(words)

    def _without_ends(self, words: UInt32[np.ndarray, "words"]) -> UInt32[np.ndarray, "words"]:
        words = words.copy()
        for token in self._end_tokens:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        return words

    def expected(self, steps: int, *, freely: bool) -> float:
        """How many of the tokens of so many steps will count.

        Args:
          freely: also those drawn without a mask may.
        """
        certain = len(self.forced) + 1
        free = max(steps - certain, 0) if freely else 0
        more = free if self.likely == 1 else self.likely * (1 - self.likely**free) / (1 - self.likely)
        return min(steps, certain) + more

    def accept(self, tokens: Sequence[int], *, freely: bool) -> list[int]:
        """Take what was computed next: the forced tokens, the one drawn with the mask, and those drawn freely.

        Args:
          tokens: negative ones are none, and end what was computed.
          freely: take also those drawn without a mask, as far as they are allowed.

        Returns:
          Those that count, and the negative one behind them if there is one.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        certain = len(self.forced) + 1
        taken: list[int] = []
        for number, token in enumerate(tokens if freely else tokens[:certain]):
            if token < 0:
                return [*taken, token]
            allowed = self._takes(token)
            if number >= certain:
                self.likely += _LEARNS * (allowed - self.likely)
            elif not allowed:
                raise StructureError(f"structure: the grammar does not take token {token}, which it had allowed")
            if not allowed:
                break
            taken.append(token)
            if self.done or token in self._ends:
                break
        if len(tokens) <= certain:
            self.likely += _HOPES * (1 - self.likely)
        return taken

    def _takes(self, token: int) -> bool:
        if self.forced:
            expected = token == self.forced[0]
            if expected:
                self.forced.popleft()
            return expected
        if token in self._end_tokens:
            return token in self._ends and self._grammar.is_accepting()
        if self._grammar.try_consume_tokens([token]) != 1:
            return False
        self._force()
        return True

    def _force(self) -> None:
        """Go on through what the grammar leaves no choice about."""
        while not self._grammar.is_stopped() and (tokens := self._grammar.compute_ff_tokens()):
            self._grammar.consume_tokens(tokens)
            self.forced += tokens
        self._require_sound()

    def _require_sound(self) -> None:
        if self._grammar.is_error():
            raise StructureError(f"structure: the grammar got too complex: {error_of(self._grammar)}")


def error_of(grammar: Any) -> str:
    """What llguidance says is wrong with a grammar, without its parser's state."""
    return f"{grammar.get_error().partition('<state>')[0].strip():.1000}"
