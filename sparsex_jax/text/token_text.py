"""The text of single tokens, which a decoder of whole texts does not give."""

from __future__ import annotations

import functools
from typing import Any

_LOST = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """Texts and bytes of tokens by id, kept once found."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self.bytes_of = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """Part of a character shows as U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """As `text_of`, but different for different tokens: OpenAI writes parts of characters as `bytes:\\xe2`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        """The UTF-8 that a token stands for in the middle of a text."""
        if self._tokenizer is None:
            return b""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # ids of a padded vocabulary that stand for nothing
            return b""
        if name.startswith("<0x") and len(name) == 6:  # SentencePiece's bytes
            return bytes([int(name[3:5], 16)])
        if name.startswith("▁"):  # its space, which a decoder drops where a text begins
            return name.replace("▁", " ").encode()
        text = self._tokenizer.decode([token])
        if _LOST in text and all(character in _byte_of() for character in name):
            return bytes(_byte_of()[character] for character in name)
        return text.encode()


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's visible characters for bytes: those that can be seen stand for themselves, the others follow at 256."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
