"""Focus: whole pieces of what is reused, those that some head of the new tokens looks at firmly. This project's own."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Bool

from sparsex_jax.config.checks import Count, Limit, Positive, is_int
from sparsex_jax.reuse.methods.base import CORRECTIONS, check_boundaries
from sparsex_jax.reuse.methods.choosing import ChoosingMethod
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

SINKS = 4  # tokens
_SIGNALS = {1: "probe_mass", 2: "probe_square", 4: "probe_focus"}
Power = Annotated[int, Limit(lambda value: is_int(value) and value in _SIGNALS, "1, 2 or 4")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focus(ChoosingMethod, name="focus"):
    """Compute the fresh tokens, those next to them and the pieces of segments that the fresh tokens focus on.

    A first pass of the fresh tokens over the pasted KV, as ProphetKV's, sums the fourth powers of their attention over
    heads and layers. Most of the plain sum comes from many heads' glances at what is near and at the beginnings of
    segments. Of the fourth powers, what remains is what some head looks up: it has nearly all of its attention there.

    A token is computed with all of its piece, since what a layer corrects of it lies with its neighbours too. Attention
    sinks of donors that were prefilled alone are always computed. Fresh tokens with no reused one before them have
    their KV from the first pass and are not computed again.

    Attributes:
      power: of the attention that is summed: 1, 2 or 4. With a `coverage`, take 2.
      second_boundary: from this layer on, only fresh tokens are computed. None: the others too, to the end.
      pool_tokens: length of a piece; the default is about a paragraph.
      overflow_tokens, tail_tokens, head_tokens: as in `SparseX`.
    """

    power: Power = 4
    overflow_tokens: Count = 16
    tail_tokens: Count = 64
    second_boundary: Positive | None = None
    head_tokens: Count = 0
    pool_tokens: Positive = 128

    more_is_careful: ClassVar[tuple[str, ...]] = (*ChoosingMethod.more_is_careful, *CORRECTIONS)

    def values(self, num_layers: int) -> dict[str, Any]:
        second = num_layers if self.second_boundary is None else self.second_boundary
        return super().values(num_layers) | {"second_boundary": second}

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        check_boundaries(num_layers, second_boundary=self.second_boundary)
        if not prompt.reused.any():
            return [Phase(0, prompt.computed)]
        forced = self.forced(prompt)
        signal = _SIGNALS[self.power]
        choice = self.choice(prompt, 0, forced, signal, pool_tokens=self.pool_tokens, probe_layers=num_layers)
        phases = [Phase(0, prompt.computed), choice]
        if self.second_boundary is not None:
            phases.append(Phase(self.second_boundary, prompt.unsettled))
        return phases

    def forced(self, prompt: PromptMap) -> Bool[np.ndarray, "tokens"]:
        """The tokens that are computed whatever the first pass says."""
        near = prompt.overflow(self.overflow_tokens) | prompt.tail(self.tail_tokens)
        first = prompt.sinks(SINKS) | prompt.segment_heads(self.head_tokens)
        return prompt.unsettled | near | first
