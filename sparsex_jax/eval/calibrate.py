"""Calibration: finds the cheapest reuse that keeps a stated quality, on the user's own model and a few prompts.

The candidates are SparseX with different boundary layers, recompute ratios and second boundaries. They are measured
from the cheapest to the most expensive, until one meets the target. A candidate is abandoned as soon as it can no
longer meet the target, since only the cheapest one is wanted. So the figures of abandoned candidates come from few
prompts, and from hard ones.

How quality is measured. The default is the *loss*: how much less an answer scores than full recompute's answer to the
same prompt, and 0 where it scores as much or more, so that a lucky answer does not make up for a spoiled one. Its mean
may be at most 0.02. A loss is what users notice, and harmless rewording costs nothing. The alternative is the
*disagreement*, 1 - `scores.agreement`, for which a greedy continuation that differs in one word counts as different
from there on. It needs no tasks that the model can do.

What few prompts can show. The mean has to meet the target, and the 95 % interval is reported with it: with 16 answers
of which none is spoiled, the loss may still be 0.19. With `confident`, the whole interval has to meet the target, and
0.02 takes 189 prompts. The first good candidate of several is selected, so its mean looks slightly better than it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.config import ReuseConfig, architecture
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import quality, results, scores, summaries
from sparsex_jax.eval.quality import Batch
from sparsex_jax.eval.scores import Answer
from sparsex_jax.eval.summaries import Row
from sparsex_jax.reuse.methods import Full, SparseX
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.report import make_report

LOSS, DISAGREEMENT = "loss", "disagreement"
MAX_LOSS = 0.02
FULL = Full()
_MEANS = ("computed_fraction", "score", "agreement", "kl")
_MIN_SCORE = 0.25  # if full recompute scores less, there are hardly any right answers that reuse could spoil
_BOUNDARIES, _RATIOS, _SECOND = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3), (0.05, 0.15, 0.3), (None, 2 / 3)


@dataclasses.dataclass(frozen=True)
class Target:
    """The quality that a candidate must have.

    Attributes:
      metric: `loss` or `disagreement`, each a share from 0 to 1 for every prompt.
      most: what its mean over the prompts may be at most.
      confident: whether the upper end of its 95 % interval may be at most that too.
    """

    metric: str = LOSS
    most: float = MAX_LOSS
    confident: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.most < 1:
            raise InvalidRequestError(f"{self.metric}={self.most} must be at least 0 and less than 1")

    def met_by(self, shortfalls: Sequence[float]) -> bool:
        """Whether a candidate with these losses or disagreements meets the target."""
        interval = Interval.of(shortfalls)
        return (interval.high if self.confident else interval.mean) <= self.most + 1e-9

    def in_reach(self, shortfalls: Sequence[float], total: int) -> bool:
        """Whether `total` prompts meet the target, if those that were not measured yet have no shortfall."""
        return self.met_by([*shortfalls, *[0.0] * (total - len(shortfalls))])


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of a share over prompts, with its 95 % interval (`summaries.wilson_interval`)."""

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, shares: Sequence[float]) -> Interval:
        """The interval of the mean of these shares."""
        values = np.asarray(shares, np.float64)
        return cls(float(values.mean()), *summaries.wilson_interval(values), len(values))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate and its figures over the prompts it answered: all of them, or fewer if it was abandoned.

    Attributes:
      reuse: the candidate.
      shortfalls: the target's metric for each prompt.
      computed_fraction, score, agreement, kl: means, in the units of `scores.UNITS`.
      ttft_s: time to the first token of one prompt alone, in seconds. None if the candidate was abandoned.
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
class Selection:
    """What to use: the cheapest candidate that meets the target, or else full recompute, which always does.

    Attributes:
      reuse: the reuse to use.
      met: whether a candidate meets the target.
      basis: the measured candidate. If none meets the target, the one that comes nearest.
    """

    reuse: ReuseConfig
    met: bool
    basis: Measured


def select(measured: Sequence[Measured], target: Target) -> Selection:
    """Select the cheapest candidate that meets the target, and of two as cheap the better one; or full recompute."""
    good = [each for each in measured if target.met_by(each.shortfalls)]
    if good:
        best = min(good, key=lambda each: (each.computed_fraction, Interval.of(each.shortfalls).mean))
        return Selection(best.reuse, True, best)
    nearest = min(measured, key=lambda each: (Interval.of(each.shortfalls).mean, each.computed_fraction))
    return Selection(FULL, False, nearest)


# Candidates -------------------------------------------------------------------------------------------------


def candidates(num_layers: int, num_tokens: int, base: SparseX = SparseX()) -> list[SparseX]:  # noqa: B008
    """All combinations of boundary layer, recompute ratio and second boundary. Those that compute least come first.

    Args:
      num_layers: of the model.
      num_tokens: reused tokens in a prompt.
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
    """The share of token-layers computed of `num_tokens` reused tokens with `around` fresh ones on each side."""
    kind = np.full(num_tokens + 2 * around, TokenKind.REUSED, np.uint8)
    kind[:around] = kind[-around:] = TokenKind.FRESH
    segment = Segment(around, num_tokens, 0, np.arange(num_tokens), exact=True)
    prompt = PromptMap(np.zeros(len(kind), np.int32), kind, (segment,))
    phases = reuse.phases(prompt, num_layers)
    return make_report(prompt, phases, num_layers, 0.0).computed_fraction


# Measuring --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Which prompts are asked: `samples` for each task and regime.

    Attributes:
      tasks, regimes: names in `tasks.TASKS` and `regimes.REGIMES`.
      num_tokens: tokens of reusable body in each prompt, about.
      num_segments: segments of that body.
    """

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
    """A calibration's result: the selection, every measured candidate in order, and full recompute's mean score."""

    target: Target
    selection: Selection
    measured: tuple[Measured, ...]
    full_score: float


Track = Callable[[Sequence[Any], str], Iterable[Any]]


def calibrate(
    engine: Engine,
    prompts: PromptSet,
    target: Target = Target(),
    *,
    base: SparseX = SparseX(),  # noqa: B008
    track: Track = lambda items, what: items,
) -> Calibration:
    """Measure candidates from the cheapest to the most expensive, until one meets the target.

    Args:
      engine: as for `quality.run`.
      base: gives the fields that are not varied.
      track: gets the batches and then the candidates, each with a description, and yields them again. It may show the
        progress.

    Raises:
      InvalidRequestError: as for `quality.run`; or the prompts are too few to be confident; or full recompute scores so
        little that no loss would show.
    """
    quality.check(engine, prompts.tasks, prompts.regimes)
    check_samples(target, prompts.total)
    batches = quality.batches_of(prompts.tasks, prompts.regimes, prompts.samples, engine.config.max_prefill_seqs)
    full = [answer_batch(engine, prompts, batch, FULL) for batch in track(batches, "Full recompute")]
    full_score = mean_score(full)
    check_score(target, full_score)
    found: list[Measured] = []
    spoiled = [0.0] * len(batches)
    for reuse in track(candidates(engine.model.num_layers, prompts.num_tokens, base), "Candidates"):
        found.append(measure(engine, prompts, batches, full, reuse, target, spoiled))
        if target.met_by(found[-1].shortfalls):
            break
    return Calibration(target, select(found, target), tuple(found), full_score)


def check_samples(target: Target, total: int) -> None:
    """Raise InvalidRequestError if not even perfect answers to `total` prompts would meet the target."""
    if not target.in_reach([], total):
        needed = f"at least {samples_needed(target.most)}" if target.most else "more than any number of"
        raise InvalidRequestError(
            f"samples: {total} prompts cannot show with confidence that {target.metric} is at most {target.most}; "
            f"it takes {needed} prompts"
        )


def samples_needed(most: float) -> int:
    """How many perfect answers show with confidence that a mean is at most `most`.

    The Wilson interval of 0 of n ends at z^2 / (n + z^2).

    >>> samples_needed(0.02)
    189
    """
    return math.ceil(summaries.Z95**2 * (1 - most) / most)


def check_score(target: Target, full_score: float) -> None:
    """Raise InvalidRequestError if full recompute scores so little that no loss would show."""
    if target.metric == LOSS and full_score < _MIN_SCORE:
        raise InvalidRequestError(
            f"tasks: full recompute itself scores only {full_score:.2f}, so a loss would not show; take tasks that the "
            "model can do, shorter prompts, or an agreement as the target"
        )


AnsweredBatch = Sequence[tuple[quality.PreparedPrompt, Answer]]


def answer_batch(engine: Engine, prompts: PromptSet, batch: Batch, reuse: ReuseConfig) -> AnsweredBatch:
    """A batch's prompts with a method's answers. Preparing them stores donors again that were evicted meanwhile."""
    prepared = quality.prepare_batch(engine, batch, prompts.num_tokens, prompts.seed, prompts.num_segments)
    return list(zip(prepared, quality.answer(engine, quality.asks(engine, prepared, reuse)), strict=True))


def mean_score(answered: Sequence[AnsweredBatch]) -> float:
    """The mean task score of all answers."""
    pairs = itertools.chain.from_iterable(answered)
    return float(np.mean([scores.task_score(answer.text, prepared.expected) for prepared, answer in pairs]))


def measure(
    engine: Engine,
    prompts: PromptSet,
    batches: Sequence[Batch],
    full: Sequence[AnsweredBatch],
    reuse: SparseX,
    target: Target,
    spoiled: list[float],
) -> Measured:
    """Let a candidate answer one batch after the other, as long as it can still meet the target.

    Args:
      full: full recompute's answers to the batches.
      spoiled: the summed shortfall of all earlier candidates in each batch; this candidate's is added. The batch with
        the largest sum is asked first, because a candidate that fails mostly fails there and is abandoned early.
    """
    rows: list[Row] = []
    for i in sorted(range(len(batches)), key=lambda i: -spoiled[i]):
        answered = answer_batch(engine, prompts, batches[i], reuse)
        new = compare(answered, full[i])
        rows, spoiled[i] = [*rows, *new], spoiled[i] + sum(row[target.metric] for row in new)
        if not target.in_reach([row[target.metric] for row in rows], prompts.total):
            break
    means = {name: float(np.mean([row[name] for row in rows])) for name in _MEANS}
    ttft = quality.time_prefill(engine, answered[0][0], reuse) if len(rows) == prompts.total else None
    return Measured(reuse, tuple(row[target.metric] for row in rows), ttft_s=ttft, **means)


def compare(answered: AnsweredBatch, reference: AnsweredBatch) -> list[Row]:
    """The figures of `scores.UNITS` for each prompt, with its loss and disagreement."""
    rows = []
    for (prepared, answer), (_, full) in zip(answered, reference, strict=True):
        row = scores.compare(answer, full, prepared.expected)
        loss = max(scores.task_score(full.text, prepared.expected) - row["score"], 0.0)
        rows.append(row | {LOSS: loss, DISAGREEMENT: 1 - row["agreement"]})
    return rows


# The file ---------------------------------------------------------------------------------------------------


def file_content(engine: Engine, model: str, prompts: PromptSet, found: Calibration) -> dict[str, Any]:
    """The content of the file: the method and options to use, the model, and how they were found."""
    target, selection = found.target, found.selection
    measured = {
        "target": dataclasses.asdict(target),
        "met": selection.met,
        "full_score": found.full_score,
        "basis": selection.basis.reuse.to_dict() if not selection.met else None,
        **selection.basis.to_dict(target.metric),
        "prompts": dataclasses.asdict(prompts) | {"dtype": engine.config.dtype},
    }
    about = {"model": model, "architecture": architecture(engine.model)}
    return about | selection.reuse.to_dict() | {"measured": measured} | results.provenance()


def table(found: Calibration) -> str:
    """Every measured candidate, as a Markdown table."""
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
    """The result in one or two sentences."""
    target, selection = found.target, found.selection
    shortfall = Interval.of(selection.basis.shortfalls)
    figures = f"{target.metric} {shortfall.mean:.3f} (95 %: {shortfall.low:.3f} to {shortfall.high:.3f}, "
    figures += f"{shortfall.samples} prompts) at {selection.basis.computed_fraction:.0%} of the work"
    if selection.met:
        return f"The cheapest that meets {target.metric} <= {target.most}: {named(selection.reuse)}, {figures}."
    return (
        f"No candidate meets {target.metric} <= {target.most}, so the file says method=full: everything is recomputed. "
        f"The nearest: {named(selection.basis.reuse)}, {figures}."
    )


def named(reuse: ReuseConfig) -> str:
    """The method and the options that differ from the defaults.

    >>> named(SparseX(boundary_layer=5))
    'sparsex, boundary_layer=5'
    """
    values = [(field.name, getattr(reuse, field.name), field.default) for field in dataclasses.fields(reuse)]
    changed = [f"{name}={value}" for name, value, default in values if value != default]
    return ", ".join([reuse.method, *changed])
