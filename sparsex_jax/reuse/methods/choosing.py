"""What the methods have in common that choose reused tokens by a signal: how many."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool

from sparsex_jax.config.checks import Share, require
from sparsex_jax.reuse.methods.base import Method, budget
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoosingMethod(Method):
    """A method that computes, beside the tokens it forces, the reused ones that a signal scores highest.

    How many can depend on what the signal sees. With a `coverage`, a look at one place costs little, and one that
    wanders over the whole prompt makes the method compute much of it, up to everything.

    Attributes:
      recompute_ratio: how many tokens are chosen at least, as a share of the reused ones.
      coverage: beyond that, until the chosen ones have this share of the scores of all that are not forced. 0: no more.
        1: as many as `max_ratio` allows; nothing has to be scored where that is all.
      max_ratio: how many are chosen at most then, as a share of the reused tokens.
    """

    recompute_ratio: Share = 0.15
    coverage: Share = 0.0
    max_ratio: Share = 1.0

    more_is_careful: ClassVar[tuple[str, ...]] = (*Method.more_is_careful, "recompute_ratio", "coverage", "max_ratio")

    def __post_init__(self) -> None:
        least, most = self.recompute_ratio, self.max_ratio
        require(least <= most, f"max_ratio={most} must be at least recompute_ratio={least}")

    def resolved(self, num_layers: int) -> Method:
        return dataclasses.replace(self, **self.values(num_layers))

    def values(self, num_layers: int) -> dict[str, Any]:
        """Options that stand for other values in a model of this many layers. Without a coverage, `max_ratio` says
        nothing."""
        return {} if self.coverage else {"max_ratio": 1.0}

    def choice(
        self, prompt: PromptMap, start: int, forced: Bool[np.ndarray, "tokens"], signal: str, **fields: Any
    ) -> Phase:
        """The phase in which the signal chooses.

        Args:
          fields: others of the phase.
        """
        least, most = (budget(prompt, forced, ratio) for ratio in (self.recompute_ratio, self.max_ratio))
        least = most if self.coverage == 1 else least
        return Phase(start, forced, signal, least, self.coverage, most, **fields)
