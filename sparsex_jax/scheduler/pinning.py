"""Pinning what a request computed, once it is answered. The answers to one request share one pin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import PageCache, PinState
from sparsex_jax.config import Pin
from sparsex_jax.errors import PinLimitError


@dataclasses.dataclass(frozen=True)
class PinRefused:
    """Why an answer is not pinned. The key's earlier pin, if there is one, stays as it was."""

    key: str
    why: str


class Pinning:
    """The pin that a request asks for. Several answers to it are pinned together, each as it ends.

    Attributes:
      key: names the pin. None: not known yet.
    """

    def __init__(self, asked: Pin) -> None:
        self.key, self._ttl_s = asked.key, asked.ttl_s

    def take(
        self, cache: PageCache, tokens: Int32[np.ndarray, "tokens"], namespace: str, fits: Callable[[], bool]
    ) -> PinState | PinRefused | None:
        """Pin what is stored of a prompt and its answer. None if no time was asked for, and the key has no pin.

        Args:
          fits: as `PageCache.pin`.
        """
        assert self.key is not None
        before = cache.pins.get(namespace, self.key)
        ttl_s = before.ttl_s if self._ttl_s is None and before else self._ttl_s
        if ttl_s is None:
            return None
        try:
            return cache.pin(tokens, namespace, self.key, ttl_s, owner=self, fits=fits)
        except PinLimitError as error:
            return PinRefused(self.key, str(error))
