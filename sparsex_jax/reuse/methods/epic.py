"""EPIC (arXiv 2410.15332) with its linking rule LegoLink."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.config.checks import Count
from sparsex_jax.reuse.methods.base import Method
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epic(Method, name="epic"):
    """Compute the fresh tokens and the first few of each segment.

    A text that is prefilled alone makes attention sinks of its first tokens. In the middle of another prompt they would
    draw attention that belongs elsewhere; computed again, they do not.

    Attributes:
      head_tokens: how many tokens of each segment, from its first on.
    """

    head_tokens: Count = 8

    more_is_careful: ClassVar[tuple[str, ...]] = (*Method.more_is_careful, "head_tokens")

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        return [Phase(0, prompt.fresh | prompt.segment_heads(self.head_tokens))]
