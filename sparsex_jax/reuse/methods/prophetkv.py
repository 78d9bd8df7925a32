"""A choice as ProphetKV's (arXiv 2602.02579): a first pass of the new tokens over the pasted KV, then the recompute."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.config.checks import Count, Positive, Share
from sparsex_jax.reuse.methods.base import Method, budget
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProphetKV(Method, name="prophetkv"):
    """Compute the fresh tokens and the reused ones that these attend to most on average over all layers.

    The paper's query is the user's question; here it is every fresh token, as in the other methods. Fresh tokens with
    no reused one before them have their KV from the first pass and are not computed again.

    Attributes:
      recompute_ratio: how many reused tokens, as a share of all of them. The paper takes 0.2.
      head_tokens, pool_tokens: as in `SparseX`.
    """

    recompute_ratio: Share = 0.15
    head_tokens: Count = 0
    pool_tokens: Positive = 1

    more_is_careful: ClassVar[tuple[str, ...]] = (*Method.more_is_careful, "recompute_ratio", "head_tokens")

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        if not prompt.reused.any():
            return [Phase(0, prompt.computed)]
        forced = prompt.unsettled | prompt.segment_heads(self.head_tokens)
        chosen = budget(prompt, forced, self.recompute_ratio)
        choice = Phase(0, forced, "probe_mass", chosen, self.pool_tokens, probe_layers=num_layers)
        return [Phase(0, prompt.computed), choice]
