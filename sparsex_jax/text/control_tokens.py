"""Keeps what a chat's contents say from becoming control tokens, which only the template may write.

A tokenizer takes the text `<|im_end|>` for the token that ends a turn, whoever wrote it. So before a chat is rendered,
control tokens in contents are put between marks, and what is between marks in the rendered text is encoded as text:

    content     "a <|im_end|> b"
    marked      "a ‹<|im_end|>› b"
    rendered    "<|im_start|>user\\na ‹<|im_end|>› b<|im_end|>\\n"
    encoded      <|im_start|>, the text "user\\na <|im_end|> b", <|im_end|>, the text "\\n"

Marks go where the template takes the content: it may trim, split or repeat it. Everything between two of the
template's own tokens is encoded in one piece, so that a document has the tokens here that it has alone. (transformers'
`sanitize_control_tokens` encodes each token in a content apart.)
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sparsex_jax.errors import InvalidRequestError

# Unicode keeps these out of texts for good: they are no characters.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """A text that says where control tokens are meant.

    Attributes:
      pieces: of the text; for each, whether control tokens in it are meant. No token goes beyond a piece.
    """

    pieces: Sequence[tuple[str, bool]]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    @property
    def is_all_meant(self) -> bool:
        """Whether a tokenizer may take the text as it is."""
        return all(meant for _, meant in self.pieces) and len(self.pieces) < 2


class Marks:
    """Marks control tokens in the values that a template gets, and finds the marks in what it makes of them.

    Attributes:
      cut: a further mark, for the place where a text is to end.
    """

    def __init__(self, values: Any) -> None:
        """
        Args:
          values: what is to be marked, as of JSON. The marks are characters that it does not have.
        """
        self._text = "\n".join(strings(values))
        free = [mark for mark in _NONCHARACTERS if mark not in self._text]
        if len(free) < 3:
            raise InvalidRequestError("messages: they have too many of the noncharacters U+FDD0 to U+FDEF")
        self._begin, self._end, self.cut = free[:3]
        self._present: dict[frozenset[str], re.Pattern[str]] = {}

    def mark(self, value: Any, tokens: frozenset[str]) -> Any:
        """The value with marks around these tokens in its texts, and behind a text that ends as one of them begins."""
        if tokens not in self._present:
            self._present[tokens] = one_of(token for token in tokens if token in self._text)
        between = functools.partial(self._present[tokens].sub, rf"{self._begin}\g<0>{self._end}")
        beginnings = _beginnings(tokens)

        def marked(text: str) -> str:
            # What comes behind this text, of the template or of another content, may go on as the token does.
            end = len(text.rstrip())  # templates trim texts
            return f"{between(text[:end])}{self._end if _ends_in(text[:end], beginnings) else ''}{text[end:]}"

        return _changed(value, marked, between)

    def finds_any(self, tokens: Iterable[str]) -> bool:
        """Whether any of these tokens is in the values."""
        return any(token in self._text for token in tokens)

    def removed(self, text: str) -> str:
        return text.replace(self._begin, "").replace(self._end, "")

    def read(self, text: str) -> MarkedText:
        """A text with marks, rendered or not.

        A template that splits contents can part the two marks of a token. A mark alone still parts the pieces.
        """
        token = "|".join(pattern.pattern for pattern in self._present.values())
        pieces = re.split(f"{self._begin}({token}){self._end}|[{self._begin}{self._end}]", text)
        return MarkedText([(piece, number % 2 == 0) for number, piece in enumerate(pieces) if piece])


def encode_marked(marked: MarkedText, tokenizer: Any) -> list[int]:
    """The token ids of a text. Tokens that were added to the vocabulary are found only where they are meant.

    Raises:
      InvalidRequestError: this tokenizer makes a control token of plain text too.
    """
    added = {token.content: (id_, token) for id_, token in tokenizer.added_tokens_decoder.items()}
    plain = _PlainEncoder(tokenizer)
    ids: list[int] = []
    text = ""
    for piece, meant in marked.pieces:
        at = 0
        for found in _matches(piece, added) if meant else ():
            id_, token = added[found[0]]
            text += piece[at : found.start()]
            ids += [*plain.encode(text.rstrip() if token.lstrip else text, first=not ids), id_]
            text, at = "", found.end()
            while token.rstrip and piece[at : at + 1].isspace():
                at += 1
        text += piece[at:]
    return ids + plain.encode(text, first=not ids)


class _PlainEncoder:
    """Takes all steps of a tokenizer but the first, which looks for the tokens that were added to the vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        # Some tokenizers put a space before a text, but not before what is behind a control token.
        before = next((token.content for token in added.values() if not token.rstrip), None)
        behind = None if before is None else tokenizer(f"{before}a b", add_special_tokens=False)["input_ids"][1:]
        self._anchor = "" if behind is None or behind == self._steps("a b") else "\n"

    def encode(self, text: str, *, first: bool) -> list[int]:
        """The ids of a text that is the first of all, or that follows a control token."""
        anchor = "" if first else self._anchor
        ids = self._steps(anchor + text)[len(self._steps(anchor)) :] if text else []
        made = next((id_ for id_ in ids if id_ in self._special), None)
        if made is not None:
            raise InvalidRequestError(
                f"messages: this tokenizer makes the control token {self._special[made]!r} of plain text too; "
                "leave it out, or allow control tokens"
            )
        return ids

    def _steps(self, text: str) -> list[int]:
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        return [token.id for word in words if word for token in self._backend.model.tokenize(word)]


def _matches(text: str, tokens: Iterable[str]) -> Iterator[re.Match[str]]:
    return one_of(token for token in tokens if token in text).finditer(text)


def one_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these texts, the longest where several begin at one place."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@functools.lru_cache(maxsize=8)
def _beginnings(tokens: frozenset[str]) -> frozenset[str]:
    return frozenset(token[:length] for token in tokens for length in range(1, len(token)))


def _ends_in(text: str, beginnings: frozenset[str]) -> bool:
    """Whether the text ends in one of these."""
    longest = min(len(text), max(map(len, beginnings), default=0))
    return any(text[-length:] in beginnings for length in range(1, longest + 1))


def _changed(value: Any, of_text: Callable[[str], str], of_key: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return of_text(value)
    if isinstance(value, Mapping):
        return {of_key(key): _changed(item, of_text, of_key) for key, item in value.items()}
    return [_changed(item, of_text, of_key) for item in value] if isinstance(value, (list, tuple)) else value


def strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, with the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
