"""How much of a store stays however full it gets: pages of frozen entries, and of pins.

    the store  | frozen: at most frozen_limit of it | pinned: at most max_pinned of what frozen ones leave | the rest |

A page that a frozen entry has counts as frozen, also if pins have it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsex_jax.cache.pages import PagePool
from sparsex_jax.errors import FrozenLimitError


class KeptLimits:
    """The limits of one cache. It decides, and changes nothing."""

    def __init__(self, pool: PagePool, page_size: int, frozen_limit: float, max_pinned: float) -> None:
        """
        Args:
          frozen_limit: share of the store, from 0 to 1, that frozen entries may fill.
          max_pinned: share, from 0 to 1, of what frozen entries leave of the store that pins may have.
        """
        self._pool, self._page_size, self._max_pinned = pool, page_size, max_pinned
        self._max_frozen = int(len(pool) * frozen_limit)

    @property
    def num_left(self) -> int:
        """How many pages frozen entries and pins leave to everything else."""
        return len(self._pool) - self._pool.sums.kept

    @property
    def num_pinned(self) -> int:
        """Pages that pins have, and no frozen entry."""
        return self._pool.sums.kept - self._pool.sums.frozen

    @property
    def most_pinned(self) -> int:
        """How many such pages all pins together may have now."""
        return self._most_pinned(self._pool.sums.frozen)

    def _most_pinned(self, num_frozen: int) -> int:
        """The same where frozen entries have so many."""
        return int(self._max_pinned * (len(self._pool) - num_frozen))

    def allows_frozen(self, own: Sequence[int], num_pages: int) -> bool:
        """Whether a frozen entry may have this many new pages in place of its own."""
        alone = int((self._pool.frozen[list(own)] == 1).sum())
        frozen = self._pool.sums.frozen - alone + num_pages
        return frozen <= self._max_frozen and self.num_pinned <= self._most_pinned(frozen)

    def require_frozen(self, pages: Sequence[int], more: int = 0) -> None:
        """Raise FrozenLimitError unless frozen entries may have these pages too, and `more` new ones."""
        new = [page for page in pages if self._pool.frozen[page] == 0]
        wanted, frozen = len(new) + more, self._pool.sums.frozen
        needs = f"the text needs {wanted} pages of {self._page_size} tokens"
        if frozen + wanted > self._max_frozen:
            raise FrozenLimitError(
                f"{needs}; frozen texts have {frozen} of the {self._max_frozen} pages that they may have. Forget one "
                "of them, or make store_tokens or frozen_limit larger"
            )
        pinned = self.num_pinned - int((self._pool.pinned[new] > 0).sum())
        if pinned > self._most_pinned(frozen + wanted):
            raise FrozenLimitError(
                f"{needs}, and pins have {pinned} of the {len(self._pool) - frozen} that frozen texts leave. Release "
                "one, or wait until its time is over"
            )

    def why_not_pinned(self, num_pages: int) -> str | None:
        """Why a pin that has this many pages may not have them. None: it may."""
        if self.num_pinned <= self.most_pinned:
            return None
        return (
            f"{self.pin_needs(num_pages)}, and all pins together would have {self.num_pinned} of the "
            f"{self.most_pinned} that they may have"
        )

    def pin_needs(self, num_pages: int) -> str:
        return f"the pin needs {num_pages} pages of {self._page_size} tokens"
