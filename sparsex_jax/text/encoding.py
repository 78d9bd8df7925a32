"""Encodes a prompt: turns text, token ids or chat messages into checked token ids."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import InvalidRequestError

# Text, token ids, or chat messages ({"role": ..., "content": ...}).
Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]


def encode(
    prompt: Prompt, tokenizer: Any | None, config: ModelConfig, *, add_special_tokens: bool
) -> Int32[np.ndarray, "tokens"]:
    """The token ids of a prompt, int32.

    Args:
      prompt: text, token ids, or chat messages, which the tokenizer's chat template turns into text.
      tokenizer: a tokenizer of transformers. None: only ids can be encoded.
      config: gives the vocabulary's size.
      add_special_tokens: whether the tokenizer adds its special tokens (such as a begin token) to text. Messages get
        those of their template, and ids are taken as they are.

    Raises:
      InvalidRequestError: the prompt is empty or of another type, an id is outside the vocabulary, or text came
        without a tokenizer.
    """
    if isinstance(prompt, str):
        return _checked(_tokenize(prompt, tokenizer, add_special_tokens), config)
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequestError(
            f"prompt has type {type(prompt).__name__}; it must be text, token ids or a list of chat messages"
        )
    if len(prompt) and all(isinstance(message, Mapping) for message in prompt):
        return _checked(encode_chat(prompt, _tokenizer(tokenizer)), config)
    return _checked(prompt, config)


def _tokenizer(tokenizer: Any | None) -> Any:
    if tokenizer is None:
        raise InvalidRequestError("prompt is text, but this model has no tokenizer; pass token ids")
    return tokenizer


def _tokenize(text: str, tokenizer: Any | None, add_special_tokens: bool) -> list[int]:
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequestError("prompt has a lone surrogate, which is not valid Unicode text")
    return _tokenizer(tokenizer)(text, add_special_tokens=add_special_tokens)["input_ids"]


def encode_chat(messages: Any, tokenizer: Any) -> list[int]:
    """The ids of chat messages in the tokenizer's template, whatever the model's vocabulary. Errors as `encode`."""
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"prompt[{number}] is a chat message without a role")
    if not tokenizer.chat_template:
        raise InvalidRequestError("prompt is a list of chat messages, but this model's tokenizer has no chat template")
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return _tokenize(text, tokenizer, False)


def _checked(ids: Any, config: ModelConfig) -> Int32[np.ndarray, "tokens"]:
    if len(ids) == 0:
        raise InvalidRequestError("prompt is empty; it must have at least 1 token")
    is_array = isinstance(ids, np.ndarray)
    kinds = {ids.dtype.type} if is_array else set(map(type, ids))
    wrong = {kind for kind in kinds if not issubclass(kind, (int, np.integer)) or kind is bool}
    if wrong or (is_array and ids.ndim != 1):
        at = next((at for at, id_ in enumerate(ids) if type(id_) in wrong), 0)
        raise InvalidRequestError(
            "prompt must be text, a flat list of integer token ids or a list of chat messages; "
            f"prompt[{at}] is {reprlib.repr(ids[at])}"
        )
    # Lists may have integers of any size, which NumPy has not.
    for worst in (ids.min(), ids.max()) if is_array else (min(ids), max(ids)):
        if not 0 <= worst < config.vocab_size:
            raise InvalidRequestError(f"prompt has token id {worst}; ids must be from 0 to {config.vocab_size - 1}")
    return np.asarray(ids, np.int32)
