"""Calls that an answer must have, or may have: a grammar of the form in which the model's template has it write calls.

An answer that must call has one call or more, and nothing else, and the arguments of each follow the schema of their
function. In one that may call, the grammar begins at the mark of a call, and strict functions have such arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsex_jax.config import Behind, Lazy, Structure
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.schemas import ChatRequest
from sparsex_jax.serving.tools import call_template
from sparsex_jax.text.grammars import JSON_STYLE

Function = Mapping[str, Any]
_BEGIN, _END, _FUNCTION, _LIST, _PYTHON = "<tool_call>", "</tool_call>", "<function=", "[TOOL_CALLS]", "<|python_tag|>"
_MAY_NAME_MORE = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
}


class _Grammar(NamedTuple):
    """Calls in one form.

    Attributes:
      rules: of the grammar, but for its start and the arguments.
      calls: what an answer is that must call.
      call: what a call is in an answer that need not call.
      lazy: the marks at which such a call begins.
    """

    rules: list[str]
    calls: str
    call: str
    lazy: Lazy

    def text(self, start: str, functions: Sequence[Function], follow: Sequence[bool]) -> str:
        """
        Args:
          follow: for each function, whether its arguments are as its schema has them. Otherwise they are any object.
        """
        any_object = _json_rule({"type": "object"})
        schemas = [_schema(each) if follows else any_object for each, follows in zip(functions, follow, strict=True)]
        arguments = [f"arguments_{number}: {schema}" for number, schema in enumerate(schemas)]
        return "\n".join([f"start: {start}", *self.rules, *arguments])


_Write = Callable[[Sequence[Function], bool, "_Tokens"], _Grammar]


def forced_calls(tokenizer: Any | None, request: ChatRequest, named: str | None, behind: Behind | None) -> Structure:
    """The structure of an answer that calls.

    Args:
      named: the one function that is called, once. None: one of those offered, or several if the request allows it.
      behind: what may stand before the calls.

    Raises:
      InvalidRequestError: the template's form of calls is not known, or a function's schema is no object.
    """
    functions = [each for each in _offered(request) if named in (None, each["name"])]
    several = named is None and request.parallel_tool_calls is not False
    grammar = _writer(tokenizer, request, "forced")(functions, several, _Tokens(tokenizer))
    return Structure("grammar", grammar.text(grammar.calls, functions, [True] * len(functions)), behind)


def strict_calls(tokenizer: Any | None, request: ChatRequest, behind: Behind | None) -> Structure | None:
    """The structure of an answer that may call, where a function is strict; None where none is.

    From the mark of a call on, the answer is a call of a function that was offered, with arguments as its schema has
    them if it is strict, else with any. Arguments and errors as of `forced_calls`.
    """
    functions = _offered(request)
    strict = [each.get("strict") is True for each in functions]
    if not any(strict):
        return None
    several = request.parallel_tool_calls is not False
    grammar = _writer(tokenizer, request, "strict")(functions, several, _Tokens(tokenizer))
    return Structure("grammar", grammar.text(grammar.call, functions, strict), behind, grammar.lazy)


def _offered(request: ChatRequest) -> list[Function]:
    return [tool["function"] for tool in request.offered_tools or ()]


def _writer(tokenizer: Any | None, request: ChatRequest, wish: str) -> _Write:
    template = call_template(tokenizer, request)
    write = None if template is None else _form(template)
    if write is None:
        said = "the form in which this model writes them is not known"
        raise InvalidRequestError(f"calls cannot be {wish}, since {said}")
    return write


class _Tokens:
    """Marks of calls in a grammar: as a token where the vocabulary calls them special, else as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, mark: str) -> str:
        return f"<[{self._special[mark]}]>" if mark in self._special else _text(mark)


def _form(template: str) -> _Write | None:
    """In the order of `sparsex_jax.serving.tools`, which reads the calls."""
    if _FUNCTION in template:
        return _tagged
    if _BEGIN in template:
        return _hermes
    if _LIST in template:
        return _mistral_named if "[ARGS]" in template else _mistral
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return _llama if is_llama or _PYTHON in template else None


def _hermes(functions: Sequence[Function], several: bool, tokens: _Tokens) -> _Grammar:
    rules = [_tagged_call(tokens), *_objects(functions, "arguments")]
    return _Grammar(rules, _calls(several, r'"\n"'), "call", Lazy((_BEGIN,), repeats=several))


def _tagged(functions: Sequence[Function], several: bool, tokens: _Tokens) -> _Grammar:
    """The arguments as JSON: as values in tags they would have no schema but for those that are no text."""
    bodies = [
        f'{_text(f"{_FUNCTION}{each['name']}>")} "\\n" arguments_{number} "\\n" {_text("</function>")}'
        for number, each in enumerate(functions)
    ]
    rules = [_tagged_call(tokens), f"body: {' | '.join(bodies)}"]
    lazy = Lazy((_BEGIN, _FUNCTION), repeats=several)  # models leave out the tag around a function
    return _Grammar(rules, _calls(several, r'"\n"'), "call | body", lazy)


def _tagged_call(tokens: _Tokens) -> str:
    return rf'call: {tokens(_BEGIN)} "\n" body "\n" {tokens(_END)}'


def _mistral(functions: Sequence[Function], several: bool, tokens: _Tokens) -> _Grammar:
    calls = f'{tokens(_LIST)} "[" body{' (", " body)*' if several else ""} "]"'
    return _Grammar(_objects(functions, "arguments"), calls, calls, Lazy((_LIST,), repeats=several))


def _mistral_named(functions: Sequence[Function], several: bool, tokens: _Tokens) -> _Grammar:
    bodies = [f"{_text(each['name'])} {tokens('[ARGS]')} arguments_{at}" for at, each in enumerate(functions)]
    rules = [f"call: {tokens(_LIST)} body", f"body: {' | '.join(bodies)}"]
    return _Grammar(rules, _calls(several, ""), "call", Lazy((_LIST,), repeats=several))


def _llama(functions: Sequence[Function], several: bool, tokens: _Tokens) -> _Grammar:
    """Nothing may follow these calls, also in an answer that need not call."""
    calls = _calls(several, '"; "')
    rules = ["call: body", *_objects(functions, "parameters")]
    return _Grammar(rules, calls, f"{tokens(_PYTHON)}? {calls}", Lazy((_PYTHON,), first=("{",)))


def _calls(several: bool, between: str) -> str:
    return f"call ({between} call)*" if several else "call"


def _objects(functions: Sequence[Function], arguments: str) -> list[str]:
    """A rule for a call as an object."""
    heads = [f'{{"name": {json.dumps(each["name"])}, "{arguments}": ' for each in functions]
    return ["body: " + " | ".join(f'{_text(head)} arguments_{at} "}}"' for at, head in enumerate(heads))]


def _text(text: str) -> str:
    """A text as a grammar has it."""
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Function) -> str:
    """The schema of a function's arguments: an object, and of no other arguments than it names if it does not say.

    A function without parameters has none, as OpenAI says.
    """
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidRequestError(f"the parameters of {function['name']!r:.60} are {parameters!r:.60}, and no object")
    schema = {"type": "object", **({"properties": {}} if parameters is None else parameters)}
    if "properties" in schema and not schema.keys() & _MAY_NAME_MORE:
        schema["additionalProperties"] = False
    return _json_rule(schema)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"
