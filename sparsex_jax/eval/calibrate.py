"""Calibration: the cheapest reuse that keeps a stated quality, on the user's own model and a few prompts.

Candidates are SparseX with other boundary layers, budgets and second boundaries. They are measured from cheap to
dear until one meets the target, and each is given up as soon as it no longer can: only the cheapest is wanted. So
the figures of those that were given up come from few prompts, and from hard ones.

What quality is. By default the *loss*: what an answer scores less than full recompute's answer to the same prompt,
nothing where it scores as much or more, so that a lucky answer does not pay for a spoiled one; on average at most
0.02. It is what users feel, and harmless rewording costs nothing, while a greedy continuation that differs in one
word counts as different from there on. The other measure, the *disagreement* (1 less `metrics.agreement`), needs
no tasks that the model can do, and serves where it can do none.

What few prompts can tell. A target is met by the mean, and the 95 % interval stands beside it: none of 16 answers
spoiled still allows a loss of 0.19. `confident` asks for the whole interval, for which 0.02 takes 189 prompts.
As the first of several candidates that looks good is taken, its mean is a little flattered.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig, architecture
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import metrics, quality, results
from sparsex_jax.eval.metrics import Answer
from sparsex_jax.eval.quality import Batch, Row
from sparsex_jax.reuse.methods import Full, SparseX
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.report import make_report

LOSS, DISAGREEMENT = "loss", "disagreement"
MAX_LOSS = 0.02
FULL = Full()
_MEANS = ("computed_fraction", "score", "agreement", "kl")
_LEAST_SCORE = 0.25  # of full recompute: below it there is hardly an answer that reuse could spoil
_BOUNDARIES, _RATIOS, _SECOND = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3), (0.05, 0.15, 0.3), (None, 2 / 3)


@dataclasses.dataclass(frozen=True)
class Target:
    """The quality wanted: a shortfall, by its name, that may be at most so large.

    Attributes:
      metric: `loss` or `disagreement`, each a share from 0 to 1 for every prompt.
      most: its mean over the prompts may be at most this.
      confident: the upper end of its interval as well.
    """

    metric: str = LOSS
    most: float = MAX_LOSS
    confident: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.most < 1:
            raise InvalidRequestError(f"{self.metric}={self.most} must be at least 0 and less than 1")

    def met_by(self, shortfalls: Sequence[float]) -> bool:
        """Whether prompts with these shortfalls meet it."""
        interval = Interval.of(shortfalls)
        return (interval.high if self.confident else interval.mean) <= self.most + 1e-9

    def in_reach(self, shortfalls: Sequence[float], total: int) -> bool:
        """Whether so many prompts can still meet it, if those missing are perfect."""
        return self.met_by([*shortfalls, *[0.0] * (total - len(shortfalls))])


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean of shares over prompts with its 95 % interval (`quality.wilson_interval`)."""

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, shares: Sequence[float]) -> Interval:
        values = np.asarray(shares, np.float64)
        return cls(float(values.mean()), *quality.wilson_interval(values), len(values))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate and what it did, over the prompts it was asked: fewer than all if it was given up.

    Attributes:
      shortfalls: the target's metric for each prompt.
      computed_fraction, score, agreement, kl: means, in the units of `metrics.UNITS`.
      ttft_s: of one prompt alone; None if the candidate was given up.
    """

    reuse: SparseX
    shortfalls: tuple[float, ...]
    computed_fraction: float
    score: float
    agreement: float
    kl: float
    ttft_s: float | None = None

    def to_dict(self, metric: str) -> dict[str, Any]:
        """The figures, ready for JSON."""
        figures = dataclasses.asdict(self) | {metric: dataclasses.asdict(Interval.of(self.shortfalls))}
        del figures["reuse"], figures["shortfalls"]
        return figures


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to use: a candidate that meets the target, or full recompute, which always does.

    Attributes:
      basis: the measured candidate; where none meets the target, the one that comes nearest.
    """

    reuse: ReuseConfig
    met: bool
    basis: Measured


def choose(measured: Sequence[Measured], target: Target) -> Choice:
    """The cheapest candidate that meets the target; of two as cheap the better. If none does, full recompute."""
    good = [each for each in measured if target.met_by(each.shortfalls)]
    if good:
        best = min(good, key=lambda each: (each.computed_fraction, Interval.of(each.shortfalls).mean))
        return Choice(best.reuse, True, best)
    nearest = min(measured, key=lambda each: (Interval.of(each.shortfalls).mean, each.computed_fraction))
    return Choice(FULL, False, nearest)


# Candidates -------------------------------------------------------------------------------------------------


def candidates(num_layers: int, num_tokens: int, base: SparseX = SparseX()) -> list[SparseX]:  # noqa: B008
    """All combinations of boundary, budget and second boundary, those that compute least first.

    Args:
      num_tokens: reused ones in a prompt.
      base: gives the other fields.
    """
    boundaries = sorted({round(part * num_layers) for part in _BOUNDARIES})
    seconds = [None if part is None else round(part * num_layers) for part in _SECOND]
    found = [
        dataclasses.replace(base, boundary_layer=boundary, recompute_ratio=ratio, second_boundary=second)
        for boundary, ratio, second in itertools.product(boundaries, _RATIOS, seconds)
        if second is None or second > boundary
    ]
    return sorted(found, key=lambda reuse: predicted_fraction(reuse, num_layers, num_tokens))


def predicted_fraction(reuse: SparseX, num_layers: int, num_tokens: int, around: int = 64) -> float:
    """Share of the token-layers that is computed of so many reused tokens with fresh ones before and behind."""
    kind = np.full(num_tokens + 2 * around, TokenKind.REUSED, np.uint8)
    kind[:around] = kind[-around:] = TokenKind.FRESH
    prompt = PromptMap(np.zeros(len(kind), np.int32), kind)
    phases = reuse.phases(prompt, num_layers)
    return make_report(prompt, phases, num_layers, prompt.computed, 0.0).computed_fraction


# Measuring --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked: `samples` prompts for each task and regime, each with about `num_tokens` of reusable body."""

    tasks: Sequence[str]
    regimes: Sequence[str]
    num_tokens: int
    num_segments: int
    samples: int
    seed: int = 0

    @property
    def total(self) -> int:
        return len(self.tasks) * len(self.regimes) * self.samples


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A run: the choice, all that were measured in order, and the mean score of full recompute."""

    target: Target
    choice: Choice
    measured: tuple[Measured, ...]
    full_score: float


Track = Callable[[Sequence[Any], str], Iterable[Any]]


def calibrate(
    engine: Engine,
    prompts: Prompts,
    target: Target = Target(),
    *,
    base: SparseX = SparseX(),  # noqa: B008
    track: Track = lambda items, what: items,
) -> Calibration:
    """Measure candidates from cheap to dear until one meets the target.

    Args:
      engine: as for `quality.run`.
      base: gives the fields that are not varied.
      track: passes batches and then candidates on, and may show how far it is and with what.

    Raises:
      InvalidRequestError: as `quality.run`; too few prompts to be confident; or the model hardly answers the tasks,
        so that there is no loss to see.
    """
    quality.check(engine, prompts.tasks, prompts.regimes)
    check_samples(target, prompts.total)
    batches = quality.batches_of(prompts.tasks, prompts.regimes, prompts.samples, engine.config.max_batch)
    full = [ask(engine, prompts, batch, FULL) for batch in track(batches, "Full recompute")]
    full_score = mean_score(full)
    check_score(target, full_score)
    found: list[Measured] = []
    spoiled = [0.0] * len(batches)
    for reuse in track(candidates(engine.model.num_layers, prompts.num_tokens, base), "Candidates"):
        found.append(measure(engine, prompts, batches, full, reuse, target, spoiled))
        if target.met_by(found[-1].shortfalls):
            break
    return Calibration(target, choose(found, target), tuple(found), full_score)


def check_samples(target: Target, total: int) -> None:
    """Raise InvalidRequestError if not even perfect answers to so many prompts could meet the target."""
    if not target.in_reach([], total):
        needed = f"at least {samples_needed(target.most)}" if target.most else "more than any number of"
        raise InvalidRequestError(
            f"samples: {total} prompts cannot show with confidence that {target.metric} is at most {target.most}; "
            f"it takes {needed} prompts"
        )


def samples_needed(most: float) -> int:
    """Prompts from which a mean can be at most this with confidence: 0 of n has an interval up to z^2 / (n + z^2).

    >>> samples_needed(0.02)
    189
    """
    return math.ceil(quality.Z95**2 * (1 - most) / most)


def check_score(target: Target, full_score: float) -> None:
    if target.metric == LOSS and full_score < _LEAST_SCORE:
        raise InvalidRequestError(
            f"tasks: full recompute itself scores only {full_score:.2f}, so a loss would not show; take tasks that the "
            "model can do, shorter prompts, or an agreement as the target"
        )


Asked = Sequence[tuple[quality.Asked, Answer]]


def ask(engine: Engine, prompts: Prompts, batch: Batch, reuse: ReuseConfig) -> Asked:
    """A batch's prompts and what a method answers. Donors are stored again if they were evicted meanwhile."""
    asked = quality.prepare_batch(engine, batch, prompts.num_tokens, prompts.seed, prompts.num_segments)
    return list(zip(asked, quality.ask(engine, asked, reuse, timed=False), strict=True))


def mean_score(answered: Sequence[Asked]) -> float:
    pairs = itertools.chain.from_iterable(answered)
    return float(np.mean([metrics.task_score(answer.text, asked.expected) for asked, answer in pairs]))


def measure(
    engine: Engine,
    prompts: Prompts,
    batches: Sequence[Batch],
    full: Sequence[Asked],
    reuse: SparseX,
    target: Target,
    spoiled: list[float],
) -> Measured:
    """Ask a candidate batch after batch, as long as it can still meet the target.

    Args:
      spoiled: the shortfall of all candidates so far in each batch, which is added to. The worst batch comes first:
        what fails mostly fails there, and is given up at once.
    """
    rows: list[Row] = []
    for i in sorted(range(len(batches)), key=lambda i: -spoiled[i]):
        answered = ask(engine, prompts, batches[i], reuse)
        new = compare(answered, full[i])
        rows, spoiled[i] = [*rows, *new], spoiled[i] + sum(row[target.metric] for row in new)
        if not target.in_reach([row[target.metric] for row in rows], prompts.total):
            break
    means = {name: float(np.mean([row[name] for row in rows])) for name in _MEANS}
    ttft = quality.time_prefill(engine, answered[0][0], reuse) if len(rows) == prompts.total else None
    return Measured(reuse, tuple(row[target.metric] for row in rows), ttft_s=ttft, **means)


def compare(answered: Asked, reference: Asked) -> list[Row]:
    """The figures of `metrics.UNITS` for each prompt, and both shortfalls."""
    rows = []
    for (asked, answer), (_, full) in zip(answered, reference, strict=True):
        row = metrics.compare(answer, full, asked.expected)
        loss = max(metrics.task_score(full.text, asked.expected) - row["score"], 0.0)
        rows.append(row | {LOSS: loss, DISAGREEMENT: 1 - row["agreement"]})
    return rows


# The file ---------------------------------------------------------------------------------------------------


def document(engine: Engine, model: str, prompts: Prompts, found: Calibration) -> dict[str, Any]:
    """What is written: the method and its options to use, for which model, and how they were found."""
    target, choice = found.target, found.choice
    measured = {
        "target": dataclasses.asdict(target),
        "met": choice.met,
        "full_score": found.full_score,
        "basis": choice.basis.reuse.to_dict() if not choice.met else None,
        **choice.basis.to_dict(target.metric),
        "prompts": dataclasses.asdict(prompts) | {"dtype": engine.config.dtype},
    }
    about = {"model": model, "architecture": architecture(engine.model)}
    return about | choice.reuse.to_dict() | {"measured": measured} | results.provenance()


def table(found: Calibration) -> str:
    """All that were measured, as a Markdown table."""
    metric = found.target.metric
    heading = ["boundary", "ratio", "second", "work", f"{metric} [95 %]", "prompts", "KL", "agreement", "TTFT, s"]
    lines = [heading, ["--:"] * len(heading), *(_line(each) for each in found.measured)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _line(measured: Measured) -> list[str]:
    reuse, interval = measured.reuse, Interval.of(measured.shortfalls)
    second = "-" if reuse.second_boundary is None else str(reuse.second_boundary)
    figures = [f"{measured.kl:.3f}", f"{measured.agreement:.3f}"]
    figures.append("-" if measured.ttft_s is None else f"{measured.ttft_s:.3f}")
    setting = [str(reuse.boundary_layer), f"{reuse.recompute_ratio}", second, f"{measured.computed_fraction:.3f}"]
    return [*setting, results.score(dataclasses.asdict(interval)), str(interval.samples), *figures]


def verdict(found: Calibration) -> str:
    """What was found, in a sentence or two."""
    target, choice = found.target, found.choice
    shortfall = Interval.of(choice.basis.shortfalls)
    figures = f"{target.metric} {shortfall.mean:.3f} (95 %: {shortfall.low:.3f} to {shortfall.high:.3f}, "
    figures += f"{shortfall.samples} prompts) at {choice.basis.computed_fraction:.0%} of the work"
    if choice.met:
        return f"The cheapest that meets {target.metric} <= {target.most}: {named(choice.reuse)}, {figures}."
    return (
        f"No candidate meets {target.metric} <= {target.most}, so the file says method=full: everything is recomputed. "
        f"The nearest: {named(choice.basis.reuse)}, {figures}."
    )


def named(reuse: ReuseConfig) -> str:
    """
    >>> named(SparseX(boundary_layer=5))
    'sparsex, boundary_layer=5'
    """
    values = [(field.name, getattr(reuse, field.name), field.default) for field in dataclasses.fields(reuse)]
    changed = [f"{name}={value}" for name, value, default in values if value != default]
    return ", ".join([reuse.method, *changed])
