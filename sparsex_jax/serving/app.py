"""The HTTP application: OpenAI's endpoints, the knowledge base, health, metrics and the page.

A request passes these steps: API key -> body -> checked fields -> place in the line -> token ids -> scheduler ->
events -> OpenAI's objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from sparsex_jax.cache import Entry, Forgotten
from sparsex_jax.engine import Engine
from sparsex_jax.serving import adapters as adapter_endpoints
from sparsex_jax.serving import faults, health, schemas
from sparsex_jax.serving.access import Access, ForbiddenError, Limits
from sparsex_jax.serving.exchange import Exchange, Exchanges
from sparsex_jax.serving.methods import Cors, HeadAsGet
from sparsex_jax.serving.models import Models
from sparsex_jax.serving.openai import ChatFormat, CompletionFormat
from sparsex_jax.serving.pins import entry_of as pin_entry
from sparsex_jax.serving.protocols import routers
from sparsex_jax.serving.reply import Extent, Reply
from sparsex_jax.serving.request_log import RequestLog
from sparsex_jax.serving.routing import ERRORS, Caller, Salt, Served, keyed_router
from sparsex_jax.serving.service import Asked, Pieces, Service, entry_of
from sparsex_jax.serving.tiers import tiers_of
from sparsex_jax.serving.tracing import Tracing
from sparsex_jax.serving.worker import Worker
from sparsex_jax.text.thoughts import AUTO, check_parser

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
# The page loads nothing from other hosts, and no text of a model or a document may run as a script.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(
    worker: Worker,
    *,
    model: str,
    access: Access | None = None,
    limits: Limits | None = None,
    request_log: RequestLog | None = None,
    tracing: Tracing | None = None,
    allowed_origins: Sequence[str] | Cors = (),
    reasoning_parser: str = AUTO,
    adapters: Mapping[str, str] = MappingProxyType({}),
    allow_adapter_updates: bool = False,
) -> FastAPI:
    """The application. It starts the worker when it starts, and stops the worker when it stops.

    Args:
      model: the model's name in requests.
      access: the API keys. None: requests need no key.
      limits: of requests. None: the defaults.
      request_log: gets every request, and is closed with the application. None: nothing is logged.
      tracing: gets every request too, and is closed with the application. None: nothing is traced.
      allowed_origins: whose scripts may send requests, or, as `Cors`, also what these may send.
      reasoning_parser: how thoughts are found in the answers to chats: `auto`, `none`, or one of `thoughts.PARSERS`.
      adapters: what the engine's adapters were loaded from, by name, for `/v1/models`.
      allow_adapter_updates: whether requests may load and unload adapters. They name directories of this machine.

    Raises:
      InvalidRequestError: an adapter has the model's name, or the parser is unknown.
    """
    check_parser(reasoning_parser)
    limits = limits or Limits()
    listeners = [each for each in (request_log, tracing) if each is not None]
    worker.loop.traced = tracing is not None
    models = Models(worker.engine, model, adapters)
    access = access or Access.open(limits)
    service = Service(worker, models, access, limits, reasoning_parser, allow_adapter_updates=allow_adapter_updates)
    for name in worker.engine.adapters:
        service.metrics.expect_adapter(name)
    lifespan = functools.partial(_lifespan, service, listeners)
    app = FastAPI(title="sparsex-jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_endpoints(app, service)
    app.add_middleware(HeadAsGet)
    cors = allowed_origins if isinstance(allowed_origins, Cors) else Cors(tuple(allowed_origins))
    cors.install(app)
    # Around all others, so that every response has its id and is counted: preflights and what failed too.
    app.add_middleware(Exchanges, metrics=service.metrics, log=_tell(listeners))
    faults.install(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(service: Service, listeners: Sequence[RequestLog | Tracing], _: FastAPI) -> AsyncIterator[None]:
    service.worker.start()
    service.metrics.listening()
    yield
    await asyncio.to_thread(service.worker.stop)
    await asyncio.sleep(0)  # the last events of what was cut off come now
    for each in listeners:
        await asyncio.to_thread(each.close)


def _add_endpoints(app: FastAPI, service: Service) -> None:
    """All endpoints, which `/metrics` counts by their paths, and the page."""
    included = (router, public, health.router, adapter_endpoints.router, *routers)
    for each in included:
        app.include_router(each)
    routes = [route for each in included for route in each.routes]
    service.metrics.expect(route.path for route in routes if isinstance(route, Route))
    app.mount("/page", StaticFiles(directory=PAGE))


def _tell(listeners: Sequence[RequestLog | Tracing]) -> Callable[[Exchange], None]:
    """What tells all of them of an exchange. That one of them fails is no matter of the request's."""

    def tell(exchange: Exchange) -> None:
        for each in listeners:
            try:
                each.write(exchange)
            except Exception:
                log.exception("a request could not be logged or traced")

    return tell


# Endpoints --------------------------------------------------------------------------------------------------


router = keyed_router()
public = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions")
async def chat_completions(body: schemas.ChatRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Answer a chat, as OpenAI's endpoint does."""

    def make_format(_: int) -> ChatFormat:
        return ChatFormat(
            service.texts,
            bool(body.logprobs),
            names_are_ids=bool(body.return_tokens_as_token_ids),
            is_named=isinstance(body.tool_choice, schemas.NamedTool),
        )

    def make_reply(asked: Asked, pieces: Pieces) -> Reply:
        extent = Extent.of(body)
        name = service.name_of(asked)
        return Reply(make_format, service.texts, name, asked.jobs, pieces, extent, lambda: service.reader(asked))

    return await service.generate(request, body, tenant, service.asked_chat, make_reply)


@router.post("/v1/completions")
async def completions(body: schemas.CompletionRequest, request: Request, service: Served, tenant: Caller) -> Response:
    """Continue one or several texts, as OpenAI's endpoint does."""

    def make_reply(asked: Asked, pieces: Pieces) -> Reply:
        def make_format(number: int) -> CompletionFormat:
            echo = asked.echoes[number // body.num_answers] if asked.echoes else None
            names_are_ids = bool(body.return_tokens_as_token_ids)
            return CompletionFormat(service.texts, body.logprobs, names_are_ids=names_are_ids, echo=echo)

        return Reply(make_format, service.texts, service.name_of(asked), asked.jobs, pieces, Extent.of(body))

    return await service.generate(request, body, tenant, service.asked_completion, make_reply)


@router.get("/v1/models")
async def models(service: Served, tenant: Caller) -> schemas.ModelList:
    """The model, and behind it the adapters that are loaded."""
    cards = [service.card(each) for each in service.models]
    return schemas.ModelList(data=cards, first_id=cards[0].id, last_id=cards[-1].id)


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Served, tenant: Caller) -> schemas.ModelCard:
    return service.card(service.models.named(model))


@router.post("/v1/knowledge")
async def insert_knowledge(
    body: schemas.KnowledgeRequest, request: Request, service: Served, tenant: Caller
) -> schemas.KnowledgeEntry:
    """Prefill a text and keep its KV frozen. Prompts of the same key and salt reuse it."""
    return _described(await service.insert(request, body, tenant), service.model)


@router.get("/v1/knowledge")
async def list_knowledge(service: Served, tenant: Caller, cache_salt: Salt = None) -> schemas.KnowledgeList:
    """The knowledge that is kept under this key and salt, oldest first."""
    entries = await service.call(service.worker.engine.entries, tenant.store_namespace(cache_salt))
    return schemas.KnowledgeList(data=[_described(entry, service.model) for entry in entries])


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


@router.get("/v1/pins")
async def list_pins(service: Served, tenant: Caller, cache_salt: Salt = None) -> schemas.PinList:
    """What is pinned under this key and salt, oldest first."""
    pins = await service.call(service.worker.engine.pins, tenant.store_namespace(cache_salt))
    return schemas.PinList(data=[pin_entry(pin) for pin in pins])


@router.delete("/v1/pins/{key:path}")
async def release_pin(key: str, service: Served, tenant: Caller, cache_salt: Salt = None) -> schemas.PinDeleted:
    """Release a pin: its pages stay as long as there is room. One of another key or salt is as unknown as any other."""
    namespace = tenant.store_namespace(cache_salt)
    pin = await service.call(functools.partial(service.worker.engine.unpin, key, namespace=namespace))
    return schemas.PinDeleted(key=key, num_tokens=pin.num_tokens, pages=pin.num_pages)


@router.get("/v1/store")
async def store(service: Served, tenant: Caller) -> schemas.Store:
    """The store's pages by state, and how full the tiers are, over all namespaces."""
    engine = service.worker.engine
    stats = dataclasses.asdict(engine.loop.snapshot)
    return schemas.Store.model_validate(stats | {"page_size": engine.config.page_size, "tiers": tiers_of(engine)})


@router.get("/metrics")
async def metrics(service: Served, tenant: Caller) -> Response:
    """The metrics of the whole server, for Prometheus."""
    if not tenant.metrics:
        raise ForbiddenError("this key may not read the figures of the whole server")
    loop = service.worker.loop
    stats = dataclasses.replace(loop.stats, waiting=loop.stats.waiting + service.line.waiting)
    return Response(service.metrics.render(loop.snapshot, stats, loop.tiers), media_type="text/plain; version=0.0.4")


@public.get("/version")
async def version() -> schemas.Version:
    return schemas.Version(version=importlib.metadata.version("sparsex-jax"))


@public.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


# On the loop's thread ---------------------------------------------------------------------------------------


def _forget(engine: Engine, handle: int, namespace: str) -> Forgotten:
    return engine.forget(entry_of(engine, handle, namespace).handle)


def _described(entry: Entry, base: str) -> schemas.KnowledgeEntry:
    return schemas.KnowledgeEntry(
        handle=entry.handle,
        model=entry.origin.adapter or base,
        sharing=entry.origin.sharing,
        num_tokens=entry.num_tokens,
        uses=entry.uses,
        company_tokens=entry.origin.company_tokens,
        prefilled_tokens=entry.origin.prefilled_tokens,
        stale=entry.stale,
    )
