"""Healing: what is approximate becomes exact while nothing else is in line. Remembered texts are made again then too.

Behind a turn that pasted segments, the KV of a conversation is approximate, and so is every later turn's that has it as
a prefix. Healing prefills the same tokens exactly, a chunk at a time, most used content first. Each chunk is a sequence
like any other: its prefix is what is exact already, and once it is committed, its pages replace the approximate ones
(`PageCache.commit`). So nothing is lost if it stops between two chunks, and every chunk counts from then on.

Texts that have seen what was forgotten come first, and texts for which there is better company last (`remaking`).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from sparsex_jax.config import EngineConfig, ReuseConfig
from sparsex_jax.reuse.planner import Shapes
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.remaking import Remaking
from sparsex_jax.scheduler.requests import Requests
from sparsex_jax.scheduler.sequence import Sequence

PAUSE_S = 60.0  # after a failure

log = logging.getLogger(__name__)


class Healing:
    """Decides what is healed next, and how much of the idle time that may take."""

    def __init__(self, config: EngineConfig, shapes: Shapes, admission: Admission, requests: Requests) -> None:
        self._share, self._admission, self._requests = config.healing, admission, requests
        self._chunk, self._paused_until = shapes.buckets[0][0], 0.0
        self._remaking = Remaking(self._chunk, admission, requests)

    def next(self, *, asked: bool) -> Sequence | None:
        """The prefill of the next chunk. None if there is nothing to do, or no room.

        Args:
          asked: somebody waits for it. Otherwise None too where healing is off, or paused.
        """
        if not asked and (self._share == 0 or time.monotonic() < self._paused_until):
            return None
        return self._remaking.next(stale=True) or self._healed() or self._remaking.next(stale=False)

    def _healed(self) -> Sequence | None:
        found = self._admission.cache.to_heal(self._chunk)
        if found is None:
            return None
        keys, namespace = found
        exact, adapters = ReuseConfig(method="prefix"), self._admission.adapters
        options: dict[str, Any] = {"reuse": exact, "namespace": namespace, "keep": True, "asked": False}
        return self._requests.again(adapters.tokens(keys), adapters.behind(keys), **options)

    def rest(self, seconds: float) -> float:
        """How long the device has to rest after a chunk that took so long; not longer than a thread can wait."""
        return min(seconds * (1 / self._share - 1), threading.TIMEOUT_MAX) if self._share else 0.0

    def pause(self) -> None:
        """A chunk failed. Requests go on as ever, and healing tries again later."""
        log.exception("healing failed; it tries again in %.0f s", PAUSE_S)
        self._remaking.try_again()
        self._paused_until = time.monotonic() + PAUSE_S
