"""SparseX (arXiv 2606.01751), and random tokens in its place as a lower bound."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import OPTIONS, Phase, boundary_layer, budget, method
from sparsex_jax.reuse.prompt import PromptMap


@method("sparsex", uses_segments=True, options=OPTIONS)
def sparsex(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Everything up to the boundary layer, then the active tokens; from a second boundary on the fresh ones.

    DESIGN.md, section 3. `boundary_layer=0` is the paper's pure sparse variant.
    """
    forced = prompt.fresh | prompt.overflow(reuse.overflow_tokens) | prompt.tail(reuse.tail_tokens)
    forced |= prompt.segment_heads(reuse.head_tokens or 0)
    choice = Phase(
        boundary_layer(reuse, num_layers),
        forced,
        ("key_focus" if reuse.focus else "key_mass") + ("_sum" if reuse.sum_layers else ""),
        budget(prompt, forced, reuse.recompute_ratio),
        coverage=reuse.coverage,
        pool_tokens=reuse.pool_tokens or 1,
        per_segment=reuse.per_segment,
    )
    phases = [Phase(0, prompt.computed), choice]
    if reuse.second_boundary is not None:
        phases.append(Phase(reuse.second_boundary, prompt.fresh))
    return phases


@method("random", uses_segments=True, options=["head_tokens", "per_segment"])
def random(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """SparseX with random key tokens: what its budget and its forced tokens are worth without the signal.

    The seed is the prompt: the same prompt has the same tokens chosen, in any batch.
    """
    scores = np.random.default_rng(prompt.tokens).random(len(prompt), np.float32)
    return with_scores(sparsex(prompt, reuse, num_layers), scores)


def with_scores(phases: list[Phase], scores: np.ndarray) -> list[Phase]:
    """The same schedule, choosing by scores that are given `[tokens]`."""
    return [dataclasses.replace(p, signal="given", scores=scores) if p.signal else p for p in phases]
