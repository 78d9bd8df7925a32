"""A choice as QCFuse's (arXiv 2606.05875): what the new tokens attend to in one profiled layer, then the recompute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from sparsex_jax.config.checks import Count, Positive, Share, require
from sparsex_jax.reuse.methods.base import nearest_that_sees_all
from sparsex_jax.reuse.methods.choosing import ChoosingMethod
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

# Of the layers; QCFuse's profiles put the first critical layer at 14 of 32 (Llama 3.1 8B), 15 of 32 (Mistral 7B), 20 of
# 36 (Qwen3 8B) and 24 of 40 (Qwen3 14B).
CRITICAL = 0.54


@dataclasses.dataclass(frozen=True, kw_only=True)
class QCFuse(ChoosingMethod, name="qcfuse"):
    """Compute, from layer 0 on, the fresh tokens and the reused ones that these attend to most in one layer.

    A first pass of the fresh tokens over the pasted KV ends in that layer. The paper's pass sees anchors only, 15 %
    of each segment; here it sees all that is pasted. Its query is the user's question; here it is every fresh token.

    Attributes:
      probe_layer: the layer, counted from 0, in which attention is looked at. None: a little behind the middle;
        where only some layers have windows, the nearest without one.
      recompute_ratio: as in all methods that choose. The paper's runs take 0.5.
      head_tokens, pool_tokens: as in `SparseX`.
    """

    probe_layer: Count | None = None
    recompute_ratio: Share = 0.5
    head_tokens: Count = 0
    pool_tokens: Positive = 1

    more_is_careful: ClassVar[tuple[str, ...]] = (*ChoosingMethod.more_is_careful, "head_tokens")

    def values(self, num_layers: int) -> dict[str, Any]:
        return super().values(num_layers) | {"probe_layer": self._critical(num_layers)}

    def _critical(self, num_layers: int) -> int:
        return int(CRITICAL * num_layers) if self.probe_layer is None else self.probe_layer

    def fitted(self, windows: Sequence[int | None]) -> QCFuse:
        if self.probe_layer is not None:
            return self
        return dataclasses.replace(self, probe_layer=nearest_that_sees_all(self._critical(len(windows)), windows))

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        layer = self._critical(num_layers)
        require(layer < num_layers, f"probe_layer={layer} must be at most {num_layers - 1}, the model's last layer")
        if not prompt.reused.any():
            return [Phase(0, prompt.computed)]
        forced = prompt.fresh | prompt.segment_heads(self.head_tokens)
        choice = self.choice(prompt, 0, forced, "probe_last", pool_tokens=self.pool_tokens, probe_layers=layer + 1)
        return [Phase(0, prompt.computed), choice]
