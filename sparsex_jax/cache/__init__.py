"""The host side of the KV store: which tokens are in each page, which sequences hold it, and what a prompt can reuse.

It is pure Python and NumPy. It hands out page and slot numbers and never sees a key or a value.

Read in this order: `tree` (the tokens in every page) with `children`, `windows` (an index from 8 tokens to the places
that store them), `segments` (the search for what a prompt can copy) with `match` (what was found), `pages` (references
and eviction order), `entries` (handles of remembered texts) with `company` (what they were made behind), `pins` (what
stays for a time), `derived` and `mirrors` (what is stored as rows of other pages), `healer` (what is made exact next),
and `cache`, which ties them together.
"""

from sparsex_jax.cache.cache import Forgotten, PageCache
from sparsex_jax.cache.counts import CacheStats
from sparsex_jax.cache.entries import Entry, Origin
from sparsex_jax.cache.match import Match
from sparsex_jax.cache.pins import PinState
from sparsex_jax.cache.segments import Segment, run_of_slots

__all__ = ["CacheStats", "Entry", "Forgotten", "Match", "Origin", "PageCache", "PinState", "Segment", "run_of_slots"]
