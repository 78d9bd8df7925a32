"""What an answer must be, by the fields of a request: OpenAI's `response_format` and `tool_choice`, vLLM's
`structured_outputs` and `guided_*`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from sparsex_jax.config import Behind, Structure
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.schemas import ChatRequest, Generate, NamedTool, ResponseFormat, StructuredOutputs
from sparsex_jax.serving.tools.forced import forced_calls, strict_calls

# vLLM's names of what a structure is, and the field of the same meaning outside of `structured_outputs`.
_KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}

Found = tuple[str, Structure]


def structure_of(
    request: Generate, tokenizer: Any | None, behind: Behind | None, check: Callable[[Structure], Any]
) -> Structure | None:
    """The structure that a request asks for, compiled once; None if it asks for none.

    Args:
      behind: the thought that may stand before it.
      check: compiles a structure, and raises StructureError if it cannot.

    Raises:
      RequestError: a field of these is wrong or not supported, or there are several.
    """
    found = [*_by_format(request.response_format), *_by_options(request.structured_outputs), *_guided(request)]
    found = [(name, dataclasses.replace(structure, behind=behind)) for name, structure in found]
    found += _by_tools(request, tokenizer, behind)
    if len(found) > 1:
        names = " and ".join(name for name, _ in found[:2])
        raise RequestError(f"{found[1][0]}: {names} exclude each other", param=found[1][0], code="invalid_value")
    for name, structure in found or _by_strict_tools(request, tokenizer, behind):
        _in_field("tools" if name == "tool_choice" else name, functools.partial(check, structure))
        return structure
    return None


def _by_format(wanted: ResponseFormat | None) -> list[Found]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("response_format", Structure("json_object"))]
    name = "response_format.json_schema"
    if wanted.json_schema is None:
        raise RequestError(f"{name} is missing", param=name, code="missing")
    schema = wanted.json_schema.schema_
    if schema is None:
        raise RequestError(f"{name}.schema is missing", param=f"{name}.schema", code="missing")
    return [_made(f"{name}.schema", "json_schema", schema)]


def _by_options(options: StructuredOutputs | None) -> list[Found]:
    if options is None:
        return []
    given = {name: value for name in _KINDS if (value := getattr(options, f"{name}_")) is not None}
    found = [_made(f"structured_outputs.{name}", _KINDS[name], value) for name, value in given.items()]
    return [*found, *([("structured_outputs.json_object", Structure("json_object"))] if options.json_object else [])]


def _guided(request: Generate) -> list[Found]:
    given = {name: getattr(request, f"guided_{name}") for name in _KINDS}
    return [_made(f"guided_{name}", _KINDS[name], value) for name, value in given.items() if value is not None]


def _by_tools(request: Generate, tokenizer: Any | None, behind: Behind | None) -> list[Found]:
    if not isinstance(request, ChatRequest) or request.tool_choice in (None, "auto", "none"):
        return []
    named = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    names = [tool["function"]["name"] for tool in request.tools or ()]  # the template has looked at them
    if not names or (named is not None and named not in names):
        said = "tools has no entries" if not names else f"tools has no function {named!r:.60}"
        raise RequestError(f"tool_choice asks for a call, but {said}", param="tool_choice", code="invalid_value")
    return [("tool_choice", _in_field("tools", lambda: forced_calls(tokenizer, request, named, behind)))]


def _by_strict_tools(request: Generate, tokenizer: Any | None, behind: Behind | None) -> list[Found]:
    if not isinstance(request, ChatRequest):
        return []
    structure = _in_field("tools", lambda: strict_calls(tokenizer, request, behind))
    return [] if structure is None else [("tools", structure)]


def _made(name: str, kind: str, value: Any) -> Found:
    return name, _in_field(name, lambda: Structure(kind, value))


def _in_field[T](name: str, make: Callable[[], T]) -> T:
    """What is made of a field. Errors name the field."""
    try:
        return make()
    except InvalidRequestError as error:
        raise RequestError(f"{name}: {error}", param=name, code="invalid_value") from error
