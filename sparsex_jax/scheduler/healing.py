"""Healing: what is approximate becomes exact while nothing else is in line. Remembered texts are made again then too.

Behind a turn that pasted segments, the KV of a conversation is approximate, and so is every later turn's that has it as
a prefix. Healing prefills the same tokens exactly, a chunk at a time, most used content first. Each chunk is a sequence
like any other: its prefix is what is exact already, and once it is committed, its pages replace the approximate ones
(`PageCache.commit`). So nothing is lost if it stops between two chunks, and every chunk counts from then on.

Texts that have seen what was forgotten come first, then what is approximate, then texts for which there is better
company (`remaking`), and at last what adapters read that share what the model computes without them (`neutral`).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.config import EngineConfig, ReuseConfig
from sparsex_jax.reuse.adapters import Acting
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
        return self._remaking.next(stale=True) or self._healed() or self._remaking.next(stale=False) or self._neutral()

    def _healed(self) -> Sequence | None:
        found = self._admission.cache.to_heal(self._chunk)
        if found is None:
            return None
        (keys, namespace), adapters = found, self._admission.adapters
        return self._exactly(adapters.tokens(keys), adapters.behind(keys), namespace)

    def _neutral(self) -> Sequence | None:
        """The next chunk of a text without adapters, for those that share that."""
        admission, cache, adapter = self._admission, self._admission.cache, self._admission.adapters.neutral
        while (text := admission.neutral.first) is not None:
            done = cache.tree.prefix(adapter.keys(text.tokens).tobytes(), text.namespace).num_tokens
            if done < len(text.tokens):
                end = _end_of_chunk(done, self._chunk, len(text.tokens), cache.page_size)
                if admission.pages_for(end) - done // cache.page_size + 1 > cache.num_available:
                    return None
                return self._exactly(text.tokens[:end], adapter, text.namespace)
            admission.neutral.drop(text)
        return None

    def _exactly(self, tokens: Int32[np.ndarray, "tokens"], adapter: Acting | None, namespace: str) -> Sequence:
        options: dict[str, Any] = {"reuse": ReuseConfig(method="prefix"), "namespace": namespace}
        return self._requests.again(tokens, adapter, **options, keep=True, asked=False)

    def rest(self, seconds: float) -> float:
        """How long the device has to rest after a chunk that took so long; not longer than a thread can wait."""
        return min(seconds * (1 / self._share - 1), threading.TIMEOUT_MAX) if self._share else 0.0

    def pause(self) -> None:
        """A chunk failed. Requests go on as ever, and healing tries again later."""
        log.exception("healing failed; it tries again in %.0f s", PAUSE_S)
        self._remaking.try_again()
        self._paused_until = time.monotonic() + PAUSE_S


def _end_of_chunk(done: int, chunk: int, length: int, page_size: int) -> int:
    """Where a chunk behind `done` tokens ends: with a page, or with the text."""
    return min(max((done + chunk) // page_size, done // page_size + 1) * page_size, length)
