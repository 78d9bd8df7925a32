"""Excerpts: answer from the remembered texts that the new tokens look at, computed exactly. This project's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsex_jax.config.checks import Count, Positive, Share, require
from sparsex_jax.reuse.excerpt import Probe, Remembered, pieces
from sparsex_jax.reuse.methods.base import Method, check_boundaries
from sparsex_jax.reuse.methods.sparsex import SparseX
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

WATCHED = (0.3, 0.7)  # of the layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excerpts(Method, name="excerpt"):
    """Leave out the pieces of remembered texts that the fresh tokens do not look at, and compute the rest exactly.

    KV that was made elsewhere is good enough to see where an answer is, and often not good enough to give it: even
    where the right text is computed again, the stale ones around it draw attention. So a pass of the fresh tokens over
    the pasted KV (the probe) says which pieces those behind the last piece focus on, and the answer comes from a prompt
    that has those pieces and no others, of which every token is computed.

    What is not a remembered text (`Engine.remember`), as a conversation's earlier turns, is never left out, nor is a
    message that is one as a whole, unless a tool gave it. A prompt of which nothing may be left out is prefilled as by
    `SparseX`.

    Attributes:
      coverage: the pieces that are kept hold this share of the focus on all of them. Where the fresh tokens look at
        everything alike, as for counting, that is nearly all pieces, and the answer is full recompute's.
      keep_ratio: keep pieces of at least this share of the tokens that might be left out.
      first_layer, end_layer: the layers from the first up to the second are looked at, and none behind them is run.
        None: from three tenths of the layers up to seven tenths. Others look less at what is asked for.
      piece_tokens: texts are divided evenly into pieces of at most this many tokens.
      boundary_layer: of `SparseX`, for prompts of which nothing may be left out.
    """

    coverage: Share = 0.9
    keep_ratio: Share = 0.05
    first_layer: Count | None = None
    end_layer: Positive | None = None
    piece_tokens: Positive = 512
    boundary_layer: Count | None = None

    def accepts(self, made_by: object, num_layers: int) -> bool:
        """What it leaves approximate, `SparseX` does."""
        made_by = made_by.without_excerpts if isinstance(made_by, Excerpts) else made_by
        return self.without_excerpts.accepts(made_by, num_layers)

    @property
    def without_excerpts(self) -> SparseX:
        """How prompts are prefilled of which nothing may be left out."""
        shared = ("min_segment_tokens", "only_if_faster", "boundary_layer")
        return SparseX(**{name: getattr(self, name) for name in shared})

    def fitted(self, windows: Sequence[int | None]) -> Excerpts:
        return dataclasses.replace(self, boundary_layer=self.without_excerpts.fitted(windows).boundary_layer)

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        self._watched(num_layers)  # checks them
        return self.without_excerpts.schedule(prompt, num_layers)

    def probe(self, prompt: PromptMap, remembered: Remembered, num_layers: int) -> Probe | None:
        piece = pieces(prompt, self.piece_tokens, remembered())
        if piece.max() < 1:
            return None  # a single piece is kept
        keep_ratio = self.keep_ratio if self.coverage < 1 else 1.0
        least = round(keep_ratio * int((piece >= 0).sum()))
        return Probe(piece, *self._watched(num_layers), self.coverage, least)

    def _watched(self, num_layers: int) -> tuple[int, int]:
        """The layers that are looked at: from the first up to the second."""
        few, most = (round(part * num_layers) for part in WATCHED)
        first, end = self.first_layer, self.end_layer
        check_boundaries(num_layers, first_layer=first, end_layer=end)
        limit = f"{num_layers}, the model's layers" if end is None else f"end_layer={end}"
        require(first is None or first < (end or num_layers), f"first_layer={first} must be less than {limit}")
        end = max(most, (few if first is None else first) + 1) if end is None else end
        return min(few, end - 1) if first is None else first, end
