"""CacheBlend (arXiv 2405.16444): recompute the tokens whose KV the new context changes most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.config.checks import Count, Share
from sparsex_jax.reuse.methods.base import Method, budget, check_boundaries
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

# The paper narrows gradually (section 4.3: r1 slightly above r, r2 slightly below r1, and so on) and states no numbers.
# These are multiples of `recompute_ratio` at the boundary and at the two layers behind it.
NARROWING = (1.2, 1.1, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBlend(Method, name="cacheblend"):
    """Compute everything up to the boundary layer, then the fresh tokens and the reused ones of largest KV deviation.

    Each token attends causally by its true position, unlike in the published code, which masks the chosen tokens as if
    they were the last ones of the prompt.

    Attributes:
      boundary_layer: the first layer at which KV is compared. An aligned copy is exact at layer 0, so layer 1 is the
        first where it can deviate; LMCache compares there too.
      recompute_ratio: how many reused tokens are computed in the end, as a share of all reused ones.
    """

    boundary_layer: Count = 1
    recompute_ratio: Share = 0.15

    more_is_careful: ClassVar[tuple[str, ...]] = (*Method.more_is_careful, "boundary_layer", "recompute_ratio")

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        check_boundaries(num_layers, boundary_layer=self.boundary_layer)
        phases = [Phase(0, prompt.computed)]
        for layer, factor in enumerate(NARROWING, start=self.boundary_layer):
            chosen = budget(prompt, prompt.fresh, min(factor * self.recompute_ratio, 1.0))
            phases.append(Phase(min(layer, num_layers), prompt.fresh, "kv_deviation", chosen))
        return phases
