"""Reuse methods: a method is a schedule of phases over the layers.

Each phase begins at a layer with a set of tokens that the host forces, and optionally a signal, computed by the
model at that layer, that adds the highest-scored of the others. A phase's tokens are among the former phase's.
The jitted prefill runs any such schedule, so a new method is a function here and nothing else:

    @method("first_half_only", uses_segments=True)
    def first_half_only(prompt, reuse, num_layers):
        return [Phase(0, prompt.computed), Phase(num_layers // 2, prompt.fresh)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from sparsex_jax.config import ReuseConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.prompt import PromptMap


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """Layers from `start` on, up to the next phase, compute these tokens.

    Attributes:
      start: first layer.
      forced: tokens computed whatever the signal says.
      signal: a name in `sparsex_jax.signals.SIGNALS`, or None.
      budget: how many more tokens of the former phase the signal chooses.
    """

    start: int
    forced: Bool[np.ndarray, "tokens"]
    signal: str | None = None
    budget: int = 0

    @property
    def size(self) -> int:
        """How many tokens the phase computes."""
        return int(self.forced.sum()) + self.budget


Schedule = Callable[[PromptMap, ReuseConfig, int], list[Phase]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How to reuse: what to look up, and the schedule for what was found."""

    name: str
    uses_prefix: bool
    uses_segments: bool
    schedule: Schedule

    def phases(self, prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> tuple[Phase, ...]:
        """The schedule, checked.

        Raises:
          InvalidRequestError: a boundary lies beyond the model's layers or before an earlier one.
        """
        phases = self.schedule(prompt, reuse, num_layers)
        starts = [phase.start for phase in phases]
        if starts[0] != 0 or starts != sorted(starts) or starts[-1] > num_layers:
            raise InvalidRequestError(
                f"method {self.name!r} has phases at layers {starts}; they must rise from 0 to at most {num_layers}, "
                "the model's layers"
            )
        return tuple(phases)


METHODS: dict[str, Method] = {}


def method(name: str, *, uses_prefix: bool = True, uses_segments: bool = False) -> Callable[[Schedule], Schedule]:
    """Register a schedule under a name that `ReuseConfig.method` can take."""

    def register(schedule: Schedule) -> Schedule:
        METHODS[name] = Method(name, uses_prefix, uses_segments, schedule)
        return schedule

    return register


def find_method(name: str) -> Method:
    """Raises InvalidRequestError for a name that no method has; the message lists those there are."""
    if name not in METHODS:
        raise InvalidRequestError(f"method={name!r} is unknown; there are: {', '.join(METHODS)}")
    return METHODS[name]


def boundary_layer(reuse: ReuseConfig, num_layers: int) -> int:
    """`l*`: as configured, or a sixth of the layers (DESIGN.md, section 3: 15 to 20 % for small dense models).

    Raises:
      InvalidRequestError: it lies beyond the model's layers.
    """
    boundary = round(num_layers / 6) if reuse.boundary_layer is None else reuse.boundary_layer
    if boundary > num_layers:
        raise InvalidRequestError(f"boundary_layer={boundary} must be at most {num_layers}, the model's layers")
    return boundary


@method("full", uses_prefix=False)
def full(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Recompute everything."""
    return [Phase(0, prompt.computed)]


@method("prefix")
def prefix(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Recompute all but the exact prefix."""
    return [Phase(0, prompt.computed)]


@method("naive", uses_segments=True)
def naive(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Paste and align all that was found; compute the fresh tokens and nothing else."""
    return [Phase(0, prompt.fresh)]


@method("sparsex", uses_segments=True)
def sparsex(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
    """Everything up to the boundary layer, then the active tokens; from a second boundary on the fresh ones.

    DESIGN.md, section 3. `boundary_layer=0` is the paper's pure sparse variant.
    """
    boundary = boundary_layer(reuse, num_layers)
    forced = prompt.fresh | prompt.overflow(reuse.overflow_tokens) | prompt.tail(reuse.tail_tokens)
    budget = min(round(reuse.recompute_ratio * prompt.reused.sum()), int((prompt.reused & ~forced).sum()))
    phases = [Phase(0, prompt.computed), Phase(boundary, forced, "key_mass", budget)]
    if reuse.second_boundary is not None:
        phases.append(Phase(reuse.second_boundary, prompt.fresh))
    return phases
