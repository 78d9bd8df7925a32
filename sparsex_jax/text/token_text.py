"""The text of single tokens, for log-probabilities: that which they have in the middle of a text."""

from __future__ import annotations

import functools
from typing import Any

from sparsex_jax.text.detokenizer import bytes_fall_back, is_byte_token

_LOST = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """The texts and bytes of tokens by id. The last 65,536 that were asked for are cached."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self.bytes_of = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """The token's text, with U+FFFD for a part of a character."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """As `text_of`, but parts of characters are written as OpenAI does, `bytes:\\xe2`, so that they differ."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for in the middle of a text. Empty without a tokenizer."""
        if self._tokenizer is None:
            return b""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the vocabulary is padded, and no token has this id
            return b""
        if is_byte_token(name) and bytes_fall_back(self._tokenizer):
            return bytes([int(name[3:5], 16)])
        text = _behind_itself(self._tokenizer, token)
        if _LOST in text and all(character in _byte_of() for character in name):
            return bytes(_byte_of()[character] for character in name)
        return text.encode()


def _behind_itself(tokenizer: Any, token: int) -> str:
    """The token's text behind the same token, since a decoder drops the space that a text begins with."""
    once, twice = (tokenizer.decode([token] * number, clean_up_tokenization_spaces=False) for number in (1, 2))
    return twice[len(once) :]


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's visible character for each byte: a printable byte stands for itself, the others are chr(256) and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
