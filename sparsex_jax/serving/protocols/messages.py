"""Anthropic's `/v1/messages`: requests become chats.

    system                         a system message
    user: tool_result, text        a message of the role `tool` for each result, and one of the user
    assistant: thinking, text,     one message with thought, content and calls; the last message of all is continued
      tool_use

Turns of one role that follow each other are one turn, as with Anthropic.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field
from starlette.responses import Response

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
from sparsex_jax.serving.protocols.messages_reply import MessagesReply
from sparsex_jax.serving.routing import Caller, Served, keyed_router
from sparsex_jax.serving.schemas import Number, Object, Objects, StopStrings, TextOrObjects, Thinking
from sparsex_jax.serving.service import Asked, Pieces, Service
from sparsex_jax.text.templates import stored_templates, template_for

router = keyed_router()

_BILLING = "x-anthropic-billing-header"  # a block of Claude Code's: no instruction, and another in each request
_BETWEEN = "\n"  # between the texts of blocks
_NAMES = {
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tool_choice.function": "tool_choice",
    "function.name": "name",
    "function.parameters": "input_schema",
    "the parameters of": "the input_schema of",
    "stop": "stop_sequences",
}

Block = tuple[str, Fields]  # where it is, for errors, and what it is
Turn = tuple[str, Fields]  # a message of the chat, likewise


class InputMessage(Object):
    role: Literal["user", "assistant", "system"]
    content: TextOrObjects


class ToolChoice(Object):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Object):
    effort: str | None = Field(None, description="A variable of the chat template, if it has one.")
    format: dict[str, Any] | None = None


class CountTokensRequest(ChatFields):  # type: ignore[valid-type,misc]
    """A prompt, in Anthropic's form."""

    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=8192, fail_fast=True)]
    system: TextOrObjects | None = None
    tools: Objects | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Turns thinking on or off, where the chat template can.")
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = Field(None, description="All that was computed may be found again.")
    context_management: dict[str, Any] | None = Field(None, description="Only edits that change nothing here.")
    mcp_servers: Objects | None = None
    container: Any = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=0)] = Field(description="What does not fit is left out.")
    stop_sequences: StopStrings | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    inference_geo: Any = None
    speed: Any = None


class InputTokens(BaseModel):
    input_tokens: int


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat, as Anthropic's endpoint does."""
    tokenizer = service.worker.engine.tokenizer

    def intake(body: MessagesRequest, tenant: Tenant) -> Asked:
        chat, names = chat_of(body, tokenizer)
        with names:
            return service.asked_chat(chat, tenant, shortens=True)

    def make_reply(asked: Asked, pieces: Pieces) -> MessagesReply:
        return MessagesReply(asked, service, pieces, body.max_tokens)

    return await service.generate(request, body, tenant, intake, make_reply)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, service: Served, tenant: Caller) -> InputTokens:
    """How many tokens a prompt has."""
    service.models.adapter_of(body.model)
    return InputTokens(input_tokens=await service.tokenized(tenant, lambda: _num_tokens(body, service)))


def _num_tokens(body: CountTokensRequest, service: Service) -> int:
    chat, names = chat_of(body, service.worker.engine.tokenizer)
    with names:
        return len(service.intake.chat_tokens(chat))


# Requests ---------------------------------------------------------------------------------------------------


def chat_of(body: CountTokensRequest, tokenizer: Any | None = None) -> Named:
    """The chat that a request asks to continue, and the names of its fields here.

    Raises:
      RequestError: a field is wrong.
    """
    refuse(body, _REFUSED)
    _check_edits(body.context_management)
    turns = [*_system(body.system), *_turns(body.messages)]
    messages, names = [message for _, message in turns], Names(_names(body), [at for at, _ in turns])
    continued = _is_continued(messages[-1])
    choice = body.tool_choice
    fields = shared_fields(body) | {
        "messages": messages,
        "continue_final_message": continued or None,
        "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(choice) if choice and (body.tools or choice.type in _FORCES) else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "thinking": body.thinking and {"type": body.thinking.type},
        "response_format": _format(body),
        "reasoning_effort": _effort(body, tokenizer),
    }
    if isinstance(body, MessagesRequest):
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
        fields |= {"temperature": body.temperature, "top_p": body.top_p}
    return as_chat(fields, names)


_REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "mcp_servers": ("no servers of tools are asked", ([],)),
    "container": ("no code is run", ()),
}


def _check_edits(management: Mapping[str, Any] | None) -> None:
    """Raises RequestError if something is to be removed from the messages: only old thoughts are, by the template."""
    for edit in (management or {}).get("edits") or ():
        kind = edit.get("type") if isinstance(edit, Mapping) else edit
        if not str(kind).startswith("clear_thinking"):
            raise unsupported("context_management", f"an edit has type {kind!r:.60}, and messages are not edited")


def _names(body: CountTokensRequest) -> Mapping[str, str]:
    is_older = body.output_format is not None and not (body.output_config and body.output_config.format)
    name = "output_format" if is_older else "output_config.format"
    return _NAMES | {"response_format.json_schema": name, "response_format": name}


def _effort(body: CountTokensRequest, tokenizer: Any | None) -> str | None:
    """The effort, if the template has a variable for it. Agents send one to any model."""
    effort = body.output_config.effort if body.output_config else None
    if effort is None or not stored_templates(tokenizer):
        return None
    return effort if "reasoning_effort" in template_for(tokenizer, tools=bool(body.tools)).variables else None


def _format(body: CountTokensRequest) -> Fields | None:
    """The form that the answer is to have, as OpenAI describes it."""
    given = (body.output_config.format if body.output_config else None) or body.output_format
    if given is None:
        return None
    return {"type": given.get("type"), "json_schema": {"name": "output", "schema": given.get("schema"), "strict": True}}


def _tool(number: int, tool: Mapping[str, Any]) -> Fields:
    if tool.get("type") not in (None, "custom"):
        raise unsupported(
            f"tools[{number}]", f"it has type {tool['type']!r:.60}; only the client's own tools are known"
        )
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {"type": "function", "function": {to: tool[name] for name, to in names.items() if name in tool}}


_FORCES = ("any", "tool")


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name is missing", param="tool_choice.name", code="missing")
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _system(system: str | list[Fields] | None) -> list[Turn]:
    if not system:
        return []
    texts = [system] if isinstance(system, str) else [_shown(f"system[{n}]", block) for n, block in enumerate(system)]
    kept = [text for text in texts if not text.startswith(_BILLING)]
    return [("system", {"role": "system", "content": _BETWEEN.join(kept)})] if kept else []


def _is_continued(last: Fields) -> bool:
    """Whether the answer goes on where the last message ends. Raises RequestError if it cannot."""
    if last["role"] != "assistant":
        return False
    if "tool_calls" in last or not last["content"]:
        why = "its tool_use has no tool_result" if "tool_calls" in last else "it has no text"
        raise RequestError(f"messages: the answer is to continue the last one, but {why}", param="messages")
    return True


def _turns(messages: Sequence[InputMessage]) -> list[Turn]:
    turns: list[Turn] = []
    for role, same in itertools.groupby(enumerate(messages), lambda each: each[1].role):
        blocks = [block for number, message in same for block in _blocks(number, message)]
        turns += [(_message_of(blocks), _assistant(blocks))] if role == "assistant" else _user(role, blocks)
    return turns


def _blocks(number: int, message: InputMessage) -> list[Block]:
    at, content = f"messages[{number}].content", message.content
    if isinstance(content, str):
        return [(at, {"type": "text", "text": content})]
    return [(f"{at}[{index}]", block) for index, block in enumerate(content)]


def _message_of(blocks: Sequence[Block]) -> str:
    """The place of the message that the first of these blocks is in."""
    return blocks[0][0].partition(".")[0] if blocks else "messages"


def _user(role: str, blocks: Sequence[Block]) -> list[Turn]:
    """Messages of the user, and results of tools, in their order."""
    turns: list[Turn] = []
    for is_result, same in itertools.groupby(blocks, lambda block: block[1].get("type") == "tool_result"):
        if is_result:
            turns += [(at, _result(at, block)) for at, block in same]
        else:
            shown = list(same)
            content = _BETWEEN.join(_shown(at, block) for at, block in shown)
            turns.append((_message_of(shown), {"role": role, "content": content}))
    return turns or [(_message_of(blocks), {"role": role, "content": ""})]


def _result(at: str, block: Fields) -> Fields:
    content = block.get("content") or ""
    if not isinstance(content, str):
        content = _BETWEEN.join(_shown(f"{at}.content[{n}]", each) for n, each in enumerate(_objects(at, content)))
    text = f"Error: {content}" if block.get("is_error") else content
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _assistant(blocks: Sequence[Block]) -> Fields:
    texts, thoughts, calls = [], [], []
    for at, block in blocks:
        match block.get("type"):
            case "thinking":
                thoughts.append(string_of(at, block, "thinking"))
            case "redacted_thinking":
                pass  # nobody here can read it
            case "tool_use":
                calls.append(_call(at, block))
            case _:
                texts.append(_shown(at, block))
    message = {"role": "assistant", "content": _BETWEEN.join(texts)}
    message |= {"reasoning_content": _BETWEEN.join(thoughts)} if thoughts else {}
    return message | ({"tool_calls": calls} if calls else {})


def _call(at: str, block: Fields) -> Fields:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    return {
        "id": block.get("id"),
        "type": "function",
        "function": {"name": string_of(at, block, "name"), "arguments": arguments},
    }


def _shown(at: str, block: Fields) -> str:
    """A block as text. Raises RequestError if it is none."""
    kind = block.get("type")
    if kind == "text":
        return string_of(at, block, "text")
    source = block.get("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return _BETWEEN.join([*_titles(block), string_of(f"{at}.source", source, "data")])
    if kind == "search_result":
        found = (_shown(f"{at}.content[{n}]", each) for n, each in enumerate(_objects(at, block.get("content"))))
        return _BETWEEN.join([*_titles(block), *found])
    raise unsupported(at, f"it has type {kind!r:.60}, and the models here read text only")


def _titles(block: Fields) -> Iterator[str]:
    return (block[name] for name in ("title", "context") if isinstance(block.get(name), str))


def _objects(at: str, values: Any) -> Iterable[Fields]:
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise RequestError(f"{at}.content must be text or a list of blocks", param=f"{at}.content")
    return values
