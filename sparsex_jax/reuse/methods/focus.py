"""Focus: whole pieces of what is reused, those that some head of the new tokens looks at firmly. Ours."""

from __future__ import annotations

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import Phase, budget, method
from sparsex_jax.reuse.prompt import PromptMap

PIECE = 128  # tokens; about as long as a paragraph
SINKS = 4  # tokens


@method("focus", uses_segments=True, options=["coverage", "head_tokens", "per_segment", "pool_tokens"])
def focus(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """The fresh tokens and, from layer 0 on, the pieces of segments that they focus on, besides SparseX's overflow.

    A first pass of the fresh tokens over the pasted KV, as ProphetKV's, sums the fourth powers of their attention over
    heads and layers. Key mass is mostly of many heads' glances, at what is near and at how segments begin; in a fourth
    power what remains is what some head looks up. And a token is recomputed with all of its piece, since what a layer
    corrects of it lies with its neighbours too. Attention sinks of donors that were prefilled alone are recomputed
    wherever they are. Fresh tokens that no reused one stands before are done after the first pass.
    """
    if not prompt.reused.any():
        return [Phase(0, prompt.computed)]
    forced = prompt.unsettled | prompt.overflow(reuse.overflow_tokens) | prompt.tail(reuse.tail_tokens)
    forced |= prompt.sinks(SINKS) | prompt.segment_heads(reuse.head_tokens or 0)
    choice = Phase(
        0,
        forced,
        "probe_focus",
        budget(prompt, forced, reuse.recompute_ratio),
        coverage=reuse.coverage,
        pool_tokens=reuse.pool_tokens or PIECE,
        per_segment=reuse.per_segment,
        probe_layers=num_layers,
    )
    phases = [Phase(0, prompt.computed), choice]
    if reuse.second_boundary is not None:
        phases.append(Phase(reuse.second_boundary, prompt.unsettled))
    return phases
