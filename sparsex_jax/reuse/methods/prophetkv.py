"""A choice as ProphetKV's (arXiv 2602.02579): a first pass of the new tokens over the pasted KV, then the recompute."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.config.checks import Count, Positive
from sparsex_jax.reuse.methods.choosing import ChoosingMethod
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProphetKV(ChoosingMethod, name="prophetkv"):
    """Compute the fresh tokens and the reused ones that these attend to most on average over all layers.

    The paper's query is the user's question; here it is every fresh token, as in the other methods. Fresh tokens with
    no reused one before them have their KV from the first pass and are not computed again.

    Attributes:
      recompute_ratio: as in all methods that choose. The paper takes 0.2.
      head_tokens, pool_tokens: as in `SparseX`.
    """

    head_tokens: Count = 0
    pool_tokens: Positive = 1

    more_is_careful: ClassVar[tuple[str, ...]] = (*ChoosingMethod.more_is_careful, "head_tokens")

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        if not prompt.reused.any():
            return [Phase(0, prompt.computed)]
        forced = prompt.unsettled | prompt.segment_heads(self.head_tokens)
        choice = self.choice(prompt, 0, forced, "probe_mass", pool_tokens=self.pool_tokens, probe_layers=num_layers)
        return [Phase(0, prompt.computed), choice]
