"""What may be asked: the bodies of requests, as OpenAI names their fields, and vLLM those that OpenAI has not.

Fields that are not here are extras: `serving.extras` says which of them are taken, refused or named as ignored.

A body is a client's, and may be megabytes of anything. So no check here makes an error for each element of a list:
lists stop at their first error, a field of several types is checked as the type that it looks like, and lists of token
ids are only known to be lists: whoever makes an array of them checks them, off the event loop.
"""

from __future__ import annotations

import functools
import operator
import typing
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsex_jax.config import MAX_LOGIT_BIAS, MAX_LOGPROBS, METHODS, methods_by_option
from sparsex_jax.config.rounds import MAX_ROUND_ID, MAX_WAIT_MS, WAIT_MS
from sparsex_jax.config.sampling import MAX_STOP_LENGTH, MAX_STOPS
from sparsex_jax.config.structure import MAX_CHOICES

_MOST_FIELDS = 256
_MOST_MESSAGES = 8192  # and parts of one: checking so many takes 50 ms
Text = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Sharing = Literal["isolated", "pre_lr", "refresh", "rebase", "base_shared"]  # `reuse.adapters.SHARING`
_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
IDS = {"type": "array", "items": _ID, "minItems": 1}
_PROMPTS = {"anyOf": [{"type": "string", "minLength": 1}, IDS]}
TokenIds = Annotated[list[Any], Field(min_length=1), WithJsonSchema(IDS)]
Prompts = Annotated[
    list[Any],
    Field(min_length=1),
    WithJsonSchema({"anyOf": [IDS, {"type": "array", "items": _PROMPTS, "minItems": 1}]}),
]


PromptLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _unless_false(value: Any) -> Any:
    """False would be read as 0, which asks for log-probabilities."""
    return None if value is False else value


def _looks_like(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _text_or_object(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, (dict, BaseModel)) else None


# Text or a list, so that an error says what is wrong with the one that was sent.
_BY_LOOK = Discriminator(
    _looks_like, custom_error_type="text_or_list", custom_error_message="Input should be a string or a list"
)
_TEXT, _LIST = Tag("<text>"), Tag("<list>")
TextOrIds = Annotated[Annotated[Text, _TEXT] | Annotated[TokenIds, _LIST], _BY_LOOK]
TextOrPrompts = Annotated[Annotated[Text, _TEXT] | Annotated[Prompts, _LIST], _BY_LOOK]
_StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[_StopString], Field(max_length=MAX_STOPS, fail_fast=True)]
Stop = Annotated[Annotated[_StopString, _TEXT] | Annotated[StopStrings, _LIST], _BY_LOOK]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
TextOrObjects = Annotated[Annotated[str, _TEXT] | Annotated[Objects, _LIST], _BY_LOOK]
_Bias = Annotated[Any, WithJsonSchema({"type": "number", "minimum": -100, "maximum": 100})]
LogitBias = Annotated[dict[str, _Bias], Field(max_length=MAX_LOGIT_BIAS)]


def _option(name: str, methods: list[str]) -> tuple[Any, Any]:
    """The type of an option in the methods' classes, and its schema. It may be left out."""
    types = [typing.get_type_hints(METHODS[method])[name] for method in methods]
    described = "Of all methods." if len(methods) == len(METHODS) else f"Of {', '.join(methods)}."
    return functools.reduce(operator.or_, types), Field(None, description=described)


class Object(BaseModel):
    """A part of a body. It keeps fields that it has not, for `serving.extras` to judge."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "an object may have {limit} fields, not {number}",
                {"limit": _MOST_FIELDS, "number": len(value)},
            )
        return value


# Unknown fields are refused, but not by the schema, which would make an error for each.
_NO_EXTRAS: dict[str, Any] = {"additionalProperties": False}


class _StrictObject(Object):
    model_config = ConfigDict(strict=True, json_schema_extra=_NO_EXTRAS)


# The method and all methods' options. Those given win over what the server was started with. Which options a method has
# and which values are right is for its class to say.
ReuseOptions: type[BaseModel] = create_model(
    "ReuseOptions",
    __base__=_StrictObject,
    method=(str, Field(None, description=f"One of {', '.join(METHODS)}.")),
    **{name: _option(name, methods) for name, methods in methods_by_option().items()},  # type: ignore[call-overload]
)


class StreamOptions(Object):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Usage in every chunk, with include_usage.")


class JsonSchema(Object):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema in any case.")


class ResponseFormat(Object):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="Of the type json_schema.")


Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
AnySchema = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}]})]


class StructuredOutputs(Object):
    """What the answer is, as vLLM has it: one of these."""

    json_: AnySchema | None = Field(None, alias="json", description="A JSON schema, or text of one.")
    regex_: Text | None = Field(None, alias="regex")
    choice_: Choices | None = Field(None, alias="choice")
    grammar_: Text | None = Field(None, alias="grammar", description="In llguidance's Lark, or llama.cpp's GBNF.")
    json_object: bool | None = None


class Thinking(Object):
    """Whether the model thinks before it answers, as DeepSeek and Anthropic name it."""

    type: Literal["enabled", "disabled", "adaptive"]


class PromptCacheOptions(Object):
    """How long the prompt and its answer stay in the store."""

    ttl: Annotated[Any, WithJsonSchema({"type": ["number", "string"]})] | None = Field(
        None, description="Seconds, or a time such as 30m or 24h; a day at most."
    )
    mode: Literal["implicit", "explicit"] | None = Field(
        None, description="Changes nothing: the whole prompt is pinned, with its answer."
    )


class RoundOptions(Object):
    """The round that the request's prompts are members of."""

    model_config = ConfigDict(strict=True)  # True is no size

    id: Annotated[str, Field(min_length=1, max_length=MAX_ROUND_ID)] = Field(
        description="The same for all members, and another for the next round."
    )
    size: Annotated[int, Field(ge=1)] = Field(description="How many members it has, at most --max-num-seqs.")
    wait_ms: Annotated[int, Field(ge=0, le=MAX_WAIT_MS)] | None = Field(
        None, description=f"How long this member waits for the others at most; by default {WAIT_MS}."
    )


class Asking(Object):
    """What all requests for answers have in common."""

    model: str | None = Field(None, description="The served model's name, or an adapter's; may be left out.")
    stream: bool | None = None


class Generate(Asking):
    """What chat and text completions have in common."""

    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Answers to each prompt.")
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Answers that are generated, of which the n of highest log-probability a token are returned."
    )
    echo: bool | None = Field(None, description="Of completions: the prompt stands before the answer.")
    prompt_logprobs: Annotated[PromptLogprobs | None, BeforeValidator(_unless_false)] = Field(
        None, description="Log-probabilities of the prompt's tokens, and of so many most probable ones in their places."
    )
    prompt_logprobs_start: Annotated[int, Field(gt=-(2**31), lt=2**31)] | None = Field(
        None,
        description="Only the prompt's tokens from here on get log-probabilities, counted from its end if negative. "
        "They are computed, and so is the token before them; what stands before that may be reused.",
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="0 prefills the prompt and no more.")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Nothing ends the answer before them.")
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(None, description="0 takes the most probable token.")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 or -1 keeps all.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: TokenIds | None = Field(None, description="No other tokens can be drawn.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None, description="Taken modulo 2**32. The seeds of further answers to a prompt follow it."
    )
    stop: Stop | None = Field(None, description="Empty strings stop nothing.")
    stop_token_ids: Annotated[list[Any], WithJsonSchema(IDS | {"minItems": 0})] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="False: special tokens are part of the text.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer adds its begin token to text. By default it does in completions only."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Only so many tokens from the prompt's end are used. -1: as many as fit."
    )
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="JSON, of a schema or any object.")
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | None = Field(None, description="As structured_outputs.json.")
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call in an answer.")
    reasoning_effort: str | None = Field(
        None, description="Of chats: a variable of the chat template, or `none`, which is as thinking that is disabled."
    )
    thinking: Thinking | None = Field(
        None, description="Of chats: turns thinking on or off, where the chat template has a variable for it."
    )
    include_reasoning: bool | None = Field(None, description="Of chats: false leaves out what the model thought.")
    separate_reasoning: bool | None = Field(None, description="Of chats: false leaves thoughts in the text.")
    return_token_ids: bool | None = Field(None, description="The ids of prompt and answer, beside the text.")
    return_tokens_as_token_ids: bool | None = Field(None, description="Log-probabilities name tokens token_id:ID.")
    cache_salt: Text | None = Field(None, description="Only requests with the same salt share what is stored.")
    reuse: ReuseOptions | None = Field(None, description="How stored KV is reused: a method and its options.")  # type: ignore[valid-type]
    keep: bool | None = Field(None, description="False: prompt and answer are not stored for later prompts.")
    sharing: Sharing | None = Field(
        None, description="What the adapter that is the model finds of others' work, where adapters share KV."
    )
    prompt_cache_key: str | None = Field(None, description="Names the pin. By default the request's id does.")
    prompt_cache_options: PromptCacheOptions | None = Field(
        None, description="With a ttl, prompt and answer are pinned: they are not evicted before."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        None, description="24h with a key is as a ttl of 24h."
    )
    round: RoundOptions | None = Field(
        None, description="Hold the prompt until all members of its round are there, and prefill them together."
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        None, description="Lower is earlier: a second in line for each, at most a minute."
    )
    return_token_map: bool | None = Field(
        None, description="Have `sparsex` say, token by token, what the prompt was and what was computed."
    )

    @property
    def num_answers(self) -> int:
        """How many are generated to each prompt."""
        return max(self.n or 1, self.best_of or 1)


class ContentPart(BaseModel):
    type: Literal["text"] = Field(description="Only text: the models here read nothing else.")
    text: str


_Parts = Annotated[list[ContentPart], Field(max_length=_MOST_MESSAGES, fail_fast=True)]
Content = Annotated[Annotated[str, _TEXT] | Annotated[_Parts, _LIST], _BY_LOOK]


class Message(Object):
    """A chat message. Whatever else it has goes to the chat template as it is."""

    role: Text
    content: Content | None = None
    tool_calls: Objects | None = None


class ToolName(Object):
    name: Text


class NamedTool(Object):
    type: Literal["function"] = "function"
    function: ToolName


_ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], _TEXT] | Annotated[NamedTool, Tag("<object>")],
    Discriminator(
        _text_or_object,
        custom_error_type="text_or_object",
        custom_error_message="Input should be 'auto', 'none', 'required' or an object that names a function",
    ),
]


class ChatRequest(Generate):
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Objects | None = Field(None, description="For the chat template to show to the model, which may call them.")
    tool_choice: _ToolChoice | None = Field(None, description="required or a function: the answer is calls only.")
    documents: Objects | None = Field(None, description="For the chat template to show, if it can.")
    chat_template: Text | None = Field(None, description="The name of one of the model's templates.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt ends with the beginning of an answer. Without it, unless one goes on."
    )
    continue_final_message: bool | None = Field(None, description="The answer goes on where the last message ends.")
    allow_control_tokens: bool | None = Field(
        None, description="Whether texts such as <|im_end|> in messages, tools and documents become control tokens."
    )

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class CompletionRequest(Generate):
    prompt: TextOrPrompts = Field(description="A text, token ids, or a list of either.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class KnowledgeRequest(Object):
    """A text to prefill and keep frozen, so that any prompt of the namespace can reuse it."""

    model_config = ConfigDict(json_schema_extra=_NO_EXTRAS)

    text: TextOrIds = Field(description="Text, or token ids.")
    preamble: TextOrIds | None = Field(None, description="Prefilled before the text, and dropped.")
    model: str | None = Field(None, description="An adapter under which the text is prefilled, and found.")
    sharing: Sharing | None = Field(
        None, description="Requests under any adapter find it that ask for the same, where adapters share KV."
    )
    company: bool | None = Field(
        None,
        description="Whether the server chooses what is prefilled before the text: the beginning of the namespace's "
        "prompts and other knowledge. By default as it was started, and not beside a preamble.",
    )
    cache_salt: Text | None = None
    allow_control_tokens: bool | None = Field(
        None, description="Whether texts such as <|im_end|> in the text become control tokens."
    )


class KnowledgeEntry(BaseModel):
    """A frozen segment.

    Attributes:
      uses: in how many lookups a page of it was found.
      company_tokens: how many tokens it was prefilled behind, a preamble's or those that the server chose; 0: alone.
      prefilled_tokens: how many were prefilled when it was remembered, those before it too.
      stale: other knowledge that it was prefilled behind was deleted since, and it was not made again yet.
      model: the adapter under which it was prefilled, or the model.
      sharing: what requests ask for that find it; `isolated`: those with the same model.
    """

    object: Literal["knowledge"] = "knowledge"
    handle: int
    model: str
    sharing: str
    num_tokens: int
    uses: int
    company_tokens: int
    prefilled_tokens: int
    stale: bool


class KnowledgeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KnowledgeEntry]


class KnowledgeDeleted(BaseModel):
    """What became of a text and its copies.

    Attributes:
      pages: of the store that nothing finds any more: the text's own, and those of prompts that held a copy of it.
      remaining_tokens: of the text that can still be found, since other knowledge has them too.
      stale: how many other texts were prefilled behind it. They are made again without it while the server is idle.
    """

    object: Literal["knowledge.deleted"] = "knowledge.deleted"
    handle: int
    deleted: Literal[True] = True
    num_tokens: int
    pages: int
    remaining_tokens: int
    stale: int


class PinEntry(BaseModel):
    """Pages that stay for a time.

    Attributes:
      num_tokens, pages: that it has. Pins that begin alike share pages.
    """

    object: Literal["pin"] = "pin"
    key: str
    num_tokens: int
    pages: int
    seconds_left: float


class PinList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PinEntry]


class PinDeleted(BaseModel):
    """A pin that was released, and what it had."""

    object: Literal["pin.deleted"] = "pin.deleted"
    key: str
    deleted: Literal[True] = True
    num_tokens: int
    pages: int


class Tier(BaseModel):
    """One of the places that KV is kept in.

    Attributes:
      bytes, limit: of KV, and how many there may be.
      hit_tokens: tokens that prompts found there since the server started.
    """

    name: Literal["device", "host", "disk"]
    bytes: int
    limit: int
    hit_tokens: int


class Store(BaseModel):
    """The store's pages by state, how many pins there are, how many tokens a page has, and the tiers: the store itself
    first.

    Attributes:
      base: pages of which nothing is left but rows that mirrors are made of.
      spare: pages of sequences that are stored as mirrors too. They are evicted first, and nothing is lost then.
      derived: pages of sequences that are stored as mirrors.
      saved: how many pages more the store would need without that.
      patch_rows: rows of single layers that mirrors have of their own.
      restored_pages: how many of their pages were restored for a prompt so far.
    """

    object: Literal["store"] = "store"
    pages: int
    free: int
    active: int
    frozen: int
    pinned: int
    base: int
    spare: int
    cached: int
    pins: int
    derived: int
    saved: int
    patch_rows: int
    restored_pages: int
    page_size: int
    tiers: list[Tier]


class ModelCard(BaseModel):
    """A model as OpenAI, vLLM (`root` to `max_model_len`) and Anthropic (`type` and what follows) describe it.

    Attributes:
      root: what an adapter was loaded from; of the model its name.
      parent: the model that an adapter adds to.
      default_sampling_params: what the model's own files recommend, which requests have that do not say otherwise.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sparsex-jax"
    root: str
    parent: str | None
    max_model_len: int
    type: Literal["model"] = "model"
    display_name: str
    created_at: str
    default_sampling_params: dict[str, float]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class Health(BaseModel):
    status: Literal["ok", "draining", "hung", "failed"]


class Version(BaseModel):
    version: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody
