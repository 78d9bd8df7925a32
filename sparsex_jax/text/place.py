"""A place in a grammar, and the tokens by which llguidance moves on from it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from sparsex_jax.errors import StructureError

Words = UInt32[np.ndarray, "words"]


class Tokens:
    """A model's tokens as grammars see them.

    Attributes:
      llguidance: its tokenizer, from which grammars are compiled.
    """

    def __init__(self, llguidance: Any, vocab_size: int) -> None:
        """
        Args:
          vocab_size: of the model, which may have more tokens than its tokenizer.
        """
        self.llguidance, self.vocab_size = llguidance, vocab_size
        self._containing = functools.lru_cache(maxsize=64)(self._find)

    def encode(self, text: bytes) -> list[int]:
        """A text as tokens."""
        return self.llguidance.tokenize_bytes(text)

    def text_of(self, token: int, marks: Collection[bytes] = ()) -> bytes:
        """A token's text. A special token has none, unless it is one of the marks."""
        text = self._text(token)
        return b"" if text not in marks and self.llguidance.is_special_token(token) else text

    def containing(self, mark: bytes) -> Sequence[int]:
        """The tokens whose text has the mark in it."""
        return self._containing(mark)

    def all_but(self, tokens: Iterable[int]) -> Words:
        """A mask that allows all tokens but these: 32 in a word, the lowest bit first."""
        return _cleared(np.full(-(-self.vocab_size // 32), 0xFFFFFFFF, np.uint32), tokens)

    def only(self, token: int) -> Words:
        """A mask that allows this token."""
        return allowing(np.zeros(-(-self.vocab_size // 32), np.uint32), token)

    def _find(self, mark: bytes) -> Sequence[int]:
        return [token for token, text in enumerate(self._texts) if mark in text]

    @functools.cached_property
    def _texts(self) -> list[bytes]:
        return [self._text(token) for token in range(self.vocab_size)]

    def _text(self, token: int) -> bytes:
        return self.llguidance.decode_bytes([token])


class Place:
    """One answer's place in a grammar."""

    def __init__(self, grammar: Any, tokens: Tokens, end_tokens: Collection[int], ends: Collection[int]) -> None:
        """
        Args:
          grammar: llguidance's matcher.
          end_tokens: all that the grammar takes for an end.
          ends: those of them that may be drawn.
        """
        self._grammar, self._tokens = grammar, tokens
        self._end_tokens, self._ends = end_tokens, ends

    def copy(self) -> Place:
        """Another one at the same place."""
        return Place(self._grammar.deep_copy(), self._tokens, self._end_tokens, self._ends)

    @property
    def is_stopped(self) -> bool:
        """Whether nothing but an end can follow."""
        return self._grammar.is_stopped()

    def allowed(self) -> Words:
        """Which tokens may come next: 32 in a word, the lowest bit first.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        words = np.frombuffer(self._grammar.compute_bitmask(), np.uint32)[: -(-self._tokens.vocab_size // 32)]
        self._require_sound()
        return words if self._ends else _cleared(words.copy(), self._end_tokens)

    def takes(self, token: int) -> bool:
        """Go on by a token, if the grammar allows it."""
        if token in self._end_tokens:
            return token in self._ends and self._grammar.is_accepting()
        return self._grammar.try_consume_tokens([token]) == 1

    def reads(self, text: bytes) -> bool:
        """Go on by a text. False: the grammar does not take it, and the place is of no use any more."""
        tokens = self._tokens.encode(text) if text else []
        return not tokens or self._grammar.try_consume_tokens(tokens) == len(tokens)

    def force(self) -> list[int]:
        """Go on through what the grammar leaves no choice about, and return these tokens.

        Raises:
          StructureError: the grammar got too complex for this answer.
        """
        forced: list[int] = []
        while not self._grammar.is_stopped() and (tokens := self._grammar.compute_ff_tokens()):
            self._grammar.consume_tokens(tokens)
            forced += tokens
        self._require_sound()
        return forced

    def _require_sound(self) -> None:
        if self._grammar.is_error():
            raise StructureError(f"structure: the grammar got too complex: {error_of(self._grammar)}")


def error_of(grammar: Any) -> str:
    """What llguidance says is wrong with a grammar, without its parser's state."""
    return f"{grammar.get_error().partition('<state>')[0].strip():.1000}"


def allowing(words: Words, token: int) -> Words:
    """The mask that allows one token more."""
    words = words.copy()
    words[token // 32] |= np.uint32(1 << token % 32)
    return words


def _cleared(words: Words, tokens: Iterable[int]) -> Words:
    for token in tokens:
        words[token // 32] &= ~np.uint32(1 << token % 32)
    return words
