"""Tools for models whose chat template does not know them: described in the system message, called in its words.

The form is that of Hermes, which many models have seen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_OFFER = """You can call the following tools. Each line describes one of them as a JSON schema:
<tools>
{tools}
</tools>
To call a tool, write its name and its arguments as JSON between these tags:
<tool_call>
{{"name": "the tool's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
The results come in the next message. Then answer in plain words."""


def offer(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with the tools described in the system message, which is added where there is none."""
    text = _OFFER.format(tools="\n".join(_json(tool) for tool in tools))
    if messages and messages[0]["role"] == "system":
        first = f"{messages[0]['content']}\n\n{text}" if messages[0]["content"] else text
        return [messages[0] | {"content": first}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls written into the assistant's texts, and with results as texts of the user.

    The results of one message's calls become one text, because templates may want users and assistants by turns.
    """
    written: list[Message] = []
    for message in messages:
        result = message["role"] in ("tool", "function")
        if result and written and written[-1].pop("is_result", False):
            written[-1] |= {"content": f"{written[-1]['content']}\n{_response(message)}", "is_result": True}
        elif result:
            written.append({"role": "user", "content": _response(message), "is_result": True})
        else:
            written.append(_with_calls(message))
    return [{key: value for key, value in message.items() if key != "is_result"} for message in written]


def _with_calls(message: Message) -> Message:
    calls = [f"<tool_call>\n{_json(_call(each['function']))}\n</tool_call>" for each in message.get("tool_calls", ())]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join([*([message["content"]] if message["content"] else []), *calls])}


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _response(message: Message) -> str:
    return f"The tool's result:\n{message['content']}"  # in tags, small models would repeat the tags


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
