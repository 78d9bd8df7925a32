"""Random key tokens, as a lower bound for what chooses them by a signal."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsex_jax.reuse.methods.sparsex import SparseX, with_scores
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(SparseX, name="random"):
    """SparseX with random key tokens: what its budget and its forced tokens are worth without the signal.

    The prompt is the seed: the same tokens of the same prompt are chosen, in any batch.
    """

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        scores = np.random.default_rng(prompt.tokens).random(len(prompt), np.float32)
        return with_scores(super().schedule(prompt, num_layers), scores)
