"""One engine of a fleet: its server's application, called in this process, and what it tells routers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from sparsex_jax.config.checks import require
from sparsex_jax.routing import Load, Position, Sketch
from sparsex_jax.scheduler.peering import Peering
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.fleet.feed import DigestFeed
from sparsex_jax.serving.fleet.kv_events import KvEvents, KvEventsConfig
from sparsex_jax.serving.fleet.observers import Observers
from sparsex_jax.serving.fleet.peer_counts import PeerMetrics, PeerStats
from sparsex_jax.serving.fleet.peer_server import PeerServer
from sparsex_jax.serving.fleet.peers import PeerConfig, Peers
from sparsex_jax.serving.fleet.preview import Prompt
from sparsex_jax.serving.fleet.seal import Seal
from sparsex_jax.serving.health import LIVE, state_of
from sparsex_jax.serving.worker import Worker


@dataclasses.dataclass(frozen=True)
class Forwarded:
    """An HTTP request on its way to a replica. It can be pickled.

    Attributes:
      headers: names in lower case, as ASGI has them.
      client: address and port of the client.
      prompt: what it asks, where another replica has more of that than this one.
      held_at: the address at which that replica gives blocks to others.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int] | None = None
    prompt: Prompt | None = None
    held_at: str | None = None

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": [*self.headers],
            "client": self.client,
            "server": None,
            "state": {},
        }


@dataclasses.dataclass(frozen=True)
class Told:
    """What a replica tells a router that asked.

    Attributes:
      updates: of its digest, as bytes, in order.
      load: what it has to do.
      address: where other replicas get blocks from it. None: nowhere.
      moved: blocks that it got from others and sent to them. None: it does not.
    """

    updates: list[bytes]
    load: Load
    address: str | None = None
    moved: PeerStats | None = None


class Replica:
    """An engine's server without sockets. Use as `async with Replica(...) as replica`."""

    def __init__(
        self,
        app: FastAPI,
        worker: Worker,
        sketch: Sketch,
        *,
        limits: Limits,
        events: KvEventsConfig | None = None,
        rank: int = 0,
        peers: PeerConfig | None = None,
    ) -> None:
        """
        Args:
          app: of `create_app` for the worker.
          sketch: the fleet's.
          limits: those of the app.
          events: where KV events are published, by the replica of rank 0. None: nowhere.
          rank: the replica's number, which KV events name.
          peers: how it gets blocks from other replicas, and gives them its own. None: it does not.

        Raises:
          InvalidRequestError: events cannot be published there, or there is no host memory to have others' blocks in.
        """
        self._app, self._worker, self._limits = app, worker, limits
        engine = worker.engine
        shape: dict[str, Any] = {
            "vocab_size": engine.model.vocab_size,
            "num_pages": len(engine.cache.tree.node_of),  # derived ones too
        }
        self.feed = DigestFeed(sketch, **shape)
        self.events: KvEvents | None = None
        if events is not None:
            about: dict[str, Any] = {"page_size": engine.config.page_size, "retell": self._retell_later, "rank": rank}
            self.events = KvEvents(events.of_rank(rank), **about, **shape)
        require(
            peers is None or engine.config.host_store_bytes > 0,
            "peers needs host_store_bytes above 0: what comes from other replicas is kept in host memory",
        )
        self._peer_config, self._seal = peers, Seal(sketch.key)
        self._peers: Peers | None = None
        self._address: str | None = None
        self._moved: PeerStats | None = None
        self._observers = Observers(*(each for each in (self.feed, self.events) if each is not None))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_retelling = False
        self._held = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Replica:
        self._loop = asyncio.get_running_loop()
        await self._held.enter_async_context(self._app.router.lifespan_context(self._app))
        if self.events is not None:
            self._held.callback(self.events.start().stop)
        await self._worker.call(self._worker.engine.admission.watch, self._observers)
        if self._peer_config is not None:
            await self._meet_peers(self._peer_config)
        return self

    async def _meet_peers(self, config: PeerConfig) -> None:
        """Raises AddressError: the address cannot be had."""
        engine = self._worker.engine
        peering = Peering(engine.admission, engine.model)
        model = await self._worker.call(lambda: peering.tiers.model)
        self._peers = Peers(self._worker, peering, model, self._seal, config)
        server = PeerServer(self._worker, peering, model, self._seal)
        self._moved = PeerStats(self._peers.counts, server.counts)
        self._app.state.service.metrics.add(PeerMetrics(self._moved))
        self._held.push_async_callback(self._peers.stop)
        self._held.push_async_callback(server.stop)
        self._address = await server.start(config.host or "127.0.0.1", config.port)

    async def __aexit__(self, *_: object) -> None:
        await self._held.aclose()

    async def answer(self, request: Forwarded) -> AsyncGenerator[Message]:
        """The messages of the response, as ASGI has them. If it is closed early, the request is cancelled.

        What another replica has of the prompt is fetched first, if that pays.
        """
        if self._peers is not None and request.held_at is not None and request.prompt is not None:
            await self._peers.bring(request.held_at, request.prompt)
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = [{"type": "http.request", "body": request.body, "more_body": False}]
        is_gone = asyncio.Event()

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(request.scope(), receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task  # raises what the application did not turn into a response
        finally:
            is_gone.set()
            await asyncio.wait([task], timeout=self._limits.client_timeout)
            task.cancel()

    async def tell(self, position: Position) -> Told:
        """What changed behind a position, and the load."""
        if self.feed.is_lost:
            await self._retell()
        updates = await asyncio.to_thread(self.feed.since, position)
        loop = self._worker.loop
        return Told(updates, Load(float(loop.queued_tokens), loop.stats.running), self._address, self.moved)

    @property
    def moved(self) -> PeerStats | None:
        """Blocks that came from other replicas and went there. None: none ever do."""
        return self._moved and self._moved.copy()

    def is_live(self) -> bool:
        """Whether it works, or recovers by itself."""
        return state_of(self._worker, self._limits) in LIVE

    # Where an observer could not keep up --------------------------------------------------------------------

    def _retell_later(self) -> None:
        """From any thread."""
        if self._loop is not None and not self._is_retelling:
            self._is_retelling = True
            asyncio.run_coroutine_threadsafe(self._retell(), self._loop)

    async def _retell(self) -> None:
        try:
            await self._worker.call(self._tell_all)
        finally:
            self._is_retelling = False

    def _tell_all(self) -> None:
        self._observers.cleared()
        self._worker.engine.admission.watch(self._observers)
