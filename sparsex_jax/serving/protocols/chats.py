"""What protocols share: requests become chats, and a reply with one answer is told in events of several types."""

from __future__ import annotations

import abc
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError, create_model

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving import extras
from sparsex_jax.serving.faults import Fault, RequestError, fault_of
from sparsex_jax.serving.openai import PartialAnswer
from sparsex_jax.serving.reply import cached_tokens, report_fields
from sparsex_jax.serving.schemas import Asking, ChatRequest
from sparsex_jax.serving.service import Asked, Pieces, Service
from sparsex_jax.serving.thoughts import Part

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event

# Fields of a chat that requests of all protocols may have: this server's, and those of vLLM.
_SHARED = (
    *(
        "cache_salt",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reuse",
        "round",
        "keep",
        "sharing",
        "return_token_map",
        "chat_template_kwargs",
        "allow_control_tokens",
        "seed",
    ),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens"),
    *("ignore_eos", "stop_token_ids", "allowed_token_ids", "skip_special_tokens", "include_reasoning"),
)
ChatFields: type[Asking] = create_model(
    "ChatFields",
    __base__=Asking,
    **{name: (ChatRequest.model_fields[name].annotation, ChatRequest.model_fields[name]) for name in _SHARED},  # type: ignore[call-overload]
)


def shared_fields(body: BaseModel) -> dict[str, Any]:
    """The fields that a request of any protocol may have, as far as it has them."""
    return {name: getattr(body, name) for name in ("model", "stream", *_SHARED) if name in body.model_fields_set}


class Names:
    """What a protocol calls the fields of a chat. Within it, errors of a chat name the fields that the client sent.

    response_format.json_schema.schema is missing     text.format.schema is missing
    messages[2] has role 'x', which ...               input[1] has role 'x', which ...
    """

    def __init__(self, names: Mapping[str, str] = MappingProxyType({}), places: Sequence[str] = ()) -> None:
        """
        Args:
          names: for each field of a chat that has another name, or a phrase of its errors, what stands for it. A name
            that is a plain word counts where a text begins with it.
          places: where each message of the chat begins in the request.
        """
        self._names = {f"messages[{number}]": place for number, place in enumerate(places)} | dict(names)
        alternatives = [
            rf"{'^' if name.isalpha() else r'\b'}{re.escape(name)}(?!\w)"
            for name in sorted(self._names, key=len, reverse=True)
        ]
        self._names_in_text = re.compile("|".join(alternatives) or "(?!)")

    def told(self, text: str) -> str:
        """An error's text with the names of this protocol."""
        return self._names_in_text.sub(lambda found: self._names[found[0]], text)

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (RequestError, RequestValidationError, InvalidRequestError)):
            fault = fault_of(error)
            param = fault.param and self.told(fault.param)
            said = self.told(fault.message)
            raise RequestError(said, param=param, code=fault.code, status=fault.status) from error


class Named(NamedTuple):
    """A chat, and what its protocol calls the fields of it."""

    chat: ChatRequest
    names: Names


def as_chat(fields: Mapping[str, Any], names: Names) -> Named:
    """A chat of these fields; those that are None are left out.

    Raises:
      RequestError: a field is wrong, or not supported.
    """
    with names:
        return Named(_checked(fields), names)


def _checked(fields: Mapping[str, Any]) -> ChatRequest:
    try:
        chat = ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors) from error
    extras.headers_of(chat)  # refuses what is not supported
    return chat


def refuse(body: BaseModel, neutral: Mapping[str, tuple[str, tuple[Any, ...]]]) -> None:
    """Refuse fields of a body.

    Args:
      neutral: for each, why it is refused, and values besides null that change nothing.

    Raises:
      RequestError: a field has another value.
    """
    for name, (why, values) in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise unsupported(name, why)


def unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")


def string_of(at: str, fields: Mapping[str, Any], name: str) -> str:
    """A field of what stands at this place of a body. Raises RequestError unless it is a string."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{name} must be a string, not {value!r:.60}", param=f"{at}.{name}")
    return value


class Usage(NamedTuple):
    """Token counts of a reply.

    Attributes:
      cached: tokens of the prompt whose stored KV served.
      thought: tokens of the answer that are its thought; None where thoughts are not taken apart.
    """

    prompt: int
    cached: int
    answer: int
    thought: int | None


Fields = dict[str, Any]


class EventReply(abc.ABC):
    """A reply with one answer. What a whole reply says is what the events of a stream said, put together."""

    def __init__(self, asked: Asked, service: Service, pieces: Pieces) -> None:
        """
        Args:
          pieces: the texts of the prompt's tokens, for the token map. None: without a token map.
        """
        self.answer = PartialAnswer(reader=service.reader(asked))
        self.model = service.name_of(asked)
        [self._job], self._pieces = asked.jobs, pieces

    @abc.abstractmethod
    def begin(self) -> list[Fields]:
        """The events before the first part. Each has a `type`."""

    @abc.abstractmethod
    def tell(self, parts: Sequence[Part], event: Event) -> list[Fields]:
        """The events of the answer's next parts."""

    @abc.abstractmethod
    def end(self) -> list[Fields]:
        """The events behind the last part."""

    @abc.abstractmethod
    def fail(self, fault: Fault) -> list[Fields]:
        """The events of a stream that breaks."""

    @abc.abstractmethod
    def body(self) -> Fields:
        """The whole reply, behind the last event."""

    @property
    def usage(self) -> Usage:
        report, reader = self.answer.report, self.answer.reader
        thought = reader.thought_tokens if reader is not None and reader.has_thoughts else None
        cached = 0 if report is None else cached_tokens(report)
        return Usage(len(self._job.prompt), cached, len(self.answer.token_ids), thought)

    @property
    def report(self) -> Fields | None:
        """The report of the prompt, as `sparsex` says it."""
        report, pin = self.answer.report, self.answer.pin
        return None if report is None else report_fields(report, self._pieces[0] if self._pieces else None, pin)

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> Fields:
        """As `Replies.whole`."""
        begun = False
        async for _, event in events:
            self._next(event, begun)
            begun = True
        self.end()
        return self.body()

    async def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncGenerator[bytes]:
        """As `Replies.chunks`."""
        begun = False
        try:
            async for _, event in events:
                told = self._next(event, begun)
                begun = True
                if told:
                    yield _joined(told)
            yield _joined(self.end())
        except Exception as error:
            if not begun:
                raise
            yield _joined(self.fail(fault_of(error)))

    def _next(self, event: Event, begun: bool) -> list[Fields]:
        parts = self.answer.add(event)
        return ([] if begun else self.begin()) + self.tell(parts, event)


def _joined(events: Sequence[Fields]) -> bytes:
    """Server-sent events, each named by its type."""
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()
