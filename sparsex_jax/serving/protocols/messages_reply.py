"""Anthropic's reply: a message with blocks, and the events of its stream."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsex_jax.serving.faults import Fault
from sparsex_jax.serving.protocols.chats import EventReply, Fields
from sparsex_jax.serving.service import Asked, Pieces, Service
from sparsex_jax.serving.thoughts import Part, Thought
from sparsex_jax.serving.tools import Call

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


class MessagesReply(EventReply):
    """The reply of `/v1/messages`.

    message_start
    content_block_start, ping, content_block_delta ..., content_block_stop     for each block
    message_delta, message_stop
    """

    def __init__(self, asked: Asked, service: Service, pieces: Pieces, max_tokens: int) -> None:
        """
        Args:
          max_tokens: that the request names.
        """
        super().__init__(asked, service, pieces)
        self._id, self._most = f"msg_{secrets.token_hex(12)}", min(max_tokens, service.limits.max_tokens)
        self._blocks: list[Fields] = []
        self._is_open = False  # the last block

    def begin(self) -> list[Fields]:
        return [{"type": "message_start", "message": self._message([], None)}]

    def tell(self, parts: Sequence[Part], event: Event) -> list[Fields]:
        return [told for part in parts for told in self._told(part)]

    def end(self) -> list[Fields]:
        closed, reason = self._close(), self._stop_reason()
        delta = {"stop_reason": reason, "stop_sequence": self._stop_sequence(reason)}
        ended = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        ended |= {"sparsex": {"pin": self.report["pin"]}} if self.report and "pin" in self.report else {}
        return [*closed, ended, {"type": "message_stop"}]

    def fail(self, fault: Fault) -> list[Fields]:
        return [fault.anthropic_body()]

    def body(self) -> Fields:
        return self._message(self._blocks, self._stop_reason())

    def _message(self, content: list[Fields], reason: str | None) -> Fields:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": self._stop_sequence(reason),
            "usage": self._usage(),
            "sparsex": self.report,
        }

    def _told(self, part: Part) -> list[Fields]:
        match part:
            case Thought(text):
                opened = self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._blocks[-1]["thinking"] += text
                return [*opened, self._delta({"type": "thinking_delta", "thinking": text})]
            case Call():
                return self._called(part.to_dict())
            case _:
                opened = self._open({"type": "text", "text": ""})
                self._blocks[-1]["text"] += part
                return [*opened, self._delta({"type": "text_delta", "text": part})]

    def _called(self, call: Fields) -> list[Fields]:
        """A block of a call, which comes whole."""
        arguments = call["function"]["arguments"]
        block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
        opened = [*self._close(), *self._open(block)]
        self._blocks[-1] = block | {"input": json.loads(arguments)}
        return [*opened, self._delta({"type": "input_json_delta", "partial_json": arguments}), *self._close()]

    def _open(self, block: Fields) -> list[Fields]:
        """Begin a block, unless one of its type is open."""
        if self._is_open and self._blocks[-1]["type"] == block["type"]:
            return []
        events = self._close()
        self._is_open = True
        self._blocks.append(dict(block))
        events.append({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block})
        return events + ([{"type": "ping"}] if len(self._blocks) == 1 else [])

    def _close(self) -> list[Fields]:
        if not self._is_open:
            return []
        self._is_open = False
        block, events = self._blocks[-1], []
        if block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
            events = [self._delta({"type": "signature_delta", "signature": block["signature"]})]
        return [*events, {"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, delta: Fields) -> Fields:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _stop_reason(self) -> str:
        if self.answer.finish_reason == "length":
            as_asked = len(self.answer.token_ids) >= self._most
            return "max_tokens" if as_asked else "model_context_window_exceeded"
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        return "end_turn" if self.answer.stopped_by is None else "stop_sequence"

    def _stop_sequence(self, reason: str | None) -> str | None:
        return self.answer.stopped_by if reason == "stop_sequence" else None

    def _usage(self) -> dict[str, Any]:
        """What was found in the store is apart from `input_tokens`, as with Anthropic."""
        usage = self.usage
        counts: dict[str, Any] = {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.answer,
        }
        return counts | ({} if usage.thought is None else {"output_tokens_details": {"thinking_tokens": usage.thought}})


def _signature(thought: str) -> str:
    """Some clients send back only thoughts that are signed. Nobody checks it."""
    return hashlib.sha256(thought.encode(errors="surrogatepass")).hexdigest()[:32]
