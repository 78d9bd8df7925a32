"""The response of `/v1/responses`: items, and the events of its stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsex_jax.serving.faults import Fault
from sparsex_jax.serving.openai import token_entry
from sparsex_jax.serving.protocols.chats import EventReply, Fields
from sparsex_jax.serving.service import Asked, Pieces, Service
from sparsex_jax.serving.thoughts import Part, Thought
from sparsex_jax.serving.tools import Call

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


class ResponsesReply(EventReply):
    """The reply of `/v1/responses`.

    response.created, response.in_progress
    response.output_item.added                                   for each item: of a thought, a text or a call
      response.content_part.added                                of a thought or a text
      response.reasoning_text.delta ...                          or response.output_text.delta, or
      response.reasoning_text.done                               response.function_call_arguments.delta
      response.content_part.done
    response.output_item.done
    response.completed                                           or response.incomplete, response.failed
    """

    def __init__(self, asked: Asked, service: Service, pieces: Pieces, echo: Fields, *, with_logprobs: bool) -> None:
        """
        Args:
          echo: what the response says of its request.
          with_logprobs: texts come with the log-probabilities of their tokens.
        """
        super().__init__(asked, service, pieces)
        self._id, self._created_at = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._echo, self._texts, self._with_logprobs = echo, service.texts, with_logprobs
        self._items: list[Fields] = []
        self._is_open = False  # the last item
        self._number = 0  # of the next event
        self._logprobs: list[Fields] = []  # of tokens whose text has not been told

    # Events -------------------------------------------------------------------------------------------------

    def begin(self) -> list[Fields]:
        return [self._event(f"response.{name}", response=self._response("in_progress")) for name in _BEGINS]

    def tell(self, parts: Sequence[Part], event: Event) -> list[Fields]:
        if self._with_logprobs:
            self._logprobs += [token_entry(self._texts, token) for token in event.logprobs]
        return [told for part in parts for told in self._told(part)]

    def end(self) -> list[Fields]:
        closed = self._close(self._status)
        return [*closed, self._event(f"response.{self._status}", response=self.body())]

    def fail(self, fault: Fault) -> list[Fields]:
        error = {"code": "rate_limit_exceeded" if fault.status == 429 else "server_error", "message": fault.message}
        return [self._event("response.failed", response=self._response("failed") | {"error": error})]

    def body(self) -> Fields:
        return self._response(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self.answer.finish_reason == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> Fields:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | fields

    def _of_item(self, kind: str, **fields: Any) -> Fields:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _of_item_whole(self, kind: str) -> Fields:
        return self._event(
            f"response.output_item.{kind}", output_index=len(self._items) - 1, item=_copy(self._items[-1])
        )

    # Items --------------------------------------------------------------------------------------------------

    def _told(self, part: Part) -> list[Fields]:
        match part:
            case Thought(text):
                self._logprobs.clear()
                return self._written("reasoning", text)
            case Call():
                self._logprobs.clear()
                return self._called(part.to_dict())
            case _:
                return self._written("message", part)

    def _written(self, kind: str, text: str) -> list[Fields]:
        """The next piece of a thought or a text."""
        opened = [] if self._is_open and self._items[-1]["type"] == kind else [*self._close(), *self._open(kind)]
        content = self._items[-1]["content"][0]
        content["text"] += text
        logprobs = self._take_logprobs(content) if kind == "message" else {}
        return [*opened, self._of_item(f"{content['type']}.delta", content_index=0, delta=text, **logprobs)]

    def _take_logprobs(self, content: Fields) -> Fields:
        taken, self._logprobs = self._logprobs, []
        content["logprobs"] += taken
        return {"logprobs": taken}

    def _open(self, kind: str) -> list[Fields]:
        item = _new_item(kind)
        part = item["content"].pop()
        self._items.append(item)
        self._is_open = True
        added = self._of_item_whole("added")
        item["content"].append(part)
        return [added, self._of_item("content_part.added", content_index=0, part=dict(part))]

    def _close(self, status: str = "completed") -> list[Fields]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        [part] = item["content"]
        logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        return [
            self._of_item(f"{part['type']}.done", content_index=0, text=part["text"], **logprobs),
            self._of_item("content_part.done", content_index=0, part=dict(part)),
            self._of_item_whole("done"),
        ]

    def _called(self, call: Fields) -> list[Fields]:
        """The events of a call, which comes whole."""
        closed, function = self._close(), call["function"]
        item = {"type": "function_call", "id": _id("fc"), "call_id": call["id"], "name": function["name"]}
        self._items.append(item | {"arguments": "", "status": "in_progress"})
        added = self._of_item_whole("added")
        self._items[-1] |= {"arguments": function["arguments"], "status": "completed"}
        return [
            *closed,
            added,
            self._of_item("function_call_arguments.delta", delta=function["arguments"]),
            self._of_item("function_call_arguments.done", name=function["name"], arguments=function["arguments"]),
            self._of_item_whole("done"),
        ]

    # The response -------------------------------------------------------------------------------------------

    def _response(self, status: str) -> Fields:
        ended = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": [_copy(item) for item in self._items],
            "usage": self._usage() if ended else None,
            "sparsex": self.report,
        } | self._echo

    def _usage(self) -> Fields:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.answer,
            "output_tokens_details": {"reasoning_tokens": usage.thought or 0},
            "total_tokens": usage.prompt + usage.answer,
        }


_BEGINS = ("created", "in_progress")


def _new_item(kind: str) -> Fields:
    """An item of a thought or a text, with its one part."""
    if kind == "reasoning":
        content = [{"type": "reasoning_text", "text": ""}]
        return {"type": kind, "id": _id("rs"), "summary": [], "content": content, "status": "in_progress"}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": kind, "id": _id("msg"), "role": "assistant", "content": [part], "status": "in_progress"}


def _copy(item: Fields) -> Fields:
    """The item as it is now."""
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"
