"""Excerpts: a prompt without the pieces that its new tokens do not look at.

Cached KV says where to look, and the answer is computed from what was found there. A prompt's remembered documents are
pasted, and its fresh tokens run over them once (`sparsex_jax.device.probe`). The pieces that they focus on are kept, as
many as it takes to hold a share of all focus, and are prefilled with the fresh tokens as a prompt of their own. So no
pasted KV is in the answer, and where the focus is on everything, everything is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from sparsex_jax.reuse.prompt import PromptMap

# Tells the number of the remembered text that each token of a prompt is of, -1 for none. It is asked only where a
# method wants to know.
Remembered = Callable[[], Int64[np.ndarray, "tokens"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """What a probe decides about.

    Attributes:
      piece: the number of each token's piece; -1 where a token is kept whatever the probe says. Int64 `[tokens]`.
      first_layer, end_layer: layers from the first on are looked at, and those from the second on are not run.
      coverage: kept pieces hold at least this share of the focus on all pieces.
      least_tokens: and have at least so many tokens together.
    """

    piece: Int64[np.ndarray, "tokens"]
    first_layer: int
    end_layer: int
    coverage: float
    least_tokens: int

    @property
    def num_pieces(self) -> int:
        return int(self.piece.max()) + 1

    @property
    def num_tokens(self) -> int:
        """How many tokens the pieces have."""
        return int((self.piece >= 0).sum())

    @property
    def last_place(self) -> int:
        """Where the last piece ends: its last token."""
        return int(np.flatnonzero(self.piece >= 0)[-1])

    @property
    def looking(self) -> Bool[np.ndarray, "tokens"]:
        """The tokens whose attention counts, if they are fresh: those behind the last piece, which see all pieces.

        A heading between two pieces sees the earlier ones only, and with many headings in a prompt the first pieces
        would be looked at most, whatever is asked. The first token behind the last piece does not count either, if
        there are others: heads that always look at the token before would find the last piece, whatever is asked.
        """
        return np.arange(len(self.piece)) >= min(self.last_place + 2, len(self.piece) - 1)

    def excerpt(self, focus: Float32[np.ndarray, "tokens"]) -> Excerpt:
        """What is kept, by how much each token was looked at.

        Pieces are kept in the order of their mean focus until both conditions are met; of two alike, the earlier. All
        are kept if they are to hold all of the focus, or if there is none.
        """
        among = self.piece >= 0
        sizes, total = np.bincount(self.piece[among]), np.bincount(self.piece[among], focus[among].astype(np.float64))
        order = np.argsort(-total / sizes, kind="stable")
        covered = np.cumsum(total[order])
        enough = (covered >= self.coverage * covered[-1]) & (np.cumsum(sizes[order]) >= self.least_tokens)
        some = self.coverage < 1 and covered[-1] > 0 and enough.any()
        last = int(enough.argmax()) if some else len(order) - 1
        keep = ~among | np.isin(self.piece, order[: last + 1])
        confidence = float(covered[last] / covered[-1]) if covered[-1] > 0 else 1.0
        return Excerpt(keep, confidence, self.end_layer)


class Excerpt(NamedTuple):
    """What is kept of a prompt.

    Attributes:
      keep: bool `[tokens]`.
      confidence: the share of the focus on pieces that is on those which are kept.
      probe_layers: how many layers were run to find that out.
    """

    keep: Bool[np.ndarray, "tokens"]
    confidence: float
    probe_layers: int


def pieces(prompt: PromptMap, length: int, text: Int64[np.ndarray, "tokens"]) -> Int64[np.ndarray, "tokens"]:
    """The number of each token's piece: what of a text is in one segment is divided evenly into pieces of at most
    `length` tokens. Fresh tokens, and those of no text, are in no piece: -1.

    Args:
      text: the number of each token's text, as `Remembered`.
    """
    text, segment = np.where(prompt.reused, text, -1), np.zeros(len(prompt), int)
    for number, each in enumerate(prompt.segments):
        segment[each.start : each.end] = number
    seams = np.flatnonzero((np.diff(text) != 0) | (np.diff(segment) != 0)) + 1
    piece, count = np.full(len(prompt), -1), 0
    for part in np.split(np.arange(len(prompt)), seams):
        if text[part[0]] >= 0:
            parts = -(-len(part) // length)
            piece[part] = count + np.arange(len(part)) * parts // len(part)
            count += parts
    return piece
