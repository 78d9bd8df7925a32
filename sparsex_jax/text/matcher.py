"""Follows one answer through its grammar: which tokens may come next, and that those that came are among them.

Where the grammar leaves one text only, its tokens are forced: each of them is the only one allowed in its turn, so that
the text is written with the tokens that a tokenizer would choose.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from sparsex_jax.errors import StructureError


class Matcher:
    """One answer's place in its grammar.

    Attributes:
      forced: the tokens that come next, whatever the model says.
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
        self._force()

    @property
    def done(self) -> bool:
        """Whether nothing but an end can follow."""
        return not self.forced and self._grammar.is_stopped()

    def copy(self) -> Matcher:
        """A matcher at the same place, which goes on by itself."""
        other = copy.copy(self)
        other._grammar, other.forced = self._grammar.deep_copy(), self.forced.copy()
        return other

    def allowed(self) -> UInt32[np.ndarray, "words"]:
        """Which tokens may come next: 32 in a word, the lowest bit first.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        size = -(-self._vocab_size // 32)
        if self.forced:
            return _only(self.forced[0], size)
        words = np.frombuffer(self._grammar.compute_bitmask(), np.uint32)[:size]
        self._require_sound()
        return words if self._ends else self._without_ends(words)

    def _without_ends(self, words: UInt32[np.ndarray, "words"]) -> UInt32[np.ndarray, "words"]:
        words = words.copy()
        for token in self._end_tokens:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        return words

    def accept(self, tokens: Sequence[int]) -> list[int]:
        """Take the tokens that came next, up to the end of the answer.

        Args:
          tokens: negative ones are none, and end what came.

        Returns:
          Those before the end, and the negative one behind them if there is one.

        Raises:
          StructureError: the grammar got too complex for this answer, or a token is not one that it allowed.
        """
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            if token < 0:
                break
            if not self._takes(token):
                raise StructureError(f"structure: the grammar does not take token {token}, which it had allowed")
            if self.done or token in self._ends:
                break
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
            raise StructureError(f"structure: the grammar got too complex: {self._grammar.get_error().strip():.1000}")


def _only(token: int, size: int) -> UInt32[np.ndarray, "words"]:
    words = np.zeros(size, np.uint32)
    words[token // 32] = np.uint32(1 << token % 32)
    return words
