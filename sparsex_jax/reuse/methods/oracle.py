"""The oracle: key tokens chosen by scores that no method can know, as an upper bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.methods.sparsex import SparseX, with_scores
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(SparseX):
    """SparseX with key tokens of the highest given scores, for one prompt.

    `sparsex_jax.eval.oracle.true_deviation` measures the scores. The class is not registered under its name, because a
    request that names a method has no scores; the benches make an instance for each prompt.

    Attributes:
      scores: one for each token of the prompt, not negative; kept as a tuple. None: they are given later, by
        `dataclasses.replace`.
    """

    method: ClassVar[str] = "oracle"

    scores: Sequence[float] | Float32[np.ndarray, "tokens"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores is not None:  # a tuple, so that equal ones are equal and have the same hash
            object.__setattr__(self, "scores", tuple(np.asarray(self.scores, np.float32).tolist()))

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        number = 0 if self.scores is None else len(self.scores)
        if number != len(prompt):
            raise InvalidRequestError(f"method 'oracle' has {number} scores for a prompt of {len(prompt)} tokens")
        return with_scores(super().schedule(prompt, num_layers), np.array(self.scores, np.float32))
