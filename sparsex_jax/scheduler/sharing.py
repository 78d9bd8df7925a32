"""Whether a sequence should wait for what another one computes right now, instead of computing it too."""

from __future__ import annotations

import functools
import secrets
import weakref

import numpy as np
from jaxtyping import Int32, UInt64

from sparsex_jax.cache.windows import WINDOW, window_hashes
from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.prompt import PromptMap

# Shorter runs are computed faster than waited for.
LEAST_SHARED = 64
# A hash decides only who waits. It is secret, so that no client can make others wait.
_SALT = secrets.randbits(64)


class Wanted:
    """A prompt, and how its method can use what is stored."""

    def __init__(self, keys: Int32[np.ndarray, "tokens"], reuse: ReuseConfig) -> None:
        """
        Args:
          keys: what the prompt's tokens are found by.
        """
        self._tokens, self._reuse = keys, reuse
        self._known: weakref.WeakKeyDictionary[Offer, bool] = weakref.WeakKeyDictionary()

    def knows(self, offer: Offer) -> bool:
        """Whether `shares` has been found out, so that asking again costs nothing."""
        return offer in self._known

    def shares(self, offer: Offer) -> bool:
        """Whether enough of the offer is of use for waiting to pay. Asked each round, found out once."""
        if offer not in self._known:
            self._known[offer] = self._shared_tokens(offer) >= LEAST_SHARED
        return self._known[offer]

    def _shared_tokens(self, offer: Offer) -> int:
        if self._reuse.uses_segments:
            return WINDOW * self._num_common_windows(offer)
        return self._common_prefix(offer) - offer.num_prefix if self._reuse.uses_prefix else 0

    def _num_common_windows(self, offer: Offer) -> int:
        if len(self._windows) == 0:
            return 0
        places = np.searchsorted(self._windows, offer.windows)
        return int((self._windows.take(places, mode="clip") == offer.windows).sum())

    def _common_prefix(self, offer: Offer) -> int:
        size = min(len(self._tokens), len(offer.exact))
        return int((self._tokens[:size] == offer.exact[:size]).cumprod().sum())

    @functools.cached_property
    def _windows(self) -> UInt64[np.ndarray, "offsets"]:
        """The hashes of the windows at all offsets, sorted once, so that each offer is looked up quickly."""
        return np.sort(window_hashes(self._tokens, _SALT))


class Offer:
    """What a sequence computes that others can find once it is committed.

    Attributes:
      num_prefix: tokens of the prompt that are found already.
      exact: the keys of the tokens whose KV will be exact.
      windows: hashes of windows on the grid on which they will be stored, those with fresh tokens only.
    """

    def __init__(self, prompt: PromptMap, keys: Int32[np.ndarray, "tokens"]) -> None:
        """
        Args:
          keys: what its tokens are found by.
        """
        self.num_prefix = prompt.num_prefix
        self.exact = keys[: prompt.exact_frontier]
        whole = len(prompt) // WINDOW
        on_grid = slice(whole * WINDOW)
        fresh = prompt.fresh[on_grid].reshape(whole, WINDOW).all(axis=1)
        self.windows = window_hashes(keys[on_grid].reshape(whole, WINDOW)[fresh], _SALT)[:, 0]
