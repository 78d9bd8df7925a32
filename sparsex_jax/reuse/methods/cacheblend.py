"""CacheBlend (arXiv 2405.16444): recompute the tokens whose KV the new context changes most."""

from __future__ import annotations

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import Phase, boundary_layer, budget, method
from sparsex_jax.reuse.prompt import PromptMap

# An aligned copy is exact at layer 0, so layer 1 is the first where KV can deviate. LMCache checks there too.
DEFAULT_BOUNDARY = 1

# The paper narrows gradually (section 4.3: r1 slightly above r, r2 slightly below r1, and so on) and states no
# numbers. We keep these multiples of `recompute_ratio` at the boundary and at the layers behind it.
NARROWING = (1.2, 1.1, 1.0)


@method("cacheblend", uses_segments=True)
def cacheblend(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Everything up to the boundary layer (1 by default), then the reused tokens of largest KV deviation.

    Each row attends causally by its true position, unlike the published code, which masks the scattered rows as
    if they were the last ones.
    """
    boundary = boundary_layer(reuse, num_layers, DEFAULT_BOUNDARY)
    phases = [Phase(0, prompt.computed)]
    for layer, factor in enumerate(NARROWING, start=boundary):
        chosen = budget(prompt, prompt.fresh, min(factor * reuse.recompute_ratio, 1.0))
        phases.append(Phase(min(layer, num_layers), prompt.fresh, "kv_deviation", chosen))
    return phases
