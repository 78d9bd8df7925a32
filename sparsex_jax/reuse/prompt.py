"""What the lookup found for each token of a prompt, before the model runs: prefix, reused or fresh."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from sparsex_jax.cache import Match, Segment


class TokenKind(enum.IntEnum):
    """Where a prompt token's KV comes from."""

    PREFIX = 0  # of an exact prefix: its KV is in the store, and right as it is
    REUSED = 1  # of a segment: its KV is copied from a donor and aligned to its new position
    FRESH = 2  # of neither: it is computed


@dataclasses.dataclass(frozen=True, eq=False)
class PromptMap:
    """A prompt, token by token, and where its reused parts come from.

    Attributes:
      tokens: token ids.
      kind: a `TokenKind` for each token. The last token is always fresh, as its logits are wanted.
      segments: the reused runs, in order. The last one may cover the prompt's last token, which is computed all the
        same.
    """

    tokens: Int32[np.ndarray, "tokens"]
    kind: UInt8[np.ndarray, "tokens"]
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, tokens: Int32[np.ndarray, "tokens"], match: Match) -> PromptMap:
        """The map of a prompt by what the lookup found."""
        kind = np.full(len(tokens), TokenKind.FRESH, np.uint8)
        kind[: match.num_prefix_tokens] = TokenKind.PREFIX
        for segment in match.segments:
            kind[segment.start : segment.end] = TokenKind.REUSED
        kind[-1] = TokenKind.FRESH
        return cls(tokens, kind, tuple(match.segments))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fresh(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == TokenKind.FRESH

    @property
    def reused(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == TokenKind.REUSED

    @property
    def computed(self) -> Bool[np.ndarray, "tokens"]:
        """All tokens but the prefix's."""
        return self.kind != TokenKind.PREFIX

    @property
    def exact_frontier(self) -> int:
        """How many tokens have exact KV before the first reused one: all of them, if nothing is reused."""
        return int(self.reused.argmax()) if self.reused.any() else len(self)

    @property
    def unsettled(self) -> Bool[np.ndarray, "tokens"]:
        """Fresh tokens behind a reused one. The others see exact KV only, and a second pass would not change them."""
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
        """Number of each token's block: blocks have `length` tokens, and a new one begins with each segment.

        Reused tokens of one segment only share a block. Segments at 2..6 and 6..8 of 8 tokens, length 3:

            token   0  1  2  3  4  5  6  7
            block   1  1  2  2  2  3  4  4
        """
        starts = np.zeros(len(self), bool)
        starts[::length] = True
        for segment in self.segments:
            starts[segment.start : segment.end] = False
            starts[segment.start : segment.end : length] = True
        return np.cumsum(starts)

    def sinks(self, length: int) -> Bool[np.ndarray, "tokens"]:
        """Reused tokens that were among the first `length` of their donor's prompt.

        Attention that looks for nothing goes to a prompt's first tokens (StreamingLLM, arXiv 2309.17453). Pasted into
        the middle of another prompt, their KV draws it too.
        """
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
