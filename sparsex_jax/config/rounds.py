"""What a request asks for that belongs to a round: `Round`."""

from __future__ import annotations

import dataclasses

from sparsex_jax.config.checks import is_int, require

MAX_ROUND_ID = 512  # characters
MAX_WAIT_MS = 60_000
WAIT_MS = 1000


@dataclasses.dataclass(frozen=True)
class Round:
    """Prompts that come at about the same time and have much in common, such as those of agents who hear each other.

    They are held until all are there or the time of one of them is over. Then they are looked up together and prefilled
    in as few plans as fit. What a member gets is what it would get alone at that moment.

    Attributes:
      id: names the round in its namespace, until its last member has ended. The next round has another one.
      size: how many members it has, at most `EngineConfig.max_num_seqs`; the answers to one prompt are one member.
      wait_ms: for how many milliseconds this member waits for the others at most.
    """

    id: str
    size: int
    wait_ms: int = WAIT_MS

    def __post_init__(self) -> None:
        """Raises InvalidRequestError: a field is out of its limits."""
        is_name = isinstance(self.id, str) and 0 < len(self.id) <= MAX_ROUND_ID
        require(is_name, f"round.id={self.id!r:.60} must be a string of 1 to {MAX_ROUND_ID} characters")
        require(is_int(self.size) and self.size >= 1, f"round.size={self.size!r:.60} must be an integer >= 1")
        is_time = is_int(self.wait_ms) and 0 <= self.wait_ms <= MAX_WAIT_MS
        require(is_time, f"round.wait_ms={self.wait_ms!r:.60} must be an integer from 0 to {MAX_WAIT_MS}")
