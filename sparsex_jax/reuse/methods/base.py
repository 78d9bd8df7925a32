"""What a method is: phases, schedules and the registry. See the package's docstring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32

from sparsex_jax.config import ReuseConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.prompt import PromptMap

# Fields of ReuseConfig that only some methods read. A method names its own; setting another one is an error.
OPTIONS = ("coverage", "focus", "head_tokens", "per_segment", "pool_tokens", "sum_layers")


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """Layers from `start` on, up to the next phase, compute these tokens.

    Attributes:
      start: first layer.
      forced: tokens computed whatever the signal says; all fresh ones are among them that are not done yet.
      signal: a name in `sparsex_jax.device.signals.SIGNALS`, or None.
      budget: how many more tokens of the former phase the signal chooses at most, but for finishing a block.
      coverage: stop choosing once the tokens computed have this share of the reused tokens' score. None: never.
      pool_tokens: candidates are chosen in blocks of so many tokens of a segment, by their mean score, and whole.
      per_segment: each segment has a share of the budget, by its candidates, and is covered by itself.
      scores: what the signal `given` reads, one for each prompt token, not negative.
      probe_layers: how many layers the signal itself runs the fresh tokens through.
    """

    start: int
    forced: Bool[np.ndarray, "tokens"]
    signal: str | None = None
    budget: int = 0
    coverage: float | None = None
    pool_tokens: int = 1
    per_segment: bool = False
    scores: Float32[np.ndarray, "tokens"] | None = None
    probe_layers: int = 0

    @property
    def size(self) -> int:
        """How many tokens the phase computes at most, but for finishing a block."""
        return int(self.forced.sum()) + self.budget

    def can_leave_out(self, size: int) -> bool:
        """Whether it may compute fewer than `size` tokens."""
        return self.size < size or (self.coverage is not None and self.budget > 0)


Schedule = Callable[[PromptMap, ReuseConfig, int], list[Phase]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How to reuse: what to look up, and the schedule for what was found.

    Attributes:
      options: those of `OPTIONS` that the schedule reads.
    """

    name: str
    uses_prefix: bool
    uses_segments: bool
    schedule: Schedule
    options: tuple[str, ...] = ()

    def phases(self, prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> tuple[Phase, ...]:
        """The schedule, checked.

        Raises:
          InvalidRequestError: an option is set that the method does not read, or a boundary lies beyond the
            model's layers or before an earlier one.
        """
        self._check_options(reuse)
        phases = self.schedule(prompt, reuse, num_layers)
        starts = [phase.start for phase in phases]
        if starts[0] != 0 or starts != sorted(starts) or starts[-1] > num_layers:
            raise InvalidRequestError(
                f"method {self.name!r} has phases at layers {starts}; they must rise from 0 to at most {num_layers}, "
                "the model's layers"
            )
        return tuple(phases)

    def _check_options(self, reuse: ReuseConfig) -> None:
        for field in dataclasses.fields(reuse):
            value = getattr(reuse, field.name)
            if field.name in OPTIONS and field.name not in self.options and value != field.default:
                raise InvalidRequestError(
                    f"{field.name}={value!r} has no meaning for method {self.name!r}; it must be {field.default!r} "
                    f"(options of this method: {', '.join(self.options) or 'none'})"
                )


METHODS: dict[str, Method] = {}


def method(
    name: str, *, uses_prefix: bool = True, uses_segments: bool = False, options: Sequence[str] = ()
) -> Callable[[Schedule], Schedule]:
    """Register a schedule under a name that `ReuseConfig.method` can take."""

    def register(schedule: Schedule) -> Schedule:
        METHODS[name] = Method(name, uses_prefix, uses_segments, schedule, tuple(options))
        return schedule

    return register


def find_method(name: str) -> Method:
    """Raises InvalidRequestError for a name that no method has; the message lists those there are."""
    if name not in METHODS:
        raise InvalidRequestError(f"method={name!r} is unknown; there are: {', '.join(METHODS)}")
    return METHODS[name]


def boundary_layer(reuse: ReuseConfig, num_layers: int, default: int | None = None) -> int:
    """`l*`: as configured, or the method's default, or a sixth of the layers (DESIGN.md, section 3: 15 to 20 % for
    small dense models).

    Raises:
      InvalidRequestError: it lies beyond the model's layers.
    """
    if reuse.boundary_layer is not None:
        boundary = reuse.boundary_layer
    else:
        boundary = round(num_layers / 6) if default is None else min(default, num_layers)
    if boundary > num_layers:
        raise InvalidRequestError(f"boundary_layer={boundary} must be at most {num_layers}, the model's layers")
    return boundary


def budget(prompt: PromptMap, forced: Bool[np.ndarray, "tokens"], ratio: float) -> int:
    """This share of the reused tokens, as far as there are so many that are not forced."""
    return min(round(ratio * prompt.reused.sum()), int((prompt.reused & ~forced).sum()))
