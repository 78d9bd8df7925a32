"""The host side of the KV store: which page holds which tokens, who holds which page, and what a prompt can reuse.

Pure Python and NumPy: it hands out page and slot numbers and never sees a key or a value.

Read in this order: `tree` (what is stored), `windows` (where a run of tokens may be), `segments` (what a
prompt can copy), `pages` (who holds a page, which one goes next), `entries` (handles of what is remembered),
and `cache`, which ties them together.
"""

from sparsex_jax.cache.cache import CacheStats, Match, PageCache
from sparsex_jax.cache.entries import Entry
from sparsex_jax.cache.segments import Segment

__all__ = ["CacheStats", "Entry", "Match", "PageCache", "Segment"]
