"""What the tiers below the store have, and what moved between them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class TierCounts:
    """What moved, in bytes, and what prompts got, in tokens.

    Attributes:
      spilled_bytes, loaded_bytes: from the device to host memory, and back.
      read_bytes: from the disk.
      fetched_bytes: from other engines.
      host_tokens, disk_tokens, peer_tokens: tokens that prompts got from blocks that were in host memory, on disk only,
        or at another engine only.
      overtaken: pieces of blocks that were to be loaded, and were computed because they were late.
      evictions: blocks that host memory lost.
      refused: blocks that host memory did not take, since what it has returns sooner.
      lost: blocks that were to be read from the disk and were not there, or not whole.
    """

    spilled_bytes: int = 0
    loaded_bytes: int = 0
    read_bytes: int = 0
    fetched_bytes: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    peer_tokens: int = 0
    overtaken: int = 0
    evictions: int = 0
    refused: int = 0
    lost: int = 0

    def add_tokens(self, origin: str, num_tokens: int) -> None:
        """A prompt got tokens of blocks that were there: `host`, `disk` or `peer`."""
        name = f"{origin}_tokens"
        setattr(self, name, getattr(self, name) + num_tokens)


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
