"""Inserting knowledge: a text is prefilled among the running requests, and counts against its key's quota meanwhile."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsex_jax.engine import Engine
from sparsex_jax.scheduler.loop import Event, Listener, Loop, Ticket
from sparsex_jax.serving.access import Quota
from sparsex_jax.serving.worker import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Knowledge:
    """A text to keep frozen, as token ids, and what it is prefilled behind: a preamble, or `company` as in `remember`.

    Its methods run on the loop's thread, and so does everything that happens to the quota. A client that goes away
    at any moment leaves the quota right.
    """

    text: np.ndarray
    preamble: np.ndarray | None
    company: bool | None
    namespace: str
    quota: Quota

    def start(self, engine: Engine, stream: Stream) -> None:
        """Reserve room in the quota and submit. Raises QuotaError, and as `Loop.remember`."""
        self.quota.reserve(len(self.text), engine.entries())
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

        return loop.remember(
            self.text,
            namespace=self.namespace,
            frozen=True,
            preamble=self.preamble,
            company=self.company,
            listener=settle,
        )
