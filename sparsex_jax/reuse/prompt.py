"""What the lookup found for each token of a prompt, before the model runs: in a prefix, reused or fresh."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from sparsex_jax.cache import Match, Segment

# At each of its ends, at most this part of a segment is overflow.
OVERFLOW_PART = 8


class TokenKind(enum.IntEnum):
    """Where a prompt token's KV comes from."""

    PREFIX = 0  # of an exact prefix: its KV is in the store, and right as it is
    REUSED = 1  # of a segment: its KV is copied from a donor and aligned to its new position
    FRESH = 2  # of none of these: it is computed
    APPROXIMATE = 3  # of an approximate prefix: its KV is in the store, as good as the method itself would make it
    OMITTED = 4  # of nothing: it is left out of the excerpt that is answered from


@dataclasses.dataclass(frozen=True, eq=False)
class PromptMap:
    """A prompt, token by token, and where its reused parts come from.

    Attributes:
      tokens: token ids.
      kind: a `TokenKind` for each token. The last token is always fresh, as its logits are wanted.
      segments: the reused runs, in order. The last one may cover the prompt's last token, which is computed all the
        same.
      prefix_tier: where the KV of the prefix was when the prompt came, as `Segment.tier`.
    """

    tokens: Int32[np.ndarray, "tokens"]
    kind: UInt8[np.ndarray, "tokens"]
    segments: tuple[Segment, ...] = ()
    prefix_tier: str = "device"

    @classmethod
    def of(cls, tokens: Int32[np.ndarray, "tokens"], match: Match) -> PromptMap:
        """The map of a prompt by what the lookup found."""
        kind = np.full(len(tokens), TokenKind.FRESH, np.uint8)
        kind[: match.num_prefix_tokens] = TokenKind.APPROXIMATE
        kind[: match.num_exact_tokens] = TokenKind.PREFIX
        for segment in match.segments:
            kind[segment.start : segment.end] = TokenKind.REUSED
        kind[-1] = TokenKind.FRESH
        return cls(tokens, kind, tuple(match.segments))

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def fresh(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == TokenKind.FRESH

    @functools.cached_property
    def reused(self) -> Bool[np.ndarray, "tokens"]:
        return self.kind == TokenKind.REUSED

    @functools.cached_property
    def approximate(self) -> Bool[np.ndarray, "tokens"]:
        """The tokens of the approximate prefix."""
        return self.kind == TokenKind.APPROXIMATE

    @functools.cached_property
    def computed(self) -> Bool[np.ndarray, "tokens"]:
        """All tokens but those of the prefix, exact or approximate."""
        return self.fresh | self.reused

    @property
    def num_prefix(self) -> int:
        """How many tokens the prefix has, exact or approximate."""
        return len(self) - int(np.count_nonzero(self.computed))

    @property
    def first_reused(self) -> int:
        """How many tokens stand before the first reused one: all of them, if nothing is reused."""
        return _first(self.reused)

    @property
    def exact_frontier(self) -> int:
        """How many tokens have exact KV whatever is recomputed: those before the first approximate or reused one."""
        return _first(self.reused | self.approximate)

    @property
    def unsettled(self) -> Bool[np.ndarray, "tokens"]:
        """Fresh tokens behind a reused one. The other fresh tokens see nothing that a pass changes, so that a second
        pass would compute the same of them."""
        return self.fresh & (np.arange(len(self)) >= self.first_reused)

    def only(self, segments: Collection[Segment]) -> PromptMap:
        """The map as if, of its segments, just these had been found: the tokens of the others are fresh."""
        kind = np.where(self.reused, np.uint8(TokenKind.FRESH), self.kind)
        for segment in segments:
            own = slice(segment.start, segment.end)
            kind[own] = self.kind[own]
        return dataclasses.replace(self, kind=kind, segments=tuple(segments))

    def overflow(self, width: int) -> Bool[np.ndarray, "tokens"]:
        """Reused tokens within `width` of a fresh one, on either side; in a segment of fewer than 8 `width` tokens,
        within an eighth of its length.

        With a fixed width, text before and behind a short segment would leave nothing of it to reuse.
        """
        near = np.zeros(len(self), bool)
        for segment, (before, behind) in zip(self.segments, self._fresh_around_segments(), strict=True):
            reach = min(width, segment.length // OVERFLOW_PART)
            near[segment.start : max(min(before + reach + 1, segment.end), 0)] = True
            near[max(behind - reach, segment.start) : segment.end] = True
        return near & self.reused

    def _fresh_around_segments(self) -> list[tuple[int, int]]:
        """The nearest fresh tokens on both sides of each segment's first one; too far away to be near where there are
        none. No reused token of the segment stands behind a fresh one of its own."""
        none = len(self) + 1
        fresh = np.concatenate([[-none], np.flatnonzero(self.fresh), [2 * none]])
        behind = np.searchsorted(fresh, [segment.start for segment in self.segments])
        return list(zip(fresh[behind - 1].tolist(), fresh[behind].tolist(), strict=True))

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


def _first(mask: Bool[np.ndarray, "tokens"]) -> int:
    """Index of the first True, or the length if there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
