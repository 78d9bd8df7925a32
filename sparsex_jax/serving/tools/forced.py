"""Calls that an answer must have: a grammar of the form in which the model's template has it write calls.

The arguments of each call follow the schema of their function. An answer has one call or more, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsex_jax.config import Structure
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.schemas import ChatRequest
from sparsex_jax.serving.tools import call_template
from sparsex_jax.text.grammars import JSON_STYLE

Function = Mapping[str, Any]
_MAY_NAME_MORE = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
}


def forced_calls(tokenizer: Any | None, request: ChatRequest, named: str | None) -> Structure:
    """The grammar of an answer that calls.

    Args:
      named: the one function that is called, once. None: one of those offered, or several if the request allows it.

    Raises:
      InvalidRequestError: the template's form of calls is not known, or a function's schema is no object.
    """
    template = call_template(tokenizer, request)
    write = None if template is None else _form(template)
    if write is None:
        raise InvalidRequestError("calls cannot be forced, since the form in which this model writes them is not known")
    functions = [tool["function"] for tool in request.tools or ()]
    functions = [each for each in functions if named in (None, each["name"])]
    several = named is None and request.parallel_tool_calls is not False
    schemas = [f"arguments_{number}: %json {_schema(each)}" for number, each in enumerate(functions)]
    return Structure("grammar", "\n".join([*write(functions, several, _Tokens(tokenizer)), *schemas]))


class _Tokens:
    """Marks of calls in a grammar: as a token where the vocabulary calls them special, else as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, mark: str) -> str:
        return f"<[{self._special[mark]}]>" if mark in self._special else _text(mark)


def _form(template: str) -> Callable[[Sequence[Function], bool, _Tokens], list[str]] | None:
    """In the order of `sparsex_jax.serving.tools`, which reads the calls."""
    if "<function=" in template:
        return _tagged
    if "<tool_call>" in template:
        return _hermes
    if "[TOOL_CALLS]" in template:
        return _mistral_named if "[ARGS]" in template else _mistral
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return _llama if is_llama or "<|python_tag|>" in template else None


def _hermes(functions: Sequence[Function], several: bool, tokens: _Tokens) -> list[str]:
    call = rf'{tokens("<tool_call>")} "\n" body "\n" {tokens("</tool_call>")}'
    return [_start(several, r'"\n"'), f"call: {call}", *_objects(functions, "arguments")]


def _tagged(functions: Sequence[Function], several: bool, tokens: _Tokens) -> list[str]:
    """The arguments as JSON: as values in tags they would have no schema but for those that are no text."""
    bodies = [
        f'{_text(f"<function={each['name']}>")} "\\n" arguments_{number} "\\n" {_text("</function>")}'
        for number, each in enumerate(functions)
    ]
    call = rf'{tokens("<tool_call>")} "\n" body "\n" {tokens("</tool_call>")}'
    return [_start(several, r'"\n"'), f"call: {call}", f"body: {' | '.join(bodies)}"]


def _mistral(functions: Sequence[Function], several: bool, tokens: _Tokens) -> list[str]:
    more = ' (", " body)*' if several else ""
    return [f'start: {tokens("[TOOL_CALLS]")} "[" body{more} "]"', *_objects(functions, "arguments")]


def _mistral_named(functions: Sequence[Function], several: bool, tokens: _Tokens) -> list[str]:
    calls = [f"{_text(each['name'])} {tokens('[ARGS]')} arguments_{at}" for at, each in enumerate(functions)]
    return [_start(several, None), f"call: {tokens('[TOOL_CALLS]')} body", f"body: {' | '.join(calls)}"]


def _llama(functions: Sequence[Function], several: bool, tokens: _Tokens) -> list[str]:
    return [_start(several, '"; "'), "call: body", *_objects(functions, "parameters")]


def _start(several: bool, between: str | None) -> str:
    return f"start: call ({between or ''} call)*" if several else "start: call"


def _objects(functions: Sequence[Function], arguments: str) -> list[str]:
    """A rule for a call as an object."""
    heads = [f'{{"name": {json.dumps(each["name"])}, "{arguments}": ' for each in functions]
    return ["body: " + " | ".join(f'{_text(head)} arguments_{at} "}}"' for at, head in enumerate(heads))]


def _text(text: str) -> str:
    """A text as a grammar has it."""
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Function) -> str:
    """The schema of a function's arguments: an object, and of no other arguments than it names if it does not say."""
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidRequestError(f"the parameters of {function['name']!r:.60} are {parameters!r:.60}, and no object")
    schema = {"type": "object", **(parameters or {})}
    if "properties" in schema and not schema.keys() & _MAY_NAME_MORE:
        schema["additionalProperties"] = False
    return json.dumps(schema | {"x-guidance": JSON_STYLE})
