"""What the tiers below the store have, and what moved between them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class TierCounts:
    """What moved, in bytes, and what prompts got, in tokens.

    Attributes:
      spilled_bytes, loaded_bytes: from the device to host memory, and back.
      read_bytes: from the disk.
      host_tokens, disk_tokens: tokens that prompts got from blocks that were in host memory, or on disk only.
      overtaken: pieces of blocks that were to be loaded, and were computed because they were late.
      evictions: blocks that host memory lost.
      refused: blocks that host memory did not take, since what it has returns sooner.
      lost: blocks that were to be read from the disk and were not there, or not whole.
    """

    spilled_bytes: int = 0
    loaded_bytes: int = 0
    read_bytes: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    overtaken: int = 0
    evictions: int = 0
    refused: int = 0
    lost: int = 0


@dataclasses.dataclass(frozen=True)
class TierStats:
    """How full the tiers are, in bytes and blocks, and the `TierCounts`."""

    host_bytes: int
    host_limit: int
    host_blocks: int
    disk_bytes: int
    disk_limit: int
    disk_blocks: int
    moving_blocks: int
    counts: TierCounts
