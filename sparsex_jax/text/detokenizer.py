"""The detokenizer: turns generated tokens into text while they come, without half characters or stop strings.

A token's text depends on the tokens before it: a character may be spread over several tokens, and a tokenizer may drop
the space that a text begins with. Decoding a token alone would be wrong, and decoding the whole answer for each token
would be slow. So a window of the last few tokens is decoded, and the characters that were returned before are cut off.
For "a 🦜 b" in GPT-2's kind of tokens, where t1, t2 and t3 together are a space and the parrot:

    push            t0     t1         t2          t3            t4
    decoded         t0     t0 t1      t0 t1 t2    t0 .. t3      t1 .. t4
    text            "a"    "a \ufffd" "a \ufffd"  "a 🦜"        " 🦜 b"
    returned        "a"    " "        ""          "🦜"          " b"
    window after    t0     t0 t1      t0 t1 t2    t1 t2 t3      t4
    num_decoded     1      1          1           3             1
    num_returned    1      2          2           2             2
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from typing import Any

from sparsex_jax.text.end_tokens import control_token_ids

_INCOMPLETE = "\ufffd"  # the decoder's replacement for bytes that are not (yet) a whole character
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_PENDING = 8  # after this many tokens that do not end in a whole character, the window is cut
# Tokens that a cut keeps: 4 bytes or more, behind which UTF-8 decodes the same wherever decoding began.
_SYNCHRONISED = 4
_CONTEXT = 16  # tokens of the prompt that new ones are decoded behind; some of them may be special and have no text


class Detokenizer:
    """The text of one sequence's new tokens.

    The texts that `push` and `finish` return, joined, are what decoding all tokens at once gives, up to the first stop
    string.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        end_tokens: Iterable[int] = (),
        shown_tokens: Iterable[int] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """
        Args:
          tokenizer: a fast tokenizer of transformers. Spaces stay as they are (no `clean_up_tokenization_spaces`).
          stop: strings that end the text. The name of a special token ends it at that token.
          end_tokens: count as special tokens, whatever the vocabulary calls them.
          shown_tokens: special tokens that are not left out.
          include_stop: whether the text contains the string that ended it.
          skip_special_tokens: whether the text leaves out special tokens.
        """
        special = control_token_ids(tokenizer, end_tokens)
        skipped = special.keys() - set(shown_tokens) if skip_special_tokens else set()
        self._characters = _Characters(tokenizer, skipped)
        self._stops = _StopSearch(stop, include_stop)
        self._stop_tokens = {id_: name for id_, name in special.items() if name in stop}
        self._include_stop = include_stop
        self._stop_token: int | None = None  # the one that was found

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Behind it no more text is returned."""
        return self.stopped_by is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found if self._stop_token is None else self._stop_tokens[self._stop_token]

    def follow(self, prompt: Sequence[int]) -> None:
        """Decode what is pushed behind this prompt, so that prompt and text together are the text of all tokens.

        Call it before the first `push`. A character that the prompt ends within belongs to the new text.
        """
        self._characters.follow(prompt)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token and return the new text that later tokens cannot change.

        Args:
          may_stop: whether stop strings are looked for, which begin in the text of this token or later.
        """
        if may_stop and token in self._stop_tokens:
            self._stop_token = token
            return ""
        text = self._characters.push(token)
        return self._stops.push(text) if may_stop else text

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings, so that the text may end at any token."""
        return self._stops.is_used or bool(self._stop_tokens)

    def push_all(self, tokens: Sequence[int]) -> str:
        """Add several tokens at once, where no stop string is looked for. What is returned is what `push` returns for
        each of them, together; it costs as much as for one."""
        return self._characters.push_all(tokens)

    def finish(self) -> str:
        """Return the text that was held back. No token may be pushed afterwards."""
        text = self._stops.push(self._characters.finish()) + self._stops.finish()
        if self._stop_token is None or not self._include_stop:
            return text
        return text + self._stop_tokens[self._stop_token]


class _Characters:
    """Turns tokens into whole characters. A token costs as much at the end of a long answer as at its beginning."""

    def __init__(self, tokenizer: Any, skipped: Container[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer  # whose `decode` takes a quarter of the time of the tokenizer's
        self._skipped = skipped
        self._bytes_fall_back = bytes_fall_back(tokenizer)
        self._window: list[int] = []
        self._num_decoded = 0  # leading tokens of the window that are there as context: all their text was returned
        self._num_returned = 0  # leading characters of the window's text that were returned

    def follow(self, prompt: Sequence[int]) -> None:
        for token in prompt[self._start_of_context(prompt) :]:
            self.push(token)
        text = self._decode(self._window)
        self._num_returned = len(text) - text.endswith(_INCOMPLETE)

    def _start_of_context(self, prompt: Sequence[int]) -> int:
        """Where the last tokens of a prompt begin, without a cut between byte tokens, which a decoder reads as one."""
        start = max(0, len(prompt) - _CONTEXT)
        while start and self._is_byte(prompt[start]):
            start -= 1
        return start

    def push(self, token: int) -> str:
        return self.push_all((token,))

    def push_all(self, tokens: Iterable[int]) -> str:
        shown = [token for token in tokens if token not in self._skipped]
        if not shown:
            return ""
        self._window += shown
        if self._is_byte(shown[-1]):
            return ""  # a decoder reads a run of byte tokens as one: if its bytes are not valid UTF-8, all are replaced
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE):
            return self._return_all_but_last(text)
        return self._return_all(text)

    def finish(self) -> str:
        return self._return_all(self._decode(self._window))

    def _return_all(self, text: str) -> str:
        """Return the new text, and keep only its tokens in the window, as the context of the next token."""
        new = text[self._num_returned :]
        self._window = self._window[self._num_decoded :]
        self._num_decoded = len(self._window)
        self._num_returned = len(self._decode(self._window))
        return new

    def _return_all_but_last(self, text: str) -> str:
        """Return the new text without its last character, a replacement that the next tokens may complete.

        A decoder replaces the longest possible beginning of a character by one replacement, so no other can change.
        """
        new = text[self._num_returned : -1]
        self._num_returned = max(self._num_returned, len(text) - 1)
        if len(self._window) - self._num_decoded > _LONGEST_PENDING:
            self._cut(text)
        return new

    def _cut(self, text: str) -> None:
        """Drop the window's beginning, so that bytes which never become text do not make it longer and longer.

        A cut between two characters leaves the text of the rest as it is, now and after further tokens. A character
        has at most 4 bytes, so of 4 cuts in a row at least one is between two characters.
        """
        for keep in range(_SYNCHRONISED, 2 * _SYNCHRONISED):
            before, rest = self._decode(self._window[:-keep]), self._window[-keep:]
            if before + self._decode(rest) == text:
                self._window, self._num_decoded, self._num_returned = rest, 0, self._num_returned - len(before)
                return

    def _is_byte(self, token: int) -> bool:
        return self._bytes_fall_back and is_byte_token(self._tokenizer.convert_ids_to_tokens(token) or "")

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)


def is_byte_token(name: str) -> bool:
    """Whether a token is named like the byte tokens of SentencePiece, `<0xE2>`."""
    return bool(_BYTE_TOKEN.fullmatch(name))


def bytes_fall_back(tokenizer: Any) -> bool:
    """Whether tokens such as `<0xE2>` stand for bytes, as in SentencePiece vocabularies, and not for their own name."""
    token = tokenizer.convert_tokens_to_ids("<0xE2>")  # the unknown token's id, or None, if there is no such token
    known = token is not None and tokenizer.convert_ids_to_tokens(token) == "<0xE2>"
    return known and tokenizer.decode([token]) == _INCOMPLETE


class _StopSearch:
    """Holds text back while it may be part of a stop string, and drops it if it is.

    Attributes:
      found: the stop string that was found.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """
        Args:
          include: whether the text that is returned contains the string that was found.
        """
        self.found: str | None = None
        self._include = include
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""

    @property
    def is_used(self) -> bool:
        return bool(self._matchers)

    def push(self, text: str) -> str:
        """Return the text up to the earliest stop string; if there is none, all but an end that may begin one.

        With the stop string "abab": `push("xaba")` returns "x" and holds "aba"; `push("b")` finds the string, which
        begins 3 characters before the new text, and returns "".
        """
        if self.found is not None:
            return ""
        before, self._held = len(self._held), self._held + text
        found = [(before + start, len(one)) for one in self._matchers if (start := one.push(text)) is not None]
        keep = max((matcher.matched for matcher in self._matchers), default=0)
        if not found:
            return self._release(len(self._held) - keep)
        start, length = min(found)
        self.found = self._held[start : start + length]
        return self._release(start + (length if self._include else 0))

    def finish(self) -> str:
        return "" if self.found is not None else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class _Matcher:
    """Knuth, Morris and Pratt's search for one string in text that comes in pieces.

    Attributes:
      matched: the length of the longest beginning of the string that the text so far ends in.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        self._string = string
        # fallback[i]: the length of the longest beginning, shorter than i, that string[:i] ends in.
        # For "abab" it is 0, 0, 0, 1, 2, since "aba" ends in "a" and "abab" in "ab".
        self._fallback = [0, 0]
        for character in string[1:]:
            self._fallback.append(self._next(self._fallback[-1], character))

    def __len__(self) -> int:
        return len(self._string)

    def push(self, text: str) -> int | None:
        """The index in `text` where the string begins, if `text` completes it. Negative: it begins in earlier text."""
        for at, character in enumerate(text):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self._string):
                return at + 1 - len(self._string)
        return None

    def _next(self, matched: int, character: str) -> int:
        while matched and self._string[matched] != character:
            matched = self._fallback[matched]
        return matched + (self._string[matched] == character)
