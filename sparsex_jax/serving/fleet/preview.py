"""What a request's body says to a router: the tokens of its prompts, its namespace, and with whom it must stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from fastapi.exceptions import RequestValidationError
from jaxtyping import Int32

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import SparsexError
from sparsex_jax.routing import Ask, Sketch
from sparsex_jax.serving.access import Tenant
from sparsex_jax.serving.bodies import parse
from sparsex_jax.serving.intake import rendered, split_prompts
from sparsex_jax.serving.protocols import messages, responses
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, Generate
from sparsex_jax.serving.thinking import Thoughts
from sparsex_jax.text.encoding import encode

_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as a replica will read it. It can be pickled.

    Attributes:
      tokens: of all prompts of the request, one behind the other.
      reuse: the options that the request names.
      model: the name that it asks for.
    """

    namespace: str
    tokens: Int32[np.ndarray, "tokens"]
    reuse: Mapping[str, Any]
    model: str | None


class Previewed(NamedTuple):
    """What a request's body says.

    Attributes:
      prompt: None: it has none, or is wrong.
    """

    ask: Ask
    prompt: Prompt | None


class Preview:
    """Reads requests as the replicas will. For one thread, since it tokenizes."""

    def __init__(self, tokenizer: Any | None, model: ModelConfig, sketch: Sketch, reasoning_parser: str) -> None:
        """
        Args:
          tokenizer, model, reasoning_parser: the replicas' own.
          sketch: the fleet's.
        """
        self._tokenizer, self._model, self._sketch = tokenizer, model, sketch
        self._thoughts = Thoughts(tokenizer, reasoning_parser)
        self._readers: dict[str, Callable[[bytes], Generate]] = {
            "/v1/chat/completions": lambda content: parse(content, ChatRequest),
            "/v1/completions": lambda content: parse(content, CompletionRequest),
            "/v1/messages": self._message,
            "/v1/responses": lambda content: responses.chat_of(parse(content, responses.ResponsesRequest)).chat,
        }

    def reads(self, path: str) -> bool:
        """Whether requests to this path have prompts."""
        return path in self._readers

    def read(self, path: str, content: bytes, tenant: Tenant) -> Previewed:
        """What a router has to know. A request that is wrong has no tokens: any replica says what is wrong with it.

        Args:
          path: one that `reads` knows.
          content: the body.
        """
        try:
            request = self._readers[path](content)
            namespace = tenant.store_namespace(request.cache_salt)
            tokens = np.concatenate(self._prompts(request))
        except (SparsexError, RequestValidationError):
            return self.blank(tenant)
        reuse: dict[str, Any] = request.reuse.model_dump(exclude_unset=True) if request.reuse is not None else {}
        prompt = Prompt(namespace, tokens, reuse, request.model)
        return Previewed(Ask.of(self._sketch, tokens, namespace, _group(request)), prompt)

    def blank(self, tenant: Tenant) -> Previewed:
        """A request of which nothing is known."""
        return Previewed(Ask.of(self._sketch, _NO_TOKENS, tenant.store_namespace(None)), None)

    def _message(self, content: bytes) -> ChatRequest:
        return messages.chat_of(parse(content, messages.MessagesRequest), self._tokenizer).chat

    def _prompts(self, request: Generate) -> list[Int32[np.ndarray, "tokens"]]:
        if isinstance(request, ChatRequest):
            return [self._encode(rendered(request, self._tokenizer, self._thoughts), False)]
        assert isinstance(request, CompletionRequest)
        special = request.add_special_tokens is not False
        return [self._encode(prompt, special) for prompt in split_prompts(request.prompt)]

    def _encode(self, prompt: Any, special: bool) -> Int32[np.ndarray, "tokens"]:
        return encode(prompt, self._tokenizer, self._model, add_special_tokens=special)


def _group(request: Generate) -> bytes | None:
    """The members of a round meet at one replica, and a pin moves only within one."""
    if request.round is not None:
        return b"round:" + request.round.id.encode(errors="replace")
    lives = request.prompt_cache_options is not None or request.prompt_cache_retention == "24h"
    if request.prompt_cache_key and lives:
        return b"pin:" + request.prompt_cache_key.encode(errors="replace")
    return None
