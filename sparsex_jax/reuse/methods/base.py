"""What a method is: its options, and a schedule for each prompt. See the package's docstring."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool

from sparsex_jax.cache import Segment
from sparsex_jax.config import ReuseConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.excerpt import Probe, Remembered
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase, check_schedule

# Options of the methods that correct what stands around new tokens; more of each computes more.
CORRECTIONS = ("overflow_tokens", "tail_tokens", "second_boundary", "head_tokens")
LEAST_SPARED = 0.25  # of a segment's tokens: with fewer, copying and scoring it is not worth its approximation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ReuseConfig):
    """A way to reuse KV. Subclasses are frozen dataclasses whose fields are their options.

    `uses_prefix` and `uses_segments` say what is looked up; `schedule` says what is computed of a prompt then.

    Attributes:
      repairs: whether some of what is pasted is computed anew.
      more_is_careful: options of which a larger value computes more.
    """

    repairs: ClassVar[bool] = True
    more_is_careful: ClassVar[tuple[str, ...]] = ("min_segment_tokens",)

    def accepts(self, made_by: object, num_layers: int) -> bool:
        """Whether approximate KV that a request of the method `made_by` left is as good as this method would make it.

        Then a prompt that begins with the same tokens has it as a prefix. By default that is so for the same method,
        if its options in `more_is_careful` are at least this one's and all others are equal. A method that uses no
        segments makes exact KV, and accepts nothing else.
        """
        if not self.uses_segments or not isinstance(made_by, Method) or type(made_by) is not type(self):
            return False
        mine, theirs = (vars(one.resolved(num_layers)) for one in (self, made_by))
        return all(
            theirs[name] >= mine[name] if name in self.more_is_careful else theirs[name] == mine[name]
            for name in mine
            if name != "only_if_faster"
        )

    def resolved(self, num_layers: int) -> Method:
        """The same with the values that None stands for in a model of this many layers."""
        return self

    def fitted(self, windows: Sequence[int | None]) -> Method:
        """The same for a model whose layers have these windows, None for none.

        A method that scores in one layer does so, unless it is told where, in one that sees all keys: the others look
        at what is near, whatever is asked.
        """
        return self

    @abc.abstractmethod
    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        """The phases for a prompt, by what was found of it. See `check_schedule` for what they must fulfil."""

    def probe(self, prompt: PromptMap, remembered: Remembered, num_layers: int) -> Probe | None:
        """What to find out before this prompt is prefilled, if it is to be answered from an excerpt. None: nothing.

        Args:
          prompt: with all segments that were found.
          remembered: of its tokens.
        """
        return None

    def phases(self, prompt: PromptMap, num_layers: int) -> tuple[Phase, ...]:
        """The schedule, checked.

        Raises:
          InvalidRequestError: an option is wrong for this model, or the schedule is not sound.
        """
        phases = tuple(self.schedule(prompt, num_layers))
        check_schedule(self.method, phases, prompt, num_layers)
        return phases

    def lay_out(self, prompt: PromptMap, num_layers: int) -> tuple[PromptMap, tuple[Phase, ...]]:
        """The prompt with those of its segments that are worth pasting, and its schedule then.

        Of a segment that is, the schedule may spare a quarter of the tokens or more.

        Of the others nearly every token is forced in every layer, so that pasting them would save nothing: their tokens
        are fresh. Fresh tokens make overflow of a segment that stands next to them, so that is asked again until all
        that are left are worth it, at most once for each segment.

        Raises:
          InvalidRequestError: as `phases`.
        """
        phases = self.phases(prompt, num_layers)
        while len(worth := _sparing(prompt, phases, num_layers)) < len(prompt.segments):
            prompt = prompt.only(worth)
            phases = self.phases(prompt, num_layers)
        return prompt, phases


def _sparing(prompt: PromptMap, phases: Sequence[Phase], num_layers: int) -> list[Segment]:
    """The segments of which at least `LEAST_SPARED` is not forced in the last phase that has layers."""
    *_, last = [phase for phase in phases if phase.start < num_layers]
    spared = prompt.reused & ~last.forced
    return [s for s in prompt.segments if np.count_nonzero(spared[s.start : s.end]) >= LEAST_SPARED * s.length]


def nearest_that_sees_all(layer: int, windows: Sequence[int | None]) -> int | None:
    """The nearest layer without a window, of two the deeper one. None where no layer differs from the others."""
    whole = [number for number, window in enumerate(windows) if window is None]
    if len(whole) in (0, len(windows)):
        return None
    return min(whole, key=lambda number: (abs(number - layer), -number))


def method_of(reuse: Any) -> Method:
    """What a caller gave as `reuse`, known to be a method. Raises InvalidRequestError if it is anything else."""
    if not isinstance(reuse, Method):
        raise InvalidRequestError(f"reuse={reuse!r} must be a ReuseConfig")
    return reuse


def check_boundaries(num_layers: int, **boundaries: int | None) -> None:
    """Check options that are layers, in the order in which they are reached. None is left out.

    Raises:
      InvalidRequestError: one lies beyond the model's layers, or is not larger than the one before it. Boundaries at
        `num_layers` are never reached, so they may be equal.
    """
    before: tuple[str, int] | None = None
    for name, layer in boundaries.items():
        if layer is None:
            continue
        if layer > num_layers:
            raise InvalidRequestError(f"{name}={layer} must be at most {num_layers}, the model's layers")
        if before and layer <= before[1] and layer < num_layers:
            raise InvalidRequestError(f"{name}={layer} must be larger than {before[0]}={before[1]}")
        before = name, layer


def budget(prompt: PromptMap, forced: Bool[np.ndarray, "tokens"], ratio: float) -> int:
    """This share of the reused tokens, or all that are not forced if those are fewer."""
    reused, spared = np.count_nonzero(prompt.reused), np.count_nonzero(prompt.reused & ~forced)
    return min(round(ratio * reused), int(spared))
