"""Encodes a prompt: turns text, token ids or chat messages into checked token ids."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int32

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text.chat import Chat, render
from sparsex_jax.text.control_tokens import MarkedText, encode_marked
from sparsex_jax.text.messages import turn_digests
from sparsex_jax.text.templates import Messages

# Text, token ids, or a chat: its messages alone ({"role": ..., "content": ...}), or with tools and more.
Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]] | Chat


def encode(
    prompt: Prompt | MarkedText,
    tokenizer: Any | None,
    config: ModelConfig,
    *,
    add_special_tokens: bool,
    name: str = "prompt",
) -> Int32[np.ndarray, "tokens"]:
    """The token ids of a prompt, int32.

    Args:
      prompt: text, token ids, chat messages or a chat, which the model's chat template turns into text, or such a
        text.
      tokenizer: a tokenizer of transformers. None: only ids can be encoded.
      config: gives the vocabulary's size.
      add_special_tokens: whether the tokenizer adds its special tokens (such as a begin token) to text. Messages get
        those of their template, and ids are taken as they are.
      name: what errors call the prompt.

    Raises:
      InvalidRequestError: the prompt is empty or of another type, an id is outside the vocabulary, text came without
        a tokenizer, or a chat is wrong in a field or refused by the template.
    """
    if isinstance(prompt, MarkedText):
        return _checked(_encode_marked(prompt, tokenizer, add_special_tokens, name), config, name)
    if isinstance(prompt, str):
        return _checked(_tokenize(prompt, tokenizer, add_special_tokens, name), config, name)
    if isinstance(prompt, Chat):
        return _checked(encode_chat(prompt, tokenizer), config, name)
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequestError(
            f"{name} has type {type(prompt).__name__}; it must be text, token ids or a list of chat messages"
        )
    if len(prompt) and all(isinstance(message, Mapping) for message in prompt):
        return _checked(encode_chat(Chat(cast(Messages, prompt)), tokenizer), config, name)
    return _checked(prompt, config, name)


def turns_of(prompt: Prompt | MarkedText) -> frozenset[bytes]:
    """Digests of what the messages of a chat say (`turn_digests`); of other prompts, none."""
    messages: Any = prompt.messages if isinstance(prompt, Chat) else prompt
    listed = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    is_chat = listed and all(isinstance(each, Mapping) for each in messages)
    return turn_digests(messages) if is_chat else frozenset()


def _tokenizer(tokenizer: Any | None, name: str) -> Any:
    if tokenizer is None:
        raise InvalidRequestError(f"{name} is text, but this model has no tokenizer; pass token ids")
    return tokenizer


def _tokenize(text: str, tokenizer: Any | None, add_special_tokens: bool, name: str) -> list[int]:
    _check_unicode(text, name)
    return _tokenizer(tokenizer, name)(text, add_special_tokens=add_special_tokens)["input_ids"]


def _check_unicode(text: str, name: str) -> None:
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequestError(f"{name} has a lone surrogate, which is not valid Unicode text")


def encode_chat(chat: Chat, tokenizer: Any) -> list[int]:
    """The ids of a chat in the model's template, whatever the model's vocabulary. Errors as `encode`."""
    return _encode_marked(render(chat, tokenizer), tokenizer, False, "messages")


def _encode_marked(marked: MarkedText, tokenizer: Any | None, add_special_tokens: bool, name: str) -> list[int]:
    if marked.is_all_meant:
        return _tokenize(marked.text, tokenizer, add_special_tokens, name)
    _check_unicode(marked.text, name)
    tokenizer = _tokenizer(tokenizer, name)
    before = tokenizer("", add_special_tokens=True)["input_ids"] if add_special_tokens else []
    return before + encode_marked(marked, tokenizer)


def _checked(ids: Any, config: ModelConfig, name: str) -> Int32[np.ndarray, "tokens"]:
    if len(ids) == 0:
        raise InvalidRequestError(f"{name} is empty; it must have at least 1 token")
    is_array = isinstance(ids, np.ndarray)
    kinds = {ids.dtype.type} if is_array else set(map(type, ids))
    wrong = {kind for kind in kinds if not issubclass(kind, (int, np.integer)) or kind is bool}
    if wrong or (is_array and ids.ndim != 1):
        at = next((at for at, id_ in enumerate(ids) if type(id_) in wrong), 0)
        flat = "a flat list of integer token ids"
        forms = f"text, {flat} or a list of chat messages" if name == "prompt" else flat
        raise InvalidRequestError(f"{name} must be {forms}; {name}[{at}] is {reprlib.repr(ids[at])}")
    # Lists may have integers of any size, which NumPy has not.
    for worst in (ids.min(), ids.max()) if is_array else (min(ids), max(ids)):
        if not 0 <= worst < config.vocab_size:
            raise InvalidRequestError(f"{name} has token id {worst}; ids must be from 0 to {config.vocab_size - 1}")
    return np.asarray(ids, np.int32)
