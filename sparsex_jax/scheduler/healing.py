"""Healing: what is approximate becomes exact while nothing else is in line.

Behind a turn that pasted segments, the KV of a conversation is approximate, and so is every later turn's that has it as
a prefix. Healing prefills the same tokens exactly, a chunk at a time, most used content first. Each chunk is a sequence
like any other: its prefix is what is exact already, and once it is committed, its pages replace the approximate ones
(`PageCache.commit`). So nothing is lost if it stops between two chunks, and every chunk counts from then on.
"""

from __future__ import annotations

import logging
import threading

from sparsex_jax.config import EngineConfig, ReuseConfig
from sparsex_jax.reuse.planner import Shapes
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.requests import Requests
from sparsex_jax.scheduler.sequence import Sequence

log = logging.getLogger(__name__)


class Healing:
    """Decides what is healed next, and how much of the idle time that may take."""

    def __init__(self, config: EngineConfig, shapes: Shapes, admission: Admission, requests: Requests) -> None:
        self._share, self._admission, self._requests = config.healing, admission, requests
        self._chunk = shapes.buckets[0][0]

    def next(self) -> Sequence | None:
        """The prefill of the next chunk. None if nothing is approximate, or healing is off, or there is no room."""
        found = self._admission.cache.to_heal(self._chunk) if self._share else None
        if found is None:
            return None
        tokens, namespace = found
        exact = ReuseConfig(method="prefix")
        return self._requests.prefill(tokens, reuse=exact, namespace=namespace, keep=True, heals=True)

    def rest(self, seconds: float) -> float:
        """How long the device has to rest after a chunk that took so long; not longer than a thread can wait."""
        return min(seconds * (1 / self._share - 1), threading.TIMEOUT_MAX)

    def stop(self) -> None:
        """A chunk failed, though it was asked for before: heal nothing from now on. Requests go on as ever."""
        log.exception("healing failed and is off from now on")
        self._share = 0.0
