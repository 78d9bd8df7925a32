"""Messages of a chat: checked, and brought into the forms that a template shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text.plain_json import DECODER
from sparsex_jax.text.templates import CallForm, Template

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def objects(name: str, values: Any) -> list[Message]:
    """The objects of a list, which may be None. Raises InvalidRequestError if it is anything else."""
    ok = isinstance(values, (list, tuple)) and all(isinstance(value, Mapping) for value in values)
    require(ok or values is None, f"{name} has entries that are no objects, or is no list")
    return [dict(value) for value in values or ()]


def checked_message(number: int, message: Mapping[str, Any], template: Template) -> Message:
    """A message with its content as one text, and without fields that are None and lists of calls that are empty.

    Raises:
      InvalidRequestError: the role is unknown, the content is no text, or a call has no name.
    """
    given = {name: value for name, value in message.items() if value is not None}
    calls = _checked_calls(number, given)
    kept = {name: value for name, value in given.items() if name not in ("tool_calls", "function_call")}
    kept |= {"role": _checked_role(number, given, template), "content": text_of(number, given)}
    return kept | ({"tool_calls": calls} if calls else {})


def _checked_role(number: int, message: Mapping[str, Any], template: Template) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequestError(f"messages[{number}] has no role")
    require(
        role in ROLES or template.names(role),
        f"messages[{number}] has role {role!r}, which the model's chat template does not know; "
        f"roles are {', '.join(ROLES)}",
    )
    # Templates from before the role know it as `system`.
    return "system" if role == "developer" and not template.names(role) else role


def text_of(number: int, message: Mapping[str, Any]) -> str:
    """A message's content as one text; that of None is empty. Raises InvalidRequestError if it is no text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    require(isinstance(content, (list, tuple)), f"messages[{number}] has content that is neither text nor a list")
    for part in content:
        text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        require(text, f"messages[{number}] has a part of content that is no text")
    return "".join(part["text"] for part in content)


def turn_digests(messages: Sequence[Mapping[str, Any]]) -> frozenset[bytes]:
    """Digests of what the messages of a chat say, each as a whole. Results of tools are no turns: they are documents.

    Raises:
      InvalidRequestError: a content is no text.
    """
    said = (text_of(n, each) for n, each in enumerate(messages) if each.get("role") not in ("tool", "function"))
    return frozenset(map(said_digest, said))


def said_digest(text: str) -> bytes:
    """By which the same text is known again, whatever space is around it: templates trim messages."""
    return hashlib.sha256(text.strip().encode(errors="surrogatepass")).digest()


def _checked_calls(number: int, message: Mapping[str, Any]) -> list[Message]:
    calls = objects(f"messages[{number}].tool_calls", message.get("tool_calls"))
    if not calls and "function_call" in message:  # OpenAI's older name for a single one
        calls = [{"type": "function", "function": message["function_call"]}]
    for call in calls:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(f"messages[{number}].tool_calls has a call without function.name")
        given = function.get("arguments")
        call["function"] = {**function, "arguments": {} if given is None else given}  # in the order that was sent
    return calls


def in_form(messages: Sequence[Message], form: CallForm) -> list[Message]:
    """The messages with their calls as the template shows them. Messages without calls stay as they are."""
    return [
        each for message in messages for each in (_in_form(message, form) if "tool_calls" in message else [message])
    ]


def _in_form(message: Message, form: CallForm) -> list[Message]:
    arguments = _as_text if form.as_text else _as_object
    calls = [
        call | {"function": call["function"] | {"arguments": arguments(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    text, rest = message["content"], {name: value for name, value in message.items() if name != "content"}
    without_text = rest | {"tool_calls": calls} | ({} if form.content is ... else {"content": form.content})
    if text and form.beside_text:
        return [without_text | {"content": text}]
    before = {name: value for name, value in message.items() if name != "tool_calls"}
    return [*([before] if text else []), without_text]


def _as_text(arguments: Any) -> str:
    return (arguments or "{}") if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    """The object that a text of JSON is. Other texts stay as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = DECODER.decode(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
