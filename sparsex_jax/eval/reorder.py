"""The bench's planner that changes the prompt's order and nothing else."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.reuse.methods import Method, Phase
from sparsex_jax.reuse.prompt import PromptMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reorder(Method):
    """As `prefix`, for a prompt whose segments are in the order of an earlier prompt that began alike, if any did.

    What it computes is exact, and where the order is free nothing is lost. The class is not registered under its name,
    because an engine does not know which parts of a prompt may change places. The bench does, and gives it the prompt.
    """

    method: ClassVar[str] = "reorder"
    uses_segments: ClassVar[bool] = False

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        return [Phase(0, prompt.computed)]
