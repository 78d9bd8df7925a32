"""Where the reused parts of a prompt were when it came: in the device's store, in host memory, on disk or at a peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from sparsex_jax.cache import PageCache, Segment
from sparsex_jax.cache.tree import Node
from sparsex_jax.reuse.planner import RequestPlan

TIERS = ("device", "host", "disk", "peer")  # the slower, the later


def with_tiers(plan: RequestPlan, tail: Segment | None, cache: PageCache, came_from: Mapping[Node, str]) -> RequestPlan:
    """The plan with the tiers that its prefix and its segments came from.

    Args:
      plan: with the pages of its prefix alone.
      tail: the last part of the prefix, which is copied.
      cache: in which all of these are held.
      came_from: the tiers that pages were loaded from. All others were on the device.
    """
    if not came_from:
        return plan

    def tier_of(pages: Iterable[int]) -> str:
        found = (came_from.get(node, TIERS[0]) for node in map(cache.tree.node_of.__getitem__, pages) if node)
        return max(found, key=TIERS.index, default=TIERS[0])

    prompt, size = plan.prompt, cache.page_size
    prefix = tier_of([*plan.pages, *(tail.pages(size) if tail else ())])
    segments = tuple(dataclasses.replace(each, tier=tier_of(each.pages(size))) for each in prompt.segments)
    return dataclasses.replace(plan, prompt=dataclasses.replace(prompt, prefix_tier=prefix, segments=segments))
