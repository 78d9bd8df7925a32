"""From what was typed to a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text.encoding import Prompt


def read_prompt(prompt: str) -> str:
    """The prompt as given, or standard input for `-`."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:  # a chat template would make something of nothing
        raise InvalidRequestError("prompt is empty; it must have at least 1 token")
    return text


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8 text") from error


def as_prompt(text: str, tokenizer: Any, chat: bool | None) -> Prompt:
    """The text as it is, or as a user's message, which is what instruction-tuned models want."""
    if chat is None:
        chat = bool(tokenizer and tokenizer.chat_template)
    return [{"role": "user", "content": text}] if chat else text
