"""OpenAI's `/v1/responses`: requests become chats. Nothing is stored: clients send the whole conversation each time.

instructions                             a system message
message                                  a message of its role
reasoning, message, function_call        of one turn of the assistant: one message with thought, content and calls
function_call_output                     a message of the role `tool`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from sparsex_jax.config import MAX_LOGPROBS
from sparsex_jax.serving.access import Tenant
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.protocols.chats import (
    ChatFields,
    Fields,
    Named,
    Names,
    as_chat,
    refuse,
    shared_fields,
    string_of,
    unsupported,
)
from sparsex_jax.serving.protocols.responses_reply import ResponsesReply
from sparsex_jax.serving.routing import Caller, Served, keyed_router
from sparsex_jax.serving.schemas import Number, Object, Objects, StreamOptions, TextOrObjects
from sparsex_jax.serving.service import Asked, Pieces

router = keyed_router()

_LOGPROBS = "message.output_text.logprobs"
_NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "tool_choice.function": "tool_choice",
    "function.name": "name",
    "function.parameters": "parameters",
    "messages": "input",
    "in the messages": "in the input",
    "of the messages": "of the input",
}
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")  # thoughts come as text, so there is nothing to encrypt


class Reasoning(Object):
    effort: str | None = None
    summary: str | None = Field(None, description="Thoughts are told as they are, not summed up.")
    generate_summary: str | None = None


class TextConfig(Object):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(ChatFields):  # type: ignore[valid-type,misc]
    input: TextOrObjects = Field(description="The user's text, or the items of the conversation.")
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="What does not fit is left out.")
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    store: bool | None = Field(None, description="Nothing is stored; the response says so.")
    previous_response_id: str | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    max_tool_calls: int | None = Field(None, description="Of OpenAI's own tools, of which there are none.")
    metadata: dict[str, Any] | None = None
    user: str | None = None
    stream_options: StreamOptions | None = None


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat, as OpenAI's newer endpoint does."""

    def intake(body: ResponsesRequest, tenant: Tenant) -> Asked:
        chat, names = chat_of(body)
        with names:
            return service.asked_chat(chat, tenant, shortens=True)

    def make_reply(asked: Asked, pieces: Pieces) -> ResponsesReply:
        return ResponsesReply(asked, service, pieces, echo_of(body), with_logprobs=_wants_logprobs(body))

    return await service.generate(request, body, tenant, intake, make_reply)


@router.get("/v1/responses/{response_id}", include_in_schema=False)
@router.delete("/v1/responses/{response_id}", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
async def stored_response(response_id: str, tenant: Caller) -> Response:
    """Nothing is stored."""
    raise RequestError(f"there is no response {response_id!r:.60}: responses are not stored", param=None, status=404)


# Requests ---------------------------------------------------------------------------------------------------

_REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "previous_response_id": ("responses are not stored; send the whole conversation as input", ()),
    "conversation": ("conversations are not stored; send the whole conversation as input", ()),
    "prompt": ("prompts are not stored", ()),
    "truncation": ("what does not fit is refused", ("disabled",)),
    "background": ("answers come in their own response", (False,)),
    "context_management": ("conversations are not shortened", ([],)),
    "moderation": ("nothing is moderated", ()),
}


def chat_of(body: ResponsesRequest) -> Named:
    """The chat that a request asks to continue, and the names of its fields here.

    Raises:
      RequestError: a field is wrong.
    """
    refuse(body, _REFUSED)
    _check_text(body)
    turns = [("instructions", {"role": "system", "content": body.instructions})] if body.instructions else []
    turns += _turns(body.input)
    return as_chat(
        shared_fields(body)
        | {
            "messages": [message for _, message in turns],
            "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
            "tool_choice": _tool_choice(body.tool_choice) if body.tools or body.tool_choice not in _LETS else None,
            "parallel_tool_calls": body.parallel_tool_calls,
            "max_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "logprobs": _wants_logprobs(body) or None,
            "top_logprobs": body.top_logprobs if _wants_logprobs(body) else None,
            "reasoning_effort": body.reasoning and body.reasoning.effort,
            "response_format": _format((body.text and body.text.format) or {}),
        },
        Names(_NAMES, [at for at, _ in turns]),
    )


def _check_text(body: ResponsesRequest) -> None:
    for name in (name for name in body.include or () if name not in _INCLUDED):
        raise unsupported("include", f"{name!r:.60} is not known; there are: {', '.join(_INCLUDED)}")
    if body.text and body.text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity", "a model's verbosity cannot be set")


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return _LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def _format(given: Mapping[str, Any]) -> Fields | None:
    """The form that the answer is to have, as chats describe it."""
    kind = given.get("type", "text")
    if kind != "json_schema":
        return {"type": kind}
    return {"type": kind, "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _tool(number: int, tool: Mapping[str, Any]) -> Fields:
    if tool.get("type") != "function":
        known = "only functions of the client are known"
        raise unsupported(f"tools[{number}]", f"it has type {tool.get('type')!r:.60}; {known}")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


_LETS = (None, "auto", "none")


def _tool_choice(choice: str | Mapping[str, Any] | None) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


Turn = tuple[str, Fields]  # where a message of the chat begins in the request, for errors, and what it is


def _turns(items: str | list[Fields]) -> list[Turn]:
    if isinstance(items, str):
        return [("input", {"role": "user", "content": items})]
    turns: list[Turn] = []
    for number, item in enumerate(items):
        at, kind = f"input[{number}]", item.get("type") or ("message" if "role" in item else "")
        if kind not in _ADDERS:
            known = ", ".join(_ADDERS)
            raise unsupported(at, f"it has type {kind!r:.60}; there are: {known}")
        _ADDERS[kind](at, item, turns)
    if not turns:
        raise RequestError("input has no items; it must have 1 at least", param="input")
    return turns


def _add_message(at: str, item: Fields, turns: list[Turn]) -> None:
    role, content = item.get("role"), _text(f"{at}.content", item.get("content"))
    last = turns[-1][1] if turns else {}
    if role == "assistant" and last.get("role") == role and not last["content"] and "tool_calls" not in last:
        last["content"] = content  # behind its thought
    else:
        turns.append((at, {"role": role, "content": content}))


def _add_call(at: str, item: Fields, turns: list[Turn]) -> None:
    function = {name: string_of(at, item, name) for name in ("name", "arguments")}
    call = {"id": string_of(at, item, "call_id"), "type": "function", "function": function}
    _assistant(at, turns).setdefault("tool_calls", []).append(call)


def _add_result(at: str, item: Fields, turns: list[Turn]) -> None:
    content = _text(f"{at}.output", item.get("output"))
    turns.append((at, {"role": "tool", "tool_call_id": string_of(at, item, "call_id"), "content": content}))


def _add_thought(at: str, item: Fields, turns: list[Turn]) -> None:
    parts = item.get("content") or item.get("summary") or []
    thought = _text(f"{at}.content", parts)
    turns.append((at, {"role": "assistant", "content": "", "reasoning_content": thought}))


_ADDERS: Mapping[str, Callable[[str, Fields, list[Turn]], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_result,
    "reasoning": _add_thought,
}


def _assistant(at: str, turns: list[Turn]) -> Fields:
    """The assistant's message that a call belongs to."""
    if not turns or turns[-1][1]["role"] != "assistant":
        turns.append((at, {"role": "assistant", "content": ""}))
    return turns[-1][1]


_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _text(at: str, content: Any) -> str:
    """A content as one text. Raises RequestError if it is none."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{at} must be text or a list of parts", param=at)
    return "".join(_part(f"{at}[{number}]", part) for number, part in enumerate(content))


def _part(at: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "refusal":
        return string_of(at, part, "refusal")
    if kind not in _TEXTS:
        raise unsupported(at, f"it has type {kind!r:.60}, and the models here read text only")
    return string_of(at, part, "text")


def echo_of(body: ResponsesRequest) -> Fields:
    """What a response says of its request."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": False, "parameters": None} | tool for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
