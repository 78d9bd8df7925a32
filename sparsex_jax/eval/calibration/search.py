"""The search for the cheapest candidate that meets the target: in each regime, and in all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval.calibration.candidates import METHODS, find_candidates
from sparsex_jax.eval.calibration.targets import Interval, Target, check_samples, check_score
from sparsex_jax.eval.calibration.trials import PromptSet, Trials
from sparsex_jax.eval.quality import FULL
from sparsex_jax.eval.regimes import Regime
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.eval.summaries import Row
from sparsex_jax.reuse.methods import Prefix

LOSSLESS = Prefix()  # what is used if no candidate meets the target: an exact prefix costs no quality
_MEANS = ("computed_fraction", "flops_fraction", "score", "agreement", "kl")

Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate's rows in one regime.

    Attributes:
      rows: for each prompt that it answered: all of them, or fewer if it was abandoned.
      confirming: for each of the other prompts, if it came so far.
    """

    rows: tuple[Row, ...]
    confirming: tuple[Row, ...] = ()

    def figures(self, metric: str) -> dict[str, Any]:
        """The means of the first prompts, and the metric's interval; and that of the prompts that confirm."""
        means: dict[str, Any] = {name: float(np.mean([row[name] for row in self.rows])) for name in _MEANS}
        sets = {metric: self.rows, "confirmed": self.confirming}
        return means | {name: Interval.of([row[metric] for row in rows]) for name, rows in sets.items() if rows}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A candidate that was measured, by regime, and whether it met the target twice in each of them."""

    reuse: ReuseConfig
    trials: Mapping[str, Trial]
    met: bool

    @property
    def refuted(self) -> bool:
        """Whether it met the target at first, and not with the prompts that confirm."""
        return not self.met and any(trial.confirming for trial in self.trials.values())


@dataclasses.dataclass(frozen=True)
class Selection:
    """The first candidate that meets the target in these regimes, or else `LOSSLESS`, which always does.

    Attributes:
      regimes: names.
      attempts: all that were measured, in their order; the last one met the target, if one did.
    """

    regimes: tuple[str, ...]
    attempts: tuple[Attempt, ...]

    @property
    def met(self) -> bool:
        return self.attempts[-1].met

    @property
    def reuse(self) -> ReuseConfig:
        return self.attempts[-1].reuse if self.met else LOSSLESS

    def basis(self, metric: str) -> Attempt:
        """The selected candidate. If there is none, the one with the smallest shortfall."""

        def shortfall(attempt: Attempt) -> float:
            return float(np.mean([row[metric] for trial in attempt.trials.values() for row in trial.rows]))

        return self.attempts[-1] if self.met else min(self.attempts, key=shortfall)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A calibration's result.

    Attributes:
      used: the selection whose candidate is to be used.
      by_regime: the selection for each regime alone.
      in_company: the selection for engines that make donors in company. None: the same.
      full_scores: full recompute's mean score in each regime.
      times: the first token's time in each regime, by what is used and by full recompute, in seconds.
    """

    target: Target
    used: Selection
    by_regime: Mapping[str, Selection]
    in_company: Selection | None
    full_scores: Mapping[str, float]
    times: Mapping[str, Mapping[str, float]]

    @property
    def holds_for(self) -> list[str]:
        """The regimes in which what is used meets the target. `LOSSLESS` meets it everywhere."""
        return list(self.used.regimes if self.used.met else self.by_regime)


def calibrate(
    engine: Engine,
    prompts: PromptSet,
    target: Target,
    *,
    among: Sequence[str | ReuseConfig] = METHODS,
    use: str | None = None,
    log: RowLog | None = None,
    track: Track = lambda items, what: items,
) -> Calibration:
    """Measure candidates from the cheapest to the most expensive, until one meets the target, for each regime.

    Args:
      engine, log: as for `Trials`.
      among: as for `find_candidates`.
      use: the regime whose selection is used. None: the cheapest candidate that meets the target in all of them; and
        that of the first regime `company`, if it is measured, where donors are made in company.
      track: gets batches and candidates, each with a description, and yields them again. It may show the progress.

    Raises:
      InvalidRequestError: as for `Trials` and `find_candidates`; `use` is none of the regimes; the prompts are too few
        to be confident; or full recompute scores so little that no loss would show.
    """
    check_use(use, prompts.regimes)
    check_samples(target, prompts.total)
    trials = Trials(engine, prompts, log)
    candidates = find_candidates(engine.model, prompts.num_tokens, prompts.num_segments, among)
    full_scores = {regime: _full_score(trials, regime, track) for regime in prompts.regimes}
    check_score(target, min(full_scores.values()))
    search = _Search(trials, target)
    by_regime = {each: search.first(candidates, (each,), track) for each in prompts.regimes}
    use = use or (prompts.regimes[0] if len(by_regime) == 1 else None)
    used = by_regime[use] if use else search.first(candidates, tuple(prompts.regimes), track)
    company = None if use else next((s for name, s in by_regime.items() if Regime.parse(name).kind == "company"), None)
    times = {each: trials.times(each, used.reuse) for each in used.regimes}
    return Calibration(target, used, by_regime, company, full_scores, times)


def check_use(use: str | None, regimes: Sequence[str]) -> None:
    """Raise InvalidRequestError if a selection is asked for that is not made."""
    if use is not None and use not in regimes:
        raise InvalidRequestError(f"use={use!r} is none of the regimes that are measured: {', '.join(regimes)}")


def _full_score(trials: Trials, regime: str, track: Track) -> float:
    batches = track(trials.batches(regime), f"Full recompute, {regime}")
    return float(np.mean([row["score"] for batch in batches for row in trials.rows(batch, FULL)]))


class _Search:
    def __init__(self, trials: Trials, target: Target) -> None:
        self._trials, self._target = trials, target
        # The summed shortfall of all candidates so far in each batch. The batch with the largest sum is asked first,
        # because a candidate that fails mostly fails there and is abandoned early.
        self._spoiled: dict[tuple[Any, ...], float] = {}

    def first(self, candidates: Sequence[ReuseConfig], regimes: tuple[str, ...], track: Track) -> Selection:
        """The first of the candidates that meets the target in all these regimes."""
        attempts: list[Attempt] = []
        for reuse in track(candidates, f"Candidates, {' and '.join(regimes)}"):
            attempts.append(self._attempt(reuse, regimes))
            if attempts[-1].met:
                break
        return Selection(regimes, tuple(attempts))

    def _attempt(self, reuse: ReuseConfig, regimes: Sequence[str]) -> Attempt:
        """Let a candidate answer the prompts of one regime after the other, while it meets the target."""
        trials: dict[str, Trial] = {}
        for regime in regimes:
            trials[regime] = self._try(reuse, regime)
            if not self._meets(trials[regime].confirming):
                return Attempt(reuse, trials, met=False)
        return Attempt(reuse, trials, met=True)

    def _try(self, reuse: ReuseConfig, regime: str) -> Trial:
        rows = self._answer(reuse, regime)
        return Trial(rows, self._answer(reuse, regime, confirming=True) if self._meets(rows) else ())

    def _answer(self, reuse: ReuseConfig, regime: str, *, confirming: bool = False) -> tuple[Row, ...]:
        """A candidate's rows in one batch after the other, as long as it can still meet the target."""
        rows: list[Row] = []
        batches = map(tuple, self._trials.batches(regime, confirming=confirming))
        for batch in sorted(batches, key=lambda batch: -self._spoiled.get(batch, 0.0)):
            new = self._trials.rows(batch, reuse)
            rows += new
            self._spoiled[batch] = self._spoiled.get(batch, 0.0) + sum(self._shortfalls(new))
            if not self._target.in_reach(self._shortfalls(rows), self._trials.prompts.total):
                break
        return tuple(rows)

    def _meets(self, rows: Sequence[Row]) -> bool:
        return len(rows) == self._trials.prompts.total and self._target.met_by(self._shortfalls(rows))

    def _shortfalls(self, rows: Sequence[Row]) -> list[float]:
        return [row[self._target.metric] for row in rows]
