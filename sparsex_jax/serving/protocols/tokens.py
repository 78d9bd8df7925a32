"""vLLM's `/tokenize`, `/detokenize` and `/tokenizer_info`, by which clients need no tokenizer of their own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from sparsex_jax.serving import extras
from sparsex_jax.serving.protocols.chats import Names, as_chat
from sparsex_jax.serving.routing import Caller, Served, keyed_router
from sparsex_jax.serving.schemas import IDS, Message, Object, Objects
from sparsex_jax.serving.service import Service

router = keyed_router()

_OF_CHATS = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(Object):
    """A text, or a chat."""

    model: str | None = None
    prompt: str | None = Field(None, description="A text. Otherwise there are messages.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=8192, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer adds its begin token. By default it does to a text, not to a chat."
    )
    return_token_strs: bool | None = Field(None, description="The tokens' texts, beside their ids.")
    tools: Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt_or_messages", "there must be either prompt or messages")
        return self


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Object):
    model: str | None = None
    tokens: Annotated[list[Any], WithJsonSchema(IDS | {"minItems": 0})]


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval and others ask of a tokenizer, besides tokens."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = Field(None, description="Null where there is none, or where there are several.")


@router.get("/tokenizer_info")
async def tokenizer_info(service: Served, tenant: Caller) -> TokenizerInfo:
    """The names of special tokens, and the chat template."""
    tokenizer = service.worker.engine.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    told = {name: getattr(tokenizer, name, None) for name in names}
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        model_max_length=service.intake.lengths.context,
        **{name: value for name, value in told.items() if isinstance(value, str)},
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: Served, tenant: Caller) -> Tokenized:
    """The token ids of a text or of a chat, as the server would prefill them."""
    service.models.adapter_of(body.model)
    extras.forbid(body)
    ids, names = await service.tokenized(tenant, lambda: _tokenized(body, service))
    return Tokenized(count=len(ids), max_model_len=service.intake.lengths.context, tokens=ids, token_strs=names)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: Served, tenant: Caller) -> Detokenized:
    """The text of token ids, special tokens included."""
    service.models.adapter_of(body.model)
    extras.forbid(body)
    return Detokenized(prompt=await service.tokenized(tenant, lambda: service.intake.text_of_tokens(body.tokens)))


def _tokenized(body: TokenizeRequest, service: Service) -> tuple[list[int], list[str] | None]:
    ids = _ids(body, service)
    return ids, service.intake.token_names(ids) if body.return_token_strs else None


def _ids(body: TokenizeRequest, service: Service) -> list[int]:
    if body.prompt is not None:
        return service.intake.text_tokens(body.prompt, special=body.add_special_tokens is not False).tolist()
    fields = {"messages": body.messages, "add_special_tokens": body.add_special_tokens}
    chat = as_chat(fields | {name: getattr(body, name) for name in _OF_CHATS}, Names()).chat
    return service.intake.chat_tokens(chat).tolist()
