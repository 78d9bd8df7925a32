"""What happened in a store since its engine was made, in numbers that only grow."""

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
    """The counts of `CacheStats`. A cache that replaces one whose KV was lost goes on with the counts of that one."""

    lookups: int = 0
    prefix_tokens: int = 0
    approximate_prefix_tokens: int = 0
    segment_tokens: int = 0
    evictions: int = 0

    def found(self, hits: Hits) -> None:
        """Count a lookup that served a prompt."""
        self.lookups += 1
        self.prefix_tokens += hits.prefix
        self.approximate_prefix_tokens += hits.approximate_prefix
        self.segment_tokens += hits.segment
