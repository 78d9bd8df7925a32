"""ProphetKV-style choice (arXiv 2602.02579): a first pass of the query over the pasted KV, then the recompute."""

from __future__ import annotations

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import Phase, budget, method
from sparsex_jax.reuse.prompt import PromptMap


@method("prophetkv", uses_segments=True, options=["coverage", "focus", "head_tokens", "per_segment", "pool_tokens"])
def prophetkv(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """The fresh tokens and the reused ones that they attend to most on average over all layers, from layer 0 on.

    The published ratio is 0.2. The paper's query is the user's question; ours is every fresh token, as everywhere.
    Those that no reused token stands before are done after the first pass.
    """
    if not prompt.reused.any():
        return [Phase(0, prompt.computed)]
    forced = prompt.unsettled | prompt.segment_heads(reuse.head_tokens or 0)
    choice = Phase(
        0,
        forced,
        "probe_focus" if reuse.focus else "probe_mass",
        budget(prompt, forced, reuse.recompute_ratio),
        coverage=reuse.coverage,
        pool_tokens=reuse.pool_tokens or 1,
        per_segment=reuse.per_segment,
        probe_layers=num_layers,
    )
    return [Phase(0, prompt.computed), choice]
