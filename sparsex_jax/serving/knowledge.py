"""Inserting knowledge: a text is prefilled among the running requests, and counts against its key's quota meanwhile."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsex_jax.engine import Engine
from sparsex_jax.scheduler.loop import Event, Listener, Loop, Ticket
from sparsex_jax.serving.access import Quota
from sparsex_jax.serving.worker import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Knowledge:
    """A text to keep frozen, as token ids, and what it is prefilled behind: a preamble, or `company` as in `remember`.
    An adapter may act on it, and is named; `sharing` says who else finds it, as in `remember`.

    Its methods run on the loop's thread, and so does everything that happens to the quota. A client that goes away
    at any moment leaves the quota right.
    """

    text: np.ndarray
    preamble: np.ndarray | None
    company: bool | None
    namespace: str
    quota: Quota
    adapter: str | None = None
    sharing: str = "isolated"

    def start(self, engine: Engine, stream: Stream) -> None:
        """Reserve room in the quota and submit. Raises QuotaError, and as `Loop.remember`."""
        self.quota.reserve(len(self.text), engine.entries(), self._known(engine))
        try:
            stream.submit(self)
        except BaseException:
            self.quota.settle(len(self.text), None)
            raise

    def submit(self, loop: Loop, listener: Listener) -> Ticket:
        def settle(event: Event) -> None:
            if event.finish_reason is not None:
                self.quota.settle(len(self.text), event.handle)
            listener(event)

        return loop.remember(self.text, frozen=True, listener=settle, **self._asked)

    @property
    def _asked(self) -> dict[str, Any]:
        about = {"namespace": self.namespace, "preamble": self.preamble, "company": self.company}
        return about | {"adapter": self.adapter, "sharing": self.sharing}

    def _known(self, engine: Engine) -> int | None:
        """The handle of the same text, if it is kept already."""
        asked = engine.loop.requests.remember(self.text, frozen=True, **self._asked).remember
        entry = asked and engine.cache.entry_of(asked.namespace, asked.content)
        return entry.handle if entry else None
