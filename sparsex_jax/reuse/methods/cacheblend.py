"""CacheBlend (arXiv 2405.16444): recompute the tokens whose KV the new context changes most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.config.checks import Count
from sparsex_jax.reuse.methods.base import check_boundaries
from sparsex_jax.reuse.methods.choosing import ChoosingMethod
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

# The paper narrows gradually (section 4.3: r1 slightly above r, r2 slightly below r1, and so on) and states no numbers.
# These are multiples of `recompute_ratio` at the boundary and at the two layers behind it.
NARROWING = (1.2, 1.1, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBlend(ChoosingMethod, name="cacheblend"):
    """Compute everything up to the boundary layer, then the fresh tokens and the reused ones of largest KV deviation.

    Each token attends causally by its true position, unlike in the published code, which masks the chosen tokens as if
    they were the last ones of the prompt.

    Attributes:
      boundary_layer: the first layer at which KV is compared. An aligned copy is exact at layer 0, so layer 1 is the
        first where it can deviate; LMCache compares there too.
      recompute_ratio, coverage, max_ratio: as in all methods that choose, of the tokens that are computed in the end.
    """

    boundary_layer: Count = 1

    more_is_careful: ClassVar[tuple[str, ...]] = (*ChoosingMethod.more_is_careful, "boundary_layer")

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        check_boundaries(num_layers, boundary_layer=self.boundary_layer)
        phases = [Phase(0, prompt.computed)]
        for layer, factor in enumerate(NARROWING, start=self.boundary_layer):
            phases.append(self._wider(factor).choice(prompt, min(layer, num_layers), prompt.fresh, "kv_deviation"))
        return phases

    def _wider(self, factor: float) -> CacheBlend:
        """The same with ratios that are larger by a factor. Each of the layers covers so much of what the one before it
        left that `coverage` is about what all of them leave."""
        least, most = (min(factor * ratio, 1.0) for ratio in (self.recompute_ratio, self.max_ratio))
        coverage = self.coverage ** (1 / len(NARROWING))
        return dataclasses.replace(self, recompute_ratio=least, coverage=coverage, max_ratio=most)
