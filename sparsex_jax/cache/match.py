"""What a lookup gives: the parts of a prompt that are stored."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsex_jax.cache.counts import Hits
from sparsex_jax.cache.segments import Segment


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """What a prompt can reuse. None of its pages is evicted before `PageCache.let_go(match)`.

    Attributes:
      prefix_pages: full pages of the prefix. The sequence shares them; in place of those that are derived, it restores
        pages of its own (`Mirrors.restore`).
      prefix_tail: tokens right behind those pages. They are copied, since the sequence needs the rest of their page
        for tokens of its own.
      segments: runs outside the prefix, disjoint and in order. They are copied and their keys rotated.
      num_prefix_tokens: tokens of the pages and the tail together. At most the prompt's length less one, because the
        last prompt token is always computed.
      num_exact_tokens: how many of those are exact. The others, behind them, are an approximate prefix.
      pages: every page that any of these is in, each once.
    """

    prefix_pages: list[int]
    prefix_tail: Segment | None
    segments: list[Segment]
    num_prefix_tokens: int
    num_exact_tokens: int
    pages: tuple[int, ...]

    @classmethod
    def nothing(cls) -> Match:
        """The match of a prompt of which nothing is stored."""
        return cls([], None, [], 0, 0, ())

    @property
    def hits(self) -> Hits:
        """How many tokens were found, by where."""
        approximate = self.num_prefix_tokens - self.num_exact_tokens
        return Hits(self.num_exact_tokens, approximate, sum(segment.length for segment in self.segments))

    @property
    def copies(self) -> tuple[Segment, ...]:
        """Everything that is copied, in order."""
        return (*([self.prefix_tail] if self.prefix_tail else []), *self.segments)

    def without_segments(self) -> Match:
        """The prefix alone."""
        return dataclasses.replace(self, segments=[])

    def exact_prefix(self, page_size: int) -> Match:
        """The exact prefix alone. Exact tokens of a page that is not exact as a whole are copied."""
        whole, rest = divmod(self.num_exact_tokens, page_size)
        tail = self.prefix_tail
        if whole < len(self.prefix_pages):
            slots = self.prefix_pages[whole] * page_size + np.arange(page_size)
            tail = Segment(whole * page_size, page_size, whole * page_size, slots, exact=False)
        tail = dataclasses.replace(tail, length=rest, slots=tail.slots[:rest], exact=True) if tail and rest else None
        return Match(self.prefix_pages[:whole], tail, [], self.num_exact_tokens, self.num_exact_tokens, self.pages)
