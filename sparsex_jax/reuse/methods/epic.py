"""EPIC (arXiv 2410.15332), its linking rule LegoLink."""

from __future__ import annotations

from sparsex_jax.config import ReuseConfig
from sparsex_jax.reuse.methods.base import Phase, method
from sparsex_jax.reuse.prompt import PromptMap

DEFAULT_HEAD_TOKENS = 8


@method("epic", uses_segments=True, options=["head_tokens"])
def epic(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """The fresh tokens and the first few of each segment: a text prefilled alone makes sinks of its first tokens."""
    length = DEFAULT_HEAD_TOKENS if reuse.head_tokens is None else reuse.head_tokens
    return [Phase(0, prompt.fresh | prompt.segment_heads(length))]
