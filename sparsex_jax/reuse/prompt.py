"""What is known of a prompt's tokens before the model runs: prefix, reused or fresh."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from sparsex_jax.cache import Match, Segment


class Kind(enum.IntEnum):
    """What a prompt token is (DESIGN.md, section 2)."""

    PREFIX = 0  # its KV is exact and in the store
    REUSED = 1  # its KV is copied from a donor and aligned
    FRESH = 2  # it must be computed


@dataclasses.dataclass(frozen=True, eq=False)
class PromptMap:
    """A prompt, token by token, and where its reused parts come from.

    Attributes:
      tokens: token ids.
      kind: a `Kind` for each token. The last token is always fresh.
      segments: the reused runs, in order. The last one may cover the prompt's last token, which is
        computed all the same.
    """

    tokens: Int32[np.ndarray, "tokens"]
    kind: UInt8[np.ndarray, "tokens"]
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, tokens: Int32[np.ndarray, "tokens"], match: Match) -> PromptMap:
        kind = np.full(len(tokens), Kind.FRESH, np.uint8)
        kind[: match.num_prefix_tokens] = Kind.PREFIX
        for segment in match.segments:
            kind[segment.start : segment.end] = Kind.REUSED
        kind[-1] = Kind.FRESH
        return cls(tokens, kind, tuple(match.segments))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fresh(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == Kind.FRESH

    @property
    def reused(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == Kind.REUSED

    @property
    def computed(self) -> Bool[np.ndarray, "tokens"]:
        """All that is not in the prefix."""
        return self.kind != Kind.PREFIX

    @property
    def exact_frontier(self) -> int:
        """How many tokens from the start have exact KV if no reused token is recomputed in every layer."""
        return int(self.reused.argmax()) if self.reused.any() else len(self)

    @property
    def unsettled(self) -> Bool[np.ndarray, "tokens"]:
        """Fresh tokens behind a reused one, which a second pass may change; those before see exact KV alone."""
        return self.fresh & (np.arange(len(self)) >= self.exact_frontier)

    def overflow(self, width: int) -> Bool[np.ndarray, "tokens"]:
        """Reused tokens within `width` of a fresh one, on either side."""
        near = np.zeros(len(self), bool)
        for start, end in intervals(self.fresh):
            near[max(start - width, 0) : end + width] = True
        return near & self.reused

    def tail(self, length: int) -> Bool[np.ndarray, "tokens"]:
        """The last `length` tokens of the final segment if the prompt ends in it, else none."""
        last = np.zeros(len(self), bool)
        if self.segments and self.segments[-1].end == len(self):
            last[max(len(self) - length, self.segments[-1].start) :] = True
        return last & self.reused

    def blocks(self, length: int) -> Int64[np.ndarray, "tokens"]:
        """Number of each token's block: blocks of `length` tokens, and each segment begins with one."""
        starts = np.zeros(len(self), bool)
        starts[::length] = True
        for segment in self.segments:
            starts[segment.start : segment.end] = False
            starts[segment.start : segment.end : length] = True
        return np.cumsum(starts)

    def sinks(self, length: int) -> Bool[np.ndarray, "tokens"]:
        """Reused tokens that were among the first `length` of their donor's prompt, where attention goes that has
        nothing to look for (StreamingLLM, arXiv 2309.17453). In the middle of another prompt they draw it too."""
        first = np.zeros(len(self), bool)
        for segment in self.segments:
            first[segment.start : segment.start + max(length - segment.donor_start, 0)] = True
        return first & self.reused

    def segment_heads(self, length: int) -> Bool[np.ndarray, "tokens"]:
        """The first `length` tokens of each segment."""
        heads = np.zeros(len(self), bool)
        for segment in self.segments:
            heads[segment.start : min(segment.start + length, segment.end)] = True
        return heads & self.reused


def intervals(mask: Bool[np.ndarray, "tokens"]) -> list[tuple[int, int]]:
    """Maximal runs of True, as (start, end).

    >>> intervals(np.array([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
