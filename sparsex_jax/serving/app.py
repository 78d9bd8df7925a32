"""The HTTP application: OpenAI's endpoints, the knowledge base, health, metrics and the page.

A request passes these steps: API key -> body -> checked fields -> place in the line -> token ids -> scheduler ->
events -> OpenAI's objects.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from sparsex_jax.cache import Entry, Forgotten
from sparsex_jax.engine import Engine
from sparsex_jax.errors import UnknownHandleError
from sparsex_jax.serving import extras, faults, schemas
from sparsex_jax.serving.access import Access, ForbiddenError, Limits, Tenant
from sparsex_jax.serving.bodies import Bodies, Checked
from sparsex_jax.serving.exchange import Exchange, Exchanges
from sparsex_jax.serving.faults import OutOfServiceError, RequestError, json_response
from sparsex_jax.serving.intake import Intake
from sparsex_jax.serving.knowledge import Knowledge
from sparsex_jax.serving.line import Line
from sparsex_jax.serving.methods import HeadAsGet, allow_origins
from sparsex_jax.serving.metrics import Metrics
from sparsex_jax.serving.openai import ChatFormat, CompletionFormat, ReplyFormat
from sparsex_jax.serving.reply import Extent, Reply
from sparsex_jax.serving.request_log import RequestLog
from sparsex_jax.serving.tiers import tiers_of
from sparsex_jax.serving.tools import reader_of
from sparsex_jax.serving.transport import EventStream, unless_disconnected
from sparsex_jax.serving.worker import Job, Stream, TimeLimitError, Worker
from sparsex_jax.text.token_text import TokenText

PAGE = Path(__file__).parent / "page"
# The page loads nothing from other hosts, and no text of a model or a document may run as a script.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorResponse, "description": "The request is refused; the message says why."},
    "5XX": {"model": schemas.ErrorResponse, "description": "Overload, shutdown, a time limit or a fault."},
}


class Service:
    """The objects that all endpoints share."""

    def __init__(self, worker: Worker, model: str, access: Access, limits: Limits) -> None:
        self.worker, self.model, self.access, self.limits = worker, model, access, limits
        self.metrics = Metrics(_build(worker.engine, model), worker.engine.config.page_size)
        self.texts = TokenText(worker.engine.tokenizer)
        self.intake = Intake(worker.engine, limits)
        self.bodies = Bodies(limits)
        loop, config = worker.engine.loop, worker.engine.config
        self.line = Line(loop.policy.max_num_seqs, config.max_waiting, access.num_keys)
        self.created = int(time.time())
        # One thread, because a tokenizer is not safe to call from several.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sparsex-tokenizer")

    async def generate[B: schemas.Generate](
        self,
        request: Request,
        body: B,
        tenant: Tenant,
        intake: Callable[[B, Tenant], list[Job]],
        make_format: Callable[[], ReplyFormat],
    ) -> Response:
        """Answer a request, as a whole or as a stream. If the client disconnects, its request is cancelled."""
        exchange = Exchange.of(request.scope)
        return await unless_disconnected(request, self._generate(exchange, body, tenant, intake, make_format))

    async def _generate[B: schemas.Generate](
        self,
        exchange: Exchange,
        body: B,
        tenant: Tenant,
        intake: Callable[[B, Tenant], list[Job]],
        make_format: Callable[[], ReplyFormat],
    ) -> Response:
        async with contextlib.AsyncExitStack() as held:
            self._check_model(body.model)
            stream = await held.enter_async_context(self.stream(exchange))
            place = held.enter_context(self.line.place(tenant))
            checked = self.in_background(lambda: (extras.headers_of(body), intake(body, tenant)))
            headers, jobs = await stream.before_jobs(checked)
            place.grow(len(jobs) - 1)
            pieces = (
                await self.in_background(self.intake.pieces, jobs[:: body.n or 1]) if body.return_token_map else None
            )
            exchange.method = next((job.reuse.method for job in jobs if job.reuse), None)
            await stream.before_jobs(place.turn())
            stream.submit(*jobs)
            reply = Reply(make_format, self.model, jobs, pieces, Extent.of(body))
            if not body.stream:
                return json_response(await reply.whole(stream), headers=headers)
            chunks = reply.chunks(stream)
            first = await anext(chunks)  # if this fails, the response still gets the error's status
            response = EventStream(first, chunks, held.pop_all())
            response.headers.update(headers)
            return response

    def stream(self, exchange: Exchange) -> Stream:
        """The stream of a request's jobs, which come later. Raises as `Worker.stream`."""
        return self.worker.stream([], limit_s=self.limits.request_timeout, watcher=exchange)

    async def insert(self, body: schemas.KnowledgeRequest, tenant: Tenant, exchange: Exchange) -> Entry:
        """Prefill a text among the running requests, and keep it."""
        engine, namespace = self.worker.engine, tenant.store_namespace(body.cache_salt)
        async with self.stream(exchange) as stream:
            with self.line.place(tenant) as place:
                text, preamble = await stream.before_jobs(self.in_background(self.intake.knowledge, body))
                await stream.before_jobs(place.turn())
                knowledge = Knowledge(text, preamble, body.company, namespace, tenant.knowledge)
                await self.call(knowledge.start, engine, stream)
                [(_, event)] = [news async for news in stream]
        if event.error is not None:
            raise event.error
        if event.handle is None:
            raise OutOfServiceError("the server is shutting down and gave this request up")
        return await self.call(_entry, engine, event.handle, namespace)

    async def in_background[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that tokenizes on the tokenizer's thread, so that it does not block the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, lambda: function(*args, **kwargs))

    async def call[T](self, function: Callable[..., T], *args: Any) -> T:
        """As `Worker.call`. Raises TimeLimitError if it takes too long."""
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                return await self.worker.call(function, *args)
        except TimeoutError as error:
            raise TimeLimitError(
                f"the request took longer than the limit of {self.limits.request_timeout:g} s"
            ) from error

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.model):
            raise unknown_model(model, self.model)

    def card(self) -> schemas.ModelCard:
        return schemas.ModelCard(id=self.model, created=self.created, max_model_len=self.intake.lengths.context)


def _build(engine: Engine, model: str) -> dict[str, str]:
    """What runs here, for metrics."""
    version, device = importlib.metadata.version("sparsex-jax"), engine.mesh.devices.flat[0].device_kind
    return {"version": version, "jax": jax.__version__, "device": device, "model": model}


def unknown_model(model: str | None, served: str) -> RequestError:
    return RequestError(
        f"model {model!r} is not served here; {served!r} is", param="model", code="model_not_found", status=404
    )


def create_app(
    worker: Worker,
    *,
    model: str,
    access: Access | None = None,
    limits: Limits | None = None,
    request_log: RequestLog | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """The application. It starts the worker when it starts, and stops the worker when it stops.

    Args:
      model: the model's name in requests.
      access: the API keys. None: requests need no key.
      limits: of requests. None: the defaults.
      request_log: gets every request, and is closed with the application. None: nothing is logged.
      allowed_origins: whose scripts may send requests, as `allow_origins` takes them.
    """
    limits = limits or Limits()
    service = Service(worker, model, access or Access.open(limits), limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        service.metrics.listening()
        yield
        await asyncio.to_thread(worker.stop)
        await asyncio.sleep(0)  # the last events of what was cut off come now
        if request_log is not None:
            await asyncio.to_thread(request_log.close)

    app = FastAPI(title="sparsex-jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(public)
    routes = (*router.routes, *public.routes)
    service.metrics.expect(route.path for route in routes if isinstance(route, Route))
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(HeadAsGet)
    allow_origins(app, allowed_origins)
    # Around all others, so that every response has its id and is counted: preflights and what failed too.
    app.add_middleware(Exchanges, metrics=service.metrics, log=request_log.write if request_log else _no_log)
    faults.install(app)
    return app


def _no_log(exchange: Exchange) -> None:
    """The request log of a server that has none."""


# Endpoints --------------------------------------------------------------------------------------------------


async def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


class Keyed(APIRoute):
    """A route that needs an API key. The key is checked before the body is read, and the body before FastAPI sees it,
    which would check it on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model: Any = self.body_field and self.body_field.field_info.annotation

        async def answer(request: Request) -> Response:
            service: Service = request.app.state.service
            tenant = service.access.tenant(request.headers.get("authorization"))
            request.state.tenant, Exchange.of(request.scope).key = tenant, tenant.name
            if model is None:
                return await handle(request)
            return await handle(Checked(request, await service.bodies.checked(request, model)))

        return answer


async def _tenant(request: Request, _: Annotated[Any, Security(HTTPBearer(auto_error=False))]) -> Tenant:
    return request.state.tenant


Caller = Annotated[Tenant, Depends(_tenant)]
Salt = Annotated[str | None, Query(min_length=1, description="As `cache_salt` of the request that stored it.")]
router = APIRouter(responses=_ERRORS, route_class=Keyed)
public = APIRouter(responses=_ERRORS)


@router.post("/v1/chat/completions")
async def chat_completions(body: schemas.ChatRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat, as OpenAI's endpoint does."""
    tokenizer = service.worker.engine.tokenizer

    def make_format() -> ChatFormat:
        return ChatFormat(
            service.texts,
            bool(body.logprobs),
            reader_of(tokenizer, body),
            names_are_ids=bool(body.return_tokens_as_token_ids),
            one_call=body.parallel_tool_calls is False,
        )

    return await service.generate(request, body, tenant, service.intake.chat, make_format)


@router.post("/v1/completions")
async def completions(body: schemas.CompletionRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Continue one or several texts, as OpenAI's endpoint does."""

    def make_format() -> CompletionFormat:
        names_are_ids = bool(body.return_tokens_as_token_ids)
        return CompletionFormat(service.texts, body.logprobs, names_are_ids=names_are_ids)

    return await service.generate(request, body, tenant, service.intake.completion, make_format)


@router.get("/v1/models")
async def models(service: Served, tenant: Caller) -> schemas.ModelList:
    return schemas.ModelList(data=[service.card()])


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Served, tenant: Caller) -> schemas.ModelCard:
    if model != service.model:
        raise unknown_model(model, service.model)
    return service.card()


@router.post("/v1/knowledge")
async def insert_knowledge(
    body: schemas.KnowledgeRequest, request: Request, service: Served, tenant: Caller
) -> schemas.KnowledgeEntry:
    """Prefill a text and keep its KV frozen. Prompts of the same key and salt reuse it."""
    return _described(await service.insert(body, tenant, Exchange.of(request.scope)))


@router.get("/v1/knowledge")
async def list_knowledge(service: Served, tenant: Caller, cache_salt: Salt = None) -> schemas.KnowledgeList:
    """The knowledge that is kept under this key and salt, oldest first."""
    entries = await service.call(service.worker.engine.entries, tenant.store_namespace(cache_salt))
    return schemas.KnowledgeList(data=[_described(entry) for entry in entries])


@router.delete("/v1/knowledge/{handle}")
async def delete_knowledge(
    handle: int, service: Served, tenant: Caller, cache_salt: Salt = None
) -> schemas.KnowledgeDeleted:
    """Forget knowledge, and the copies of it in stored prompts.

    A handle of another key or salt gives the same error as one that never existed.
    """
    namespace = tenant.store_namespace(cache_salt)
    gone = await service.call(_forget, service.worker.engine, handle, namespace)
    return schemas.KnowledgeDeleted(
        handle=handle,
        num_tokens=gone.num_tokens,
        pages=len(gone.pages),
        remaining_tokens=gone.num_remaining,
        stale=gone.num_stale,
    )


@router.get("/v1/store")
async def store(service: Served, tenant: Caller) -> schemas.Store:
    """The store's pages by state, and how full the tiers are, over all namespaces."""
    engine = service.worker.engine
    stats = dataclasses.asdict(engine.loop.snapshot)
    return schemas.Store.model_validate(stats | {"page_size": engine.config.page_size, "tiers": tiers_of(engine)})


@public.get("/health", response_model=schemas.Health)
async def health(service: Served) -> Response:
    """200 while the server takes requests, 503 otherwise."""
    worker = service.worker
    status = "failed" if worker.failure else "draining" if worker.draining else "ok"
    return json_response({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics")
async def metrics(service: Served, tenant: Caller) -> Response:
    """The metrics of the whole server, for Prometheus."""
    if not tenant.metrics:
        raise ForbiddenError("this key may not read the figures of the whole server")
    loop = service.worker.loop
    stats = dataclasses.replace(loop.stats, waiting=loop.stats.waiting + service.line.waiting)
    return Response(service.metrics.render(loop.snapshot, stats, loop.tiers), media_type="text/plain; version=0.0.4")


@public.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


# On the loop's thread ---------------------------------------------------------------------------------------


def _forget(engine: Engine, handle: int, namespace: str) -> Forgotten:
    return engine.forget(_entry(engine, handle, namespace).handle)


def _entry(engine: Engine, handle: int, namespace: str) -> Entry:
    cache = engine.cache
    if not cache.knows(handle) or cache.entry(handle).namespace != namespace:
        raise UnknownHandleError(f"handle {handle} is not known: never given out, deleted, or evicted since")
    return dataclasses.replace(cache.entry(handle))  # the event loop's thread reads it


def _described(entry: Entry) -> schemas.KnowledgeEntry:
    return schemas.KnowledgeEntry(
        handle=entry.handle,
        num_tokens=entry.num_tokens,
        uses=entry.uses,
        company_tokens=entry.origin.company_tokens,
        prefilled_tokens=entry.origin.prefilled_tokens,
        stale=entry.stale,
    )
