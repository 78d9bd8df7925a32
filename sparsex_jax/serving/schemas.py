"""What may be asked: the bodies of requests, as OpenAI names their fields, and vLLM those that OpenAI has not.

Fields that are not here are ignored, as OpenAI's clients expect of servers that are not OpenAI's. Fields that are
here and would change the answer in a way this server cannot are refused, not ignored.
"""

from __future__ import annotations

import functools
import operator
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from sparsex_jax.config import MAX_LOGPROBS, METHODS, methods_by_option

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _option(name: str, methods: list[str]) -> tuple[Any, Any]:
    """The type of an option in the methods' classes, and its schema. It may be left out."""
    types = [typing.get_type_hints(METHODS[method])[name] for method in methods]
    described = "Of all methods." if len(methods) == len(METHODS) else f"Of {', '.join(methods)}."
    return functools.reduce(operator.or_, types), Field(None, description=described)


# The method and all methods' options. Those given win over what the server was started with. Which options a method has
# and which values are right is for its class to say.
ReuseOptions: type[BaseModel] = create_model(
    "ReuseOptions",
    __config__=ConfigDict(extra="forbid", strict=True),
    method=(str, Field(None, description=f"One of {', '.join(METHODS)}.")),
    **{name: _option(name, methods) for name, methods in methods_by_option().items()},  # type: ignore[call-overload]
)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text"] = Field(description="Only text: answers are not forced into a grammar.")


class Generate(BaseModel):
    """What chat and text completions have in common."""

    model: str | None = Field(None, description="The served model's name; may be left out.")
    n: Literal[1] | None = Field(None, description="Only 1: one answer for each prompt.")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 or -1 keeps all.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(None, description="Taken modulo 2**32.")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Text | None = Field(None, description="Only requests with the same salt share what is stored.")
    reuse: ReuseOptions | None = Field(None, description="How stored KV is reused: a method and its options.")  # type: ignore[valid-type]
    keep: bool = Field(True, description="Whether prompt and answer are stored for later prompts.")
    return_token_map: bool = Field(
        False, description="Have `sparsex` say, token by token, what the prompt was and what was computed."
    )


class ContentPart(BaseModel):
    type: Literal["text"] = Field(description="Only text: the models here read nothing else.")
    text: str


class Message(BaseModel):
    """A chat message. Whatever else it has goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(Generate):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = Field(
        None, description="For the chat template to show to the model, which may call them."
    )
    tool_choice: Literal["auto", "none"] | None = Field(None, description="No call can be forced.")
    response_format: ResponseFormat | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class CompletionRequest(Generate):
    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class KnowledgeRequest(BaseModel):
    """A text to prefill alone and keep frozen, so that any prompt of the namespace can reuse it."""

    model_config = ConfigDict(extra="forbid")

    text: Text | TokenIds = Field(description="Text, or token ids.")
    preamble: Text | TokenIds | None = Field(None, description="Prefilled before the text, and dropped.")
    cache_salt: Text | None = None


class KnowledgeEntry(BaseModel):
    """A frozen segment.

    Attributes:
      uses: in how many lookups a page of it was found.
    """

    object: Literal["knowledge"] = "knowledge"
    handle: int
    num_tokens: int
    uses: int


class KnowledgeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KnowledgeEntry]


class KnowledgeDeleted(BaseModel):
    object: Literal["knowledge.deleted"] = "knowledge.deleted"
    handle: int
    deleted: Literal[True] = True


class Store(BaseModel):
    """The store's pages by state, and how many tokens a page has."""

    object: Literal["store"] = "store"
    pages: int
    free: int
    active: int
    frozen: int
    cached: int
    page_size: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sparsex-jax"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "draining", "failed"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody
