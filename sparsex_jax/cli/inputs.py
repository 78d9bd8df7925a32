"""Reads the prompt and the files that a command names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text.encoding import Prompt


def read_prompt(prompt: str) -> str:
    """The prompt as given, or the text on standard input for `-`. Raises InvalidRequestError if it is empty."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:  # checked here because a chat template would make a valid prompt of it
        raise InvalidRequestError("prompt is empty; it must have at least 1 token")
    return text


def read_text(path: Path) -> str:
    """The text in a file. Raises InvalidRequestError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8 text") from error


def as_prompt(text: str, tokenizer: Any, chat: bool | None) -> Prompt:
    """The text itself, or a user's message with it.

    Args:
      chat: whether to make it a message. None: if the tokenizer has a chat template.
    """
    if chat is None:
        chat = bool(tokenizer and tokenizer.chat_template)
    return [{"role": "user", "content": text}] if chat else text
