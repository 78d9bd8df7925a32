"""The methods that choose nothing: full recompute, exact prefix, and reuse without correction."""

from __future__ import annotations

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import Phase, method
from sparsex_jax.reuse.prompt import PromptMap


@method("full", uses_prefix=False)
def full(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Recompute everything."""
    return [Phase(0, prompt.computed)]


@method("prefix")
def prefix(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Recompute all but the exact prefix."""
    return [Phase(0, prompt.computed)]


@method("naive", uses_segments=True)
def naive(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Paste and align all that was found; compute the fresh tokens and nothing else."""
    return [Phase(0, prompt.fresh)]
