"""Measuring candidates: a row for each prompt, made when it is needed and kept in a log, so that a run can go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsex_jax.config import ReuseConfig
from sparsex_jax.engine import Engine
from sparsex_jax.eval import quality, scores
from sparsex_jax.eval.calibration.targets import DISAGREEMENT, LOSS
from sparsex_jax.eval.flops import flops_fraction
from sparsex_jax.eval.quality import FULL, Ask, Batch
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.eval.scores import Answer
from sparsex_jax.eval.summaries import Row

_CONFIRMING = 1 << 20  # the number of the first prompt that confirms; a prompt's number is part of its seed


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Which prompts are asked: `samples` for each task and regime, and as many others that confirm a choice.

    Attributes:
      tasks, regimes: names in `tasks.TASKS`, and as `regimes.Regime` parses them.
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
        """Prompts of each regime."""
        return len(self.tasks) * self.samples

    def batches(self, regime: str, batch_size: int, *, confirming: bool = False) -> list[Batch]:
        """All prompts of a regime, in batches of one task; or those that confirm."""
        first = _CONFIRMING if confirming else 0
        found = quality.batches_of(self.tasks, [regime], self.samples, batch_size)
        return [[(task, name, first + index) for task, name, index in batch] for batch in found]


class Trials:
    """What candidates answer to the prompts. Full recompute, which they are compared with, answers each batch once."""

    def __init__(self, engine: Engine, prompts: PromptSet, log: RowLog | None = None) -> None:
        """
        Args:
          engine: as for `quality.run`.
          log: has the rows of earlier runs, and gets those of this one. None: they are kept in memory alone.

        Raises:
          InvalidRequestError: as for `quality.run`.
        """
        quality.check(engine, prompts.tasks, prompts.regimes)
        self.engine, self.prompts = engine, prompts
        self._log = RowLog() if log is None else log
        self._full: dict[tuple[quality.Cell, ...], list[Answer]] = {}

    def batches(self, regime: str, *, confirming: bool = False) -> list[Batch]:
        """As `PromptSet.batches`, in batches that the engine prefills together."""
        return self.prompts.batches(regime, self.engine.config.max_prefill_seqs, confirming=confirming)

    def rows(self, batch: Batch, reuse: ReuseConfig) -> list[Row]:
        """The figures of `scores.UNITS` but for times, with loss and disagreement, for each prompt of a batch."""
        name = reuse.spec()
        if self._log.missing(batch, [name])[0]:
            self._log.add(self._measure(batch, reuse, name))
        return self._log.of(batch, [name])

    def _measure(self, batch: Batch, reuse: ReuseConfig, name: str) -> list[Row]:
        """Preparing the prompts stores donors again that were evicted meanwhile."""
        prompts = self.prompts
        prepared = quality.prepare_batch(self.engine, batch, prompts.num_tokens, prompts.seed, prompts.num_segments)
        asked = quality.asks(self.engine, prepared, reuse)
        references = self._references(batch, prepared)
        answers = references if reuse == FULL else quality.answer(self.engine, asked)
        rows = []
        for cell, ask, answer, full in zip(batch, asked, answers, references, strict=True):
            task, regime, index = cell
            row = {"task": task, "regime": regime, "sample": index, "method": name, "text": answer.text}
            work = flops_fraction(self.engine.model, ask.reuse, answer.report)
            rows.append(row | compare(answer, full, ask.prepared.expected) | {"flops_fraction": work})
        return rows

    def _references(self, batch: Batch, prepared: Sequence[quality.PreparedPrompt]) -> list[Answer]:
        key = tuple(batch)
        if key not in self._full:
            self._full[key] = quality.answer(self.engine, quality.asks(self.engine, prepared, FULL))
        return self._full[key]

    def times(self, regime: str, reuse: ReuseConfig) -> dict[str, float]:
        """The time to the first token of a prompt alone, by the candidate and by full recompute, in seconds."""
        cell, prompts = self.batches(regime)[0][0], self.prompts
        (one,) = quality.prepare_batch(self.engine, [cell], prompts.num_tokens, prompts.seed, prompts.num_segments)
        asked: dict[ReuseConfig, Ask] = {each: quality.asks(self.engine, [one], each)[0] for each in (reuse, FULL)}
        times = quality.time_in_turn(self.engine, asked, 0)
        return {"ttft_s": times[reuse], "full_ttft_s": times[FULL]}


def compare(answer: Answer, full: Answer, expected: Sequence[str]) -> dict[str, float]:
    """The figures of `scores.compare`, with the loss and the disagreement."""
    row = scores.compare(answer, full, expected)
    loss = max(scores.task_score(full.text, expected) - row["score"], 0.0)
    return row | {LOSS: loss, DISAGREEMENT: 1 - row["agreement"]}
