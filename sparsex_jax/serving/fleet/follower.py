"""Keeps a router up to date: asks all replicas for news, again and again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from sparsex_jax.routing import Router, Update

if TYPE_CHECKING:
    from sparsex_jax.serving.fleet.front import Backend
    from sparsex_jax.serving.fleet.peer_counts import PeerStats

_PATIENCE_S = 5.0  # with a replica that does not reply; the others are asked meanwhile

log = logging.getLogger(__name__)


class Follower:
    """Asks in the background, from `start` to `stop`.

    Attributes:
      addresses: where those replicas give blocks to others that do, by their names.
      moved: the blocks that those replicas got from others and sent to them.
    """

    def __init__(self, router: Router, backend: Backend, period_s: float) -> None:
        self._router, self._backend, self._period_s = router, backend, period_s
        self.addresses: dict[str, str] = {}
        self.moved: dict[str, PeerStats] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, on the event loop that runs."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        tasks = [task for task in (self._task, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception:
                log.exception("the replicas could not be asked for news")
            await asyncio.sleep(self._period_s)

    def look(self) -> None:
        """Take over which replicas there are, and ask those that do not owe a reply."""
        there = self._backend.replicas()
        for gone in set(self._router.replicas).difference(there):
            self._router.leave(gone)
            self.addresses.pop(gone, None)
            self.moved.pop(gone, None)
        for name in there:
            self._router.join(name)
            if name not in self._asking or self._asking[name].done():
                self._asking[name] = asyncio.ensure_future(self._ask(name))
        for name in set(self._asking).difference(there):
            self._asking.pop(name).cancel()

    async def _ask(self, name: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                told = await self._backend.tell(name, self._router.position(name))
        except Exception as error:  # whatever it is, the router knows for how long nothing was heard
            log.debug("replica %s did not reply: %r", name, error)
            return
        for update in told.updates:
            self._router.apply(name, Update.from_bytes(update))
        self._router.report(name, told.load)
        if told.address is not None:
            self.addresses[name] = told.address
        if told.moved is not None:
            self.moved[name] = told.moved

    async def settled(self) -> None:
        """Until all who were asked have replied."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._asking.values())
