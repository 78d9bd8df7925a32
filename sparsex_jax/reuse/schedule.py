"""A schedule: phases over the layers, each on fewer tokens than the one before, and the check that one is sound."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from sparsex_jax.config.checks import is_int, is_number
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.prompt import PromptMap

_WITHOUT_A_PASS = ("key_mass", "kv_deviation", "given")  # signals of this package that run no layers
_WRITE_FRESH_ONLY = ("probe_mass", "probe_focus", "probe_square", "probe_last", "given")
MAX_BOUNDARIES = 4  # phases after the first; a shape of the compiled prefill, which is the same for all schedules


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """The layers from `start` up to the next phase's start compute these tokens.

    A phase computes the forced tokens and, if it has a signal, those reused tokens of the phase before that the signal
    scores highest.

    Attributes:
      start: the first layer.
      forced: tokens that are computed whatever the signal says.
      signal: a name in `sparsex_jax.device.signals.SIGNALS`, or None.
      budget: how many more tokens of the phase before the signal chooses, at least.
      coverage: beyond the budget it chooses more, until these hold this share of the scores of all that it chooses
        from. 0: no more.
      max_budget: how many more tokens it chooses at most then. None: any number.
      pool_tokens: the signal chooses blocks of this many tokens of a segment, by their mean score. It finishes the last
        block that it begins, which may exceed the budget.
      scores: one for each prompt token, not negative; what the signal `given` scores by.
      probe_layers: how many layers the signal itself runs the fresh tokens through. It is a promise: fresh tokens whose
        KV this pass has written may be left out.
    """

    start: int
    forced: Bool[np.ndarray, "tokens"]
    signal: str | None = None
    budget: int = 0
    coverage: float = 0.0
    max_budget: int | None = None
    pool_tokens: int = 1
    scores: Float32[np.ndarray, "tokens"] | None = None
    probe_layers: int = 0

    @functools.cached_property
    def num_forced(self) -> int:
        """How many tokens it computes whatever the signal says."""
        return int(np.count_nonzero(self.forced))

    @property
    def least(self) -> int:
        """How many tokens the phase computes at least, where there are as many to choose from."""
        return self.num_forced + self.budget

    @property
    def most_chosen(self) -> int:
        """How many tokens the signal chooses at most, apart from those that finish a block."""
        if not self.coverage:
            return self.budget
        return len(self.forced) - self.num_forced if self.max_budget is None else self.max_budget

    @property
    def size(self) -> int:
        """How many tokens the phase computes at most, apart from those that finish a block."""
        return self.num_forced + self.most_chosen

    @property
    def most(self) -> int:
        """How many tokens the phase computes at most."""
        return self.size + (self.pool_tokens - 1 if self.signal is not None and self.most_chosen else 0)

    def can_leave_out(self, size: int) -> bool:
        """Whether it may compute fewer than `size` tokens."""
        return self.least < size


def written_depth(
    phases: Sequence[Phase], computed: Bool[np.ndarray, "phases tokens"], num_layers: int
) -> Int64[np.ndarray, "tokens"]:
    """How many layers of each token, from the first on, have KV that a prefill with mirrors wrote, and not a copy.

    A signal may write K and V of all rows that it scores, at its phase's first layer, which the masks do not say. With
    5 layers, phases from 0, 2 and 4 on, and the signal `key_mass` at 2:

        computed in phase   0 1 2    0 1    0    none
        depth                   5      4    3       0

    Args:
      computed: which tokens each phase computed.
    """
    depth = np.zeros(computed.shape[1], np.int64)
    for number, phase in enumerate(phases):
        if phase.start >= num_layers:
            break
        if number and _writes_reused(phase):
            depth[computed[number - 1]] = np.maximum(depth, phase.start + 1)[computed[number - 1]]
        end = phases[number + 1].start if number + 1 < len(phases) else num_layers
        depth[computed[number]] = np.maximum(depth, min(end, num_layers))[computed[number]]
    return depth


def _writes_reused(phase: Phase) -> bool:
    """Whether its signal may write K and V of reused tokens, in a prefill with mirrors
    (`sparsex_jax.device.signals.WITH_MIRRORS`)."""
    at_layer_0 = phase.signal == "key_mass" and phase.start == 0
    return phase.signal is not None and phase.signal not in _WRITE_FRESH_ONLY and not at_layer_0


def check_schedule(method: str, phases: Sequence[Phase], prompt: PromptMap, num_layers: int) -> None:
    """Refuse a schedule that would give wrong logits, or damage other requests' KV, without any other sign.

    A sound schedule computes the last token in every phase, no token of the prefix (its pages are shared), and each
    fresh token in every layer, be it in a signal's own pass over the fresh tokens. Each phase forces only tokens that
    the phase before forces too: the others may not be there. The first phase starts at layer 0; those after it start at
    layers that rise strictly. Phases at `num_layers` never run, so several may start there.

    Raises:
      InvalidRequestError: the message names the method, the phase and the rule.
    """
    complaint = next(_complaints(phases, prompt, num_layers), None)
    if complaint is not None:
        raise InvalidRequestError(f"method {method!r}: {complaint}")


def _complaints(phases: Sequence[Phase], prompt: PromptMap, num_layers: int) -> Iterator[str]:
    """What is wrong, the most basic first: later ones may take for granted that there were none before."""
    yield from _about_layers([phase.start for phase in phases], num_layers)
    for number, phase in enumerate(phases):
        found = itertools.chain(_about_tokens(phase, prompt), _about_choice(phase, prompt))
        yield from (f"phase {number} {complaint}" for complaint in found)
    if phases[0].signal is not None:
        yield "phase 0 has a signal, but there is no phase before it to choose from"
    for number, (before, phase) in enumerate(itertools.pairwise(phases), start=1):
        if (phase.forced & ~before.forced).any():
            yield f"phase {number} forces tokens that the phase before it does not force"
    yield from _about_shared_fields([phase for phase in phases if phase.signal is not None])
    yield from _about_fresh_tokens(phases, prompt, num_layers)


def _about_layers(starts: list[Any], num_layers: int) -> Iterator[str]:
    if not starts or starts[0] != 0 or not all(map(is_int, starts)):
        yield f"the phases start at layers {starts}; the first must start at 0"
    if len(starts) > 1 + MAX_BOUNDARIES:
        yield f"there are {len(starts)} phases; at most {MAX_BOUNDARIES} may follow the first"
    later = itertools.pairwise(starts[1:])
    rise = all(0 <= a < b or a == b == num_layers for a, b in later)
    if not rise or not 0 <= starts[-1] <= num_layers:
        yield (
            f"the phases start at layers {starts}; those after the first must rise, each to another layer, to at most "
            f"{num_layers}, the model's layers"
        )


def _about_tokens(phase: Phase, prompt: PromptMap) -> Iterator[str]:
    forced = phase.forced
    if not (isinstance(forced, np.ndarray) and forced.dtype == bool and forced.shape == (len(prompt),)):
        yield f"has forced={forced!r}; it must be a bool mask of the prompt's {len(prompt)} tokens"
    if not forced[-1]:
        yield "leaves out the prompt's last token, whose logits are the result"
    if (forced & ~prompt.computed).any():
        yield "forces tokens of the prefix, whose pages other requests share"


def _about_choice(phase: Phase, prompt: PromptMap) -> Iterator[str]:
    for name, least in (("budget", 0), ("pool_tokens", 1)):
        value = getattr(phase, name)
        if not is_int(value) or value < least:
            yield f"has {name}={value!r}; it must be an integer >= {least}"
    for name in ("budget", "coverage"):
        if getattr(phase, name) and phase.signal is None:
            yield f"has {name}={getattr(phase, name)} and no signal to choose by"
    yield from _about_coverage(phase)
    if not is_int(phase.probe_layers) or phase.probe_layers < 0:
        yield f"has probe_layers={phase.probe_layers!r}; it must be an integer >= 0"
    elif phase.probe_layers and (phase.signal is None or phase.signal in _WITHOUT_A_PASS):
        yield f"has probe_layers={phase.probe_layers}, but its signal {phase.signal!r} runs no layers"
    if phase.signal == "given":
        yield from _about_scores(phase.scores, len(prompt))


def _about_coverage(phase: Phase) -> Iterator[str]:
    if not is_number(phase.coverage) or not 0 <= phase.coverage <= 1:
        yield f"has coverage={phase.coverage!r}; it must be a number from 0 to 1"
    most = phase.max_budget
    if most is not None and (not is_int(most) or most < phase.budget):
        yield f"has max_budget={most!r}; it must be None or an integer >= its budget, {phase.budget}"


def _about_scores(scores: np.ndarray | None, length: int) -> Iterator[str]:
    if scores is None:
        yield "has the signal 'given' and no scores"
    elif np.shape(scores) != (length,):
        yield f"has scores of shape {np.shape(scores)} for a prompt of {length} tokens"
    elif not (np.isfinite(scores) & (scores >= 0)).all():
        yield "has scores that are negative or not finite"


def _about_shared_fields(scored: Sequence[Phase]) -> Iterator[str]:
    """The plan has one row of blocks and one of scores for all boundaries of a request."""
    if len({phase.pool_tokens for phase in scored}) > 1:
        yield "phases with a signal have different pool_tokens"
    given = [phase.scores for phase in scored if phase.scores is not None]
    if not all(np.array_equal(scores, given[0]) for scores in given):
        yield "phases have different scores"


def _about_fresh_tokens(phases: Sequence[Phase], prompt: PromptMap, num_layers: int) -> Iterator[str]:
    """A fresh token that is left out has no KV in the layers behind, unless a signal's pass computed it there. A phase
    that leaves nothing out asks no signal, so there is no pass then."""
    for number, phase in enumerate(phases):
        asked = number > 0 and phase.signal is not None and phase.can_leave_out(phases[number - 1].size)
        if asked and phase.start + phase.probe_layers >= num_layers:
            return
        if (prompt.fresh & ~phase.forced).any():
            yield f"phase {number} leaves out fresh tokens, which have no KV in its layers"
