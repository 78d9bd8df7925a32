"""An adapter on one sequence: on which of its tokens it acts, and under which keys their KV is found.

KV that was computed under an adapter is of no use to the base model, to another adapter, or to a later version under
the same name. So the cache is asked, and told, *keys* in place of tokens: the token where the model ran as it is, and
the token plus the mark of the adapter's version where that acted. No two versions have the same mark, and marks are
larger than all tokens, so nothing is ever found that was computed otherwise.

With a vocabulary of fewer than 2^7 tokens, version 3 has the mark 3 * 2^7 = 384. It acts from token 2 on:

    tokens    5    6    7    8
    keys      5    6  391  392

All that stands before such a token is found by everybody: this is what makes an activated LoRA cheap (`Acting.start`).

Adapters that share KV ask for that by keys too (`SHARING`). Their group has a mark of its own in place of their
versions': whoever of them writes, all of them find it, and nobody else does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Int32

NEVER = np.iinfo(np.int32).max  # the start of an adapter that acts on no token
NO_SLOT = -1  # of a row on which none acts

# What an adapter's request finds. `isolated`: what its own version computed. `pre_lr`: what all wrote that share
# (PReCache's PreLRShared). `refresh`: the same, of which the request computes anew what it looks at most. `rebase`:
# what the model computed without adapters, of texts that these read (PReCache's ReBaseShared). `base_shared`: what all
# wrote that ask for it, but for the adapter's own part of values, which it computes itself (LRAgent's BaseShared).
SHARING = ("isolated", "pre_lr", "refresh", "rebase", "base_shared")


@dataclasses.dataclass(frozen=True)
class Acting:
    """A version of an adapter on one sequence.

    Attributes:
      name: of the adapter.
      slot: where the devices have its weights.
      number: of the version.
      mark: is added to a token to make its key.
      start: it acts from this position on, to the end of the answer. `NEVER`: on no token, because the prompt has no
        invocation sequence.
      sharing: one of `SHARING`, of which the mark is.
    """

    name: str
    slot: int
    number: int
    mark: int
    start: int = 0
    sharing: str = "isolated"

    @property
    def shares(self) -> bool:
        """Whether it finds what others computed. None of that is exact."""
        return self.sharing != "isolated"

    @property
    def runs_through(self) -> bool:
        """Whether it computes its own part of the values of all that it finds."""
        return self.sharing == "base_shared"

    @property
    def writes(self) -> bool:
        """Whether what it computes is found under its keys."""
        return self.sharing != "rebase"

    def keys(self, tokens: Int32[np.ndarray, "tokens"], first: int = 0) -> Int32[np.ndarray, "tokens"]:
        """The keys of tokens that stand at `first` and behind it."""
        return tokens + np.where(self._acts(np.arange(first, first + len(tokens))), np.int32(self.mark), np.int32(0))

    def slots(self, positions: Int[np.ndarray, "rows"]) -> Int32[np.ndarray, "rows"]:
        """Of rows at these positions, the slot of the adapter that acts on them."""
        return np.where(self._acts(positions), self.slot, NO_SLOT).astype(np.int32)

    def slot_at(self, position: int) -> int:
        """As `slots`, of one row."""
        return self.slot if position >= self.start else NO_SLOT

    def num_tokens(self, length: int) -> int:
        """On how many of the first `length` tokens it acts."""
        return max(length - self.start, 0)

    def of_excerpt(self, keep: Bool[np.ndarray, "tokens"]) -> Acting:
        """The same on those tokens of the prompt that are kept."""
        return self if self.start == NEVER else dataclasses.replace(self, start=int(keep[: self.start].sum()))

    def _acts(self, positions: Int[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
        return positions >= self.start


def last_place(tokens: Int32[np.ndarray, "tokens"], sequence: tuple[int, ...]) -> int:
    """Where a sequence stands in a prompt for the last time: its first token. `NEVER` if it does not.

    >>> last_place(np.int32([7, 8, 1, 7, 8, 2]), (7, 8))
    3
    """
    if not 0 < len(sequence) <= len(tokens):
        return NEVER
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(sequence))
    places = np.flatnonzero((windows == np.asarray(sequence)).all(axis=1))
    return int(places[-1]) if len(places) else NEVER
