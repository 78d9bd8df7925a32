"""What all endpoints share, and a request's way through it: checked fields, a place in the line, jobs, a reply."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
from fastapi import Request
from starlette.responses import Response

from sparsex_jax.cache import Entry
from sparsex_jax.engine import Engine
from sparsex_jax.errors import UnknownHandleError
from sparsex_jax.model.sharding import device_name
from sparsex_jax.serving import extras, schemas
from sparsex_jax.serving.access import Access, Limits, Tenant
from sparsex_jax.serving.bodies import Bodies
from sparsex_jax.serving.evaluation import Echo
from sparsex_jax.serving.exchange import Exchange
from sparsex_jax.serving.faults import OutOfServiceError, json_response
from sparsex_jax.serving.intake import Intake
from sparsex_jax.serving.knowledge import Knowledge
from sparsex_jax.serving.line import Line, delay_of
from sparsex_jax.serving.metrics import Metrics
from sparsex_jax.serving.models import Models
from sparsex_jax.serving.models import Served as ServedModel
from sparsex_jax.serving.thoughts import AnswerReader, Thinking
from sparsex_jax.serving.tools import reader_of
from sparsex_jax.serving.transport import EventStream, unless_disconnected
from sparsex_jax.serving.worker import Job, Stream, TimeLimitError, Worker
from sparsex_jax.text.token_text import TokenText

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      request: in the form of OpenAI's endpoints, whatever form it came in.
      jobs: one for each answer; those to one prompt come together.
      thinking: how the answers think. None: thoughts are not taken apart.
      echoes: the prompts, if answers begin with them; otherwise empty.
    """

    request: schemas.Generate
    jobs: list[Job]
    thinking: Thinking | None = None
    echoes: Sequence[Echo] = ()


Pieces = Sequence[list[str]] | None  # the texts of each prompt's tokens


class Replies(Protocol):
    """The reply to one request, in the form of its endpoint."""

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> dict[str, Any]:
        """The reply, once every answer is complete. Raises the error of a request that failed."""

    def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncGenerator[bytes]:
        """The reply as server-sent events. An error before the first event is raised; a later one becomes an event."""


MakeReply = Callable[[Asked, Pieces], Replies]


class Service:
    """The objects that all endpoints share.

    Attributes:
      models: what requests may name as their model.
      allow_adapter_updates: whether requests may load and unload adapters.
    """

    def __init__(
        self,
        worker: Worker,
        models: Models,
        access: Access,
        limits: Limits,
        reasoning_parser: str,
        *,
        allow_adapter_updates: bool,
    ) -> None:
        self.worker, self.models, self.access, self.limits = worker, models, access, limits
        self.allow_adapter_updates, model = allow_adapter_updates, models.base
        self.metrics = Metrics(_build(worker.engine, model), worker.engine.config.page_size)
        self.texts = TokenText(worker.engine.tokenizer)
        self.intake = Intake(worker.engine, limits, reasoning_parser)
        self.bodies = Bodies(limits)
        loop, config = worker.engine.loop, worker.engine.config
        self.line = Line(loop.policy.max_num_seqs, config.max_waiting, access.num_keys)
        # One thread, because a tokenizer is not safe to call from several.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sparsex-tokenizer")

    async def generate[B: schemas.Asking](
        self, request: Request, body: B, tenant: Tenant, intake: Callable[[B, Tenant], Asked], make_reply: MakeReply
    ) -> Response:
        """Answer a request, as a whole or as a stream. If the client disconnects, its request is cancelled."""
        exchange = Exchange.of(request.scope)
        return await unless_disconnected(request, self._generate(exchange, body, tenant, intake, make_reply))

    async def _generate[B: schemas.Asking](
        self, exchange: Exchange, body: B, tenant: Tenant, intake: Callable[[B, Tenant], Asked], make_reply: MakeReply
    ) -> Response:
        async with contextlib.AsyncExitStack() as held:
            exchange.adapter = adapter = self.models.adapter_of(body.model)
            held.enter_context(self.models.using(adapter))
            stream = await held.enter_async_context(self.stream(exchange))
            place = held.enter_context(self.line.place(tenant))
            checked = self.in_background(lambda: (extras.headers_of(body), intake(body, tenant)))
            headers, asked = await stream.before_jobs(checked)
            place.grow(len(asked.jobs) - 1)
            place.delay_s = delay_of(asked.request.priority)
            place.members = frozenset(job.member for job in asked.jobs if job.member)
            reply = make_reply(asked, await self._pieces(asked))
            exchange.method = next((job.reuse.method for job in asked.jobs if job.reuse), None)
            await stream.before_jobs(place.turn())
            # With several keys a priority counts among the requests of its own key only.
            delay_s = place.delay_s if self.access.num_keys == 1 else 0.0
            _name_pin(asked, exchange.id)
            stream.submit(*(dataclasses.replace(job, adapter=adapter, delay_s=delay_s) for job in asked.jobs))
            if not body.stream:
                return json_response(await reply.whole(stream), headers=headers)
            chunks = reply.chunks(stream)
            first = await anext(chunks)  # if this fails, the response still gets the error's status
            response = EventStream(first, chunks, held.pop_all())
            response.headers.update(headers)
            return response

    async def _pieces(self, asked: Asked) -> list[list[str]] | None:
        """The texts of each prompt's tokens, if the request asks for a token map."""
        if not asked.request.return_token_map:
            return None
        return await self.in_background(self.intake.pieces, asked.jobs[:: asked.request.num_answers])

    def asked_chat(self, request: schemas.ChatRequest, tenant: Tenant, *, shortens: bool = False) -> Asked:
        """What a chat asks for. Off the event loop. Arguments and errors as of `Intake.chat`."""
        jobs = self.intake.chat(request, tenant, shortens=shortens)
        return Asked(request, jobs, self.intake.thinking(request, jobs[0]))

    def asked_completion(self, request: schemas.CompletionRequest, tenant: Tenant) -> Asked:
        """What a completion asks for. Off the event loop. Raises as `Intake.completion`."""
        jobs = self.intake.completion(request, tenant)
        return Asked(request, jobs, echoes=self.intake.echoes(request, jobs))

    def reader(self, asked: Asked) -> AnswerReader:
        """What takes an answer to a chat apart."""
        request, tokenizer = asked.request, self.worker.engine.tokenizer
        assert isinstance(request, schemas.ChatRequest)
        return AnswerReader(
            self.texts,
            asked.thinking,
            functools.partial(reader_of, tokenizer, request),
            one_call=request.parallel_tool_calls is False,
            only_calls=request.tool_choice not in (None, "auto", "none"),
            tells_thoughts=request.include_reasoning is not False,
        )

    def stream(self, exchange: Exchange) -> Stream:
        """The stream of a request's jobs, which come later. Raises as `Worker.stream`."""
        return self.worker.stream([], limit_s=self.limits.request_timeout, watcher=exchange)

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return self.models.base

    def name_of(self, asked: Asked) -> str:
        """The model that answers a request: the model itself, or an adapter."""
        return asked.request.model or self.model

    async def insert(self, request: Request, body: schemas.KnowledgeRequest, tenant: Tenant) -> Entry:
        """Prefill a text among the running requests, and keep it. If the client disconnects, nothing of it is kept: it
        would not know the handle."""
        return await unless_disconnected(request, self._insert(Exchange.of(request.scope), body, tenant))

    async def _insert(self, exchange: Exchange, body: schemas.KnowledgeRequest, tenant: Tenant) -> Entry:
        engine, namespace = self.worker.engine, tenant.store_namespace(body.cache_salt)
        exchange.adapter = adapter = self.models.adapter_of(body.model)
        async with self.stream(exchange) as stream:
            with self.models.using(adapter), self.line.place(tenant) as place:
                text, preamble = await stream.before_jobs(self.in_background(self.intake.knowledge, body))
                await stream.before_jobs(place.turn())
                knowledge = Knowledge(text, preamble, body.company, namespace, tenant.knowledge, adapter)
                await self.call(knowledge.start, engine, stream)
                [(_, event)] = [news async for news in stream]
        if event.error is not None:
            raise event.error
        if event.handle is None:
            raise OutOfServiceError("the server is shutting down and gave this request up")
        return await self.call(entry_of, engine, event.handle, namespace)

    async def in_background[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that tokenizes on the tokenizer's thread, so that it does not block the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, lambda: function(*args, **kwargs))

    async def tokenized[T](self, tenant: Tenant, function: Callable[[], T]) -> T:
        """As `in_background`, counted among the key's requests. Raises as `Line.place`."""
        with self.line.place(tenant):
            return await self.in_background(function)

    async def call[T](self, function: Callable[..., T], *args: Any) -> T:
        """As `Worker.call`. Raises TimeLimitError if it takes too long."""
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                return await self.worker.call(function, *args)
        except TimeoutError as error:
            raise TimeLimitError(
                f"the request took longer than the limit of {self.limits.request_timeout:g} s"
            ) from error

    def card(self, model: ServedModel) -> schemas.ModelCard:
        return schemas.ModelCard(
            id=model.name,
            created=model.created,
            root=model.source,
            parent=model.parent,
            max_model_len=self.intake.lengths.context,
            display_name=model.name,
            created_at=datetime.datetime.fromtimestamp(model.created, datetime.UTC).isoformat(),
            default_sampling_params=dict(self.worker.engine.sampling),
        )


def _build(engine: Engine, model: str) -> dict[str, str]:
    """What runs here, for metrics."""
    version, device = importlib.metadata.version("sparsex-jax"), device_name(engine.mesh)
    return {"version": version, "jax": jax.__version__, "device": device, "model": model}


def _name_pin(asked: Asked, request_id: str) -> None:
    """A pin without a key has the request's id. All jobs share it."""
    for job in asked.jobs:
        if job.pinning is not None:
            job.pinning.key = job.pinning.key or request_id


def entry_of(engine: Engine, handle: int, namespace: str) -> Entry:
    """A kept text. On the loop's thread. Raises UnknownHandleError if this namespace has none of this handle."""
    cache = engine.cache
    if not cache.knows(handle) or cache.entry(handle).namespace != namespace:
        raise UnknownHandleError(f"handle {handle} is not known: never given out, deleted, or evicted since")
    return dataclasses.replace(cache.entry(handle))  # the event loop's thread reads it
