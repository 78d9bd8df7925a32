"""What is in a store, and what happened there since its engine was made, in numbers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Hits(NamedTuple):
    """Tokens of a prompt that a lookup found: in an exact prefix, in an approximate one behind it, in segments."""

    prefix: int = 0
    approximate_prefix: int = 0
    segment: int = 0


@dataclasses.dataclass
class CacheCounts:
    """Numbers that only grow. A cache that replaces one whose KV was lost goes on with the counts of that one."""

    lookups: int = 0
    prefix_tokens: int = 0
    approximate_prefix_tokens: int = 0
    segment_tokens: int = 0
    evictions: int = 0
    derived_pages: int = 0
    restored_pages: int = 0

    def found(self, hits: Hits) -> None:
        """Count a lookup that served a prompt."""
        self.lookups += 1
        self.prefix_tokens += hits.prefix
        self.approximate_prefix_tokens += hits.approximate_prefix
        self.segment_tokens += hits.segment


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Pages by state, what is stored, and the `CacheCounts`.

    Attributes:
      pages: all pages of the store.
      free, active, frozen, pinned, base, spare, cached: pages in each state (see `sparsex_jax.cache.pages`). They
        add up to `pages`.
      derived: derived pages (`sparsex_jax.cache.mirrors`).
      saved: how many pages more the store would need without them.
      patch_rows: rows of single layers that they have of their own.
      pins: how many there are.
      tokens: tokens in committed pages, which lookups can find.
      approximate_tokens: how many of those are approximate, in place behind position 0: what `to_heal` is about.
      windows: windows of 8 tokens in the index.
      lookups: prompts that were looked up, each once however often it was looked up again.
      prefix_tokens, approximate_prefix_tokens, segment_tokens: tokens that were found of those prompts as exact
        prefixes, as approximate ones behind them, and as segments.
      evictions: cached pages that were evicted, but for those with a derived page that has the same.
      derived_pages, restored_pages: how many were derived, and how many of those were restored for a prompt.
    """

    pages: int
    free: int
    active: int
    frozen: int
    pinned: int
    base: int
    spare: int
    cached: int
    derived: int
    saved: int
    patch_rows: int
    pins: int
    tokens: int
    approximate_tokens: int
    windows: int
    lookups: int
    prefix_tokens: int
    approximate_prefix_tokens: int
    segment_tokens: int
    evictions: int
    derived_pages: int
    restored_pages: int
