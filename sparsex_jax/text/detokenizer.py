"""From tokens to text as they come: never half a character, and never the beginning of a stop string.

A token's text depends on its neighbours (a character may be spread over several, a leading space may be dropped),
so it is not decoded alone, and all tokens are not decoded again each time either, but a window of the last few:

    tokens   ... t5 t6 t7 | t8 t9 | t10
                            given   new       text of t10 = decode(t8 t9 t10) without its first `given` characters
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what bytes become that are no whole character (yet)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_PENDING = 8  # tokens without a whole character at their end, before the window is cut
_SYNCHRONISED = 4  # bytes after which UTF-8 reads the same wherever one began, and no token has fewer than one


class Detokenizer:
    """The text of one answer. What `push` and `finish` return, joined, is the full decode up to a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """
        Args:
          tokenizer: a fast tokenizer of transformers. Its special tokens are left out, and spaces stay as they are
            (no `clean_up_tokenization_spaces`).
          stop: strings that end the text; not part of it.
        """
        self._characters = _Characters(tokenizer)
        self._stops = _StopSearch(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come. There is no more text then."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Take a token; returns the text that is certain now."""
        return self._stops.push(self._characters.push(token))

    def finish(self) -> str:
        """No more tokens: the text held back."""
        return self._stops.push(self._characters.finish()) + self._stops.finish()


class _Characters:
    """Whole characters from tokens. The cost of a token does not depend on how many came before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._bytes_fall_back = _bytes_fall_back(tokenizer)
        self._window: list[int] = []
        self._complete = 0  # so many tokens of the window had a whole character at their end when they were decoded
        self._given = 0  # so many characters of the window's text were given out

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""  # a run of them is decoded as one: if it is no valid text as a whole, none of it is
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE):
            return self._give_all_but_last(text)
        return self._give(text)

    def finish(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        """All of it. What was new now is what the next tokens are decoded behind."""
        new = text[self._given :]
        self._window = self._window[self._complete :]
        self._complete = len(self._window)
        self._given = len(self._decode(self._window))
        return new

    def _give_all_but_last(self, text: str) -> str:
        """Only the last replacement character can become another one: it stands for the longest possible beginning."""
        new = text[self._given : -1]
        self._given = max(self._given, len(text) - 1)
        if len(self._window) - self._complete > _LONGEST_PENDING:
            self._cut(text)
        return new

    def _cut(self, text: str) -> None:
        """Forget the window's beginning, where that leaves the text of the rest as it is, now and later.

        Bytes that never become text would otherwise make it longer and longer. Of several places to cut at, one is
        not within a character.
        """
        for keep in range(_SYNCHRONISED, 2 * _SYNCHRONISED):
            before, rest = self._decode(self._window[:-keep]), self._window[-keep:]
            if before + self._decode(rest) == text:
                self._window, self._complete, self._given = rest, 0, self._given - len(before)
                return

    def _is_byte(self, token: int) -> bool:
        return self._bytes_fall_back and bool(_BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _bytes_fall_back(tokenizer: Any) -> bool:
    """Whether tokens such as `<0xE2>` stand for bytes, as in SentencePiece vocabularies, and not for themselves."""
    token = tokenizer.convert_tokens_to_ids("<0xE2>")  # the unknown token's, or None, if there is no such token
    known = token is not None and tokenizer.convert_ids_to_tokens(token) == "<0xE2>"
    return known and tokenizer.decode([token]) == _INCOMPLETE


class _StopSearch:
    """Text that cannot be part of a stop string any more, and whether one was found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> str:
        """The text up to the earliest stop string that has come, or all but what may begin one."""
        if self.found:
            return ""
        before, self._held = len(self._held), self._held + text
        starts = [before + start for matcher in self._matchers if (start := matcher.push(text)) is not None]
        self.found = bool(starts)
        keep = max((matcher.matched for matcher in self._matchers), default=0)
        return self._release(min(starts) if starts else len(self._held) - keep)

    def finish(self) -> str:
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class _Matcher:
    """Knuth, Morris and Pratt's search for one string in text that comes in pieces.

    Attributes:
      matched: the longest beginning of the string that the text so far ends in.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        self._string = string
        self._fallback = [0, 0]  # the longest beginning that [:i] ends in, shorter than itself
        for character in string[1:]:
            self._fallback.append(self._next(self._fallback[-1], character))

    def push(self, text: str) -> int | None:
        """Where in the text the string begins (negative: in text before it) if it is complete now."""
        for at, character in enumerate(text):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self._string):
                return at + 1 - len(self._string)
        return None

    def _next(self, matched: int, character: str) -> int:
        while matched and self._string[matched] != character:
            matched = self._fallback[matched]
        return matched + (self._string[matched] == character)
