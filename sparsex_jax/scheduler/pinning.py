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


@dataclasses.dataclass(frozen=True, eq=False)
class PinShare:
    """How much one client may pin. All its pins name the same object.

    Attributes:
      max_tokens: of whole pages. None: its part of what all pins may have.
      part: from 0 to 1.
    """

    max_tokens: int | None = None
    part: float = 1.0

    def refusal(self, cache: PageCache) -> str | None:
        """Why the pins of this client have too many pages. None: they have not."""
        pages = {page for _, held in cache.pins if getattr(held.owner, "share", None) is self for page in held.pages}
        named = None if self.max_tokens is None else self.max_tokens // cache.page_size
        most = int(self.part * cache.pin_limit) if named is None else named
        if len(pages) <= most:
            return None
        name = "the part of all pins that one key may have" if named is None else f"max_pinned_tokens={self.max_tokens}"
        return f"this key would have {len(pages)} pages of {cache.page_size} tokens pinned, and {name} is {most} pages"


class Pinning:
    """The pin that a request asks for. Several answers to it are pinned together, each as it ends.

    Attributes:
      key: names the pin. None: not known yet.
      share: of the client who asks.
    """

    def __init__(self, asked: Pin, share: PinShare | None = None) -> None:
        """
        Args:
          share: None: as much as all pins together may have.
        """
        self.key, self._ttl_s = asked.key, asked.ttl_s
        self.share = share or PinShare()

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
        whys: list[str] = []

        def is_within_share() -> bool:
            whys.extend(filter(None, [self.share.refusal(cache)]))
            return not whys

        try:
            return cache.pin(tokens, namespace, self.key, ttl_s, owner=self, fits=lambda: is_within_share() and fits())
        except PinLimitError as error:
            return PinRefused(self.key, next(iter(whys), str(error)))
