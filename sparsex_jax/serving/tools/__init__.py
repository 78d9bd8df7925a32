"""Finds tool calls in a model's text. Its chat template tells in which form the model was trained to write them.

    Hermes, Qwen   <tool_call>{"name": "tide", "arguments": {"port": "north"}}</tool_call>, among text
    Qwen3-Coder    <tool_call><function=tide><parameter=port>north</parameter></function></tool_call>, among text
    Mistral        [TOOL_CALLS][{"name": "tide", "arguments": {"port": "north"}}], or [TOOL_CALLS]tide{"port": "north"}
    Llama 3        {"name": "tide", "parameters": {"port": "north"}}, and nothing else; several with ; between them

Text that only looks like a call, or calls a tool that was not offered, stays text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.schemas import ChatRequest
from sparsex_jax.serving.tools.calls import Call, Form, Tools
from sparsex_jax.serving.tools.functions import Function, TaggedFunction
from sparsex_jax.serving.tools.json_calls import Hermes, Llama, LlamaMarked, Mistral, MistralList
from sparsex_jax.serving.tools.reader import CallReader, Reader
from sparsex_jax.text.chat import shows_tools
from sparsex_jax.text.end_tokens import special_ids
from sparsex_jax.text.templates import template_for

__all__ = ["Call", "Reader", "call_template", "marker_ids", "reader_for", "reader_of"]

# Where the vocabulary calls these special, answers to requests with tools have them all the same.
_MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")
_HERMES = "<tool_call>"  # a template in whose form tools are offered where the model's own has no tools


def reader_of(tokenizer: Any | None, request: ChatRequest) -> Reader | None:
    """A reader for one answer to a request. None if it offers no tools, or the template's form is unknown."""
    template = call_template(tokenizer, request)
    return reader_for(template, request.offered_tools or ())


def call_template(tokenizer: Any | None, request: ChatRequest) -> str | None:
    """The template in whose form the answer to a request has calls. None if it offers no tools."""
    if tokenizer is None or not request.offered_tools:
        return None
    try:
        shown = shows_tools(tokenizer, request.chat_template)
        return template_for(tokenizer, request.chat_template, tools=True).text if shown else _HERMES
    except InvalidRequestError:  # which the request is refused with
        return None


def reader_for(template: str | None, tools: Iterable[Any]) -> Reader | None:
    """A reader for one answer. None if no tools are offered, or the template's form of calls is unknown.

    Args:
      template: the model's chat template.
      tools: the offered tools, as OpenAI describes them.
    """
    offered = Tools(tools)
    if not offered or not isinstance(template, str):
        return None
    forms = _forms(template, offered)
    return CallReader(forms, offered) if forms else None


def _forms(template: str, offered: Tools) -> list[Form]:
    tagged = [Hermes()] if "<tool_call>" in template else []
    if "<function=" in template:
        return [TaggedFunction(), *tagged, Function()]
    if tagged:
        return [*tagged]
    if "[TOOL_CALLS]" in template:
        return [Mistral()] if offered.any_strict else [Mistral(), MistralList()]  # without a mark, nothing is masked
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return [LlamaMarked(), Llama()] if is_llama or "<|python_tag|>" in template else []


def marker_ids(tokenizer: Any | None) -> tuple[int, ...]:
    """The special tokens that mark calls."""
    return special_ids(tokenizer, _MARKERS)
