"""SparseX (arXiv 2606.01751): everything up to a boundary layer, then the tokens that the new ones look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32

from sparsex_jax.config.checks import Count, Positive
from sparsex_jax.reuse.methods.base import CORRECTIONS, check_boundaries, nearest_that_sees_all
from sparsex_jax.reuse.methods.choosing import ChoosingMethod
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseX(ChoosingMethod, name="sparsex"):
    """Compute everything up to the boundary layer, from there on the active tokens.

    Active are the fresh tokens, the reused ones next to them (overflow), the tail of a prompt that ends in reused ones,
    and the key tokens: the reused ones that get most attention from all fresh ones at the boundary (Sparse-Q).

    Attributes:
      boundary_layer: `l*`. None is a sixth of the layers; the paper takes 15 to 20 % of them for small dense models.
        Where only some layers have windows, the nearest without one.
        At 0, layer 0 scores and all layers are sparse, the paper's pure sparse variant. The number of layers is full
        recompute.
      overflow_tokens: reused tokens on both sides of every run of fresh ones; on each side at most an eighth of their
        segment.
      tail_tokens: last tokens of the final segment, where the prompt ends in one.
      second_boundary: from this layer on, only fresh tokens are computed. None: the active ones, to the end.
      head_tokens: first tokens of each segment.
      pool_tokens: key tokens are chosen in blocks of this many, counted from a segment's first token, by their mean
        score. The last block is finished, which may exceed `recompute_ratio`.
    """

    boundary_layer: Count | None = None
    overflow_tokens: Count = 16
    tail_tokens: Count = 64
    second_boundary: Count | None = None
    head_tokens: Count = 0
    pool_tokens: Positive = 1

    more_is_careful: ClassVar[tuple[str, ...]] = (*ChoosingMethod.more_is_careful, "boundary_layer", *CORRECTIONS)

    def values(self, num_layers: int) -> dict[str, Any]:
        second = num_layers if self.second_boundary is None else self.second_boundary
        own = {"boundary_layer": self._boundary(num_layers), "second_boundary": second}
        return super().values(num_layers) | own

    def fitted(self, windows: Sequence[int | None]) -> SparseX:
        if self.boundary_layer is not None:
            return self
        return dataclasses.replace(self, boundary_layer=nearest_that_sees_all(self._boundary(len(windows)), windows))

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        boundary = self._boundary(num_layers)
        check_boundaries(num_layers, boundary_layer=boundary, second_boundary=self.second_boundary)
        forced = self.forced(prompt)
        choice = self.choice(prompt, boundary, forced, "key_mass", pool_tokens=self.pool_tokens)
        phases = [Phase(0, prompt.computed), choice]
        if self.second_boundary is not None:
            phases.append(Phase(self.second_boundary, prompt.fresh))
        return phases

    def _boundary(self, num_layers: int) -> int:
        return round(num_layers / 6) if self.boundary_layer is None else self.boundary_layer

    def forced(self, prompt: PromptMap) -> Bool[np.ndarray, "tokens"]:
        """The active tokens that are known without a score."""
        near = prompt.overflow(self.overflow_tokens) | prompt.tail(self.tail_tokens)
        return prompt.fresh | near | prompt.segment_heads(self.head_tokens)


def with_scores(phases: list[Phase], scores: Float32[np.ndarray, "tokens"]) -> list[Phase]:
    """The same schedule, but signals choose by these scores."""
    return [dataclasses.replace(p, signal="given", scores=scores) if p.signal else p for p in phases]
