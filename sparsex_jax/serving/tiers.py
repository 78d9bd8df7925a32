"""How full the places are that KV is kept in, and what prompts found there."""

from __future__ import annotations

from typing import Any

from sparsex_jax.engine import Engine
from sparsex_jax.scheduler.tier_stats import TierCounts, TierStats


def tiers_of(engine: Engine) -> list[dict[str, Any]]:
    """The fields of `schemas.Tier` for the device's store, and for host memory and the disk if the engine has them.

    As the last round left them; from any thread.
    """
    stats, below = engine.loop.snapshot, engine.loop.tiers
    counts = below.counts if below else TierCounts()
    loaded = counts.host_tokens + counts.disk_tokens + counts.peer_tokens
    found = stats.prefix_tokens + stats.approximate_prefix_tokens + stats.segment_tokens
    page_bytes = engine.runner.store.nbytes // stats.pages
    device = _tier("device", (stats.pages - stats.free) * page_bytes, stats.pages * page_bytes, max(found - loaded, 0))
    return [device, *(_below(below) if below else ())]


def _below(stats: TierStats) -> list[dict[str, Any]]:
    host = _tier("host", stats.host_bytes, stats.host_limit, stats.counts.host_tokens)
    disk = _tier("disk", stats.disk_bytes, stats.disk_limit, stats.counts.disk_tokens)
    return [host, disk] if stats.disk_limit else [host]


def _tier(name: str, nbytes: int, limit: int, hit_tokens: int) -> dict[str, Any]:
    return {"name": name, "bytes": nbytes, "limit": limit, "hit_tokens": hit_tokens}
