"""What became of a loop's sequences, in numbers."""

from __future__ import annotations

import dataclasses
import time
from collections import deque

from sparsex_jax.reuse.report import KINDS, Report
from sparsex_jax.scheduler.rounds import Begun
from sparsex_jax.scheduler.sequence import Event, Sequence

_OUTCOMES = {"cancelled": "cancelled", "error": "failed"}
_WHILE_IDLE = ("healed_tokens", "remade_tokens", "remade_texts")
_OF_A_PROMPT = ("prompt_tokens", *(f"{kind}_tokens" for kind in KINDS))
_ROUNDS = ("complete_rounds", "cut_short_rounds")
_COUNTED = ("finished", "cancelled", "failed", *_OF_A_PROMPT, "generated_tokens", *_WHILE_IDLE, *_ROUNDS)


@dataclasses.dataclass(frozen=True)
class LoopStats:
    """Where sequences are now, and what became of them since the loop was made.

    Attributes:
      waiting: not admitted yet, or preempted.
      held: those of the waiting that wait for others of their round.
      running: being prefilled or decoded.
      finished, cancelled, failed: what they ended with.
      preempted: how often one was preempted.
      prompt_tokens: tokens of the prompts that were prefilled: the sum of the six kinds that follow, see `Report`.
      generated_tokens: new tokens.
      healed_tokens: tokens that were prefilled exactly while nothing was in line: those that were approximate in the
        store, and those of texts for adapters that share what the model computes without them.
      remade_tokens: tokens that were prefilled then to make remembered texts again.
      remade_texts: how many of these got better KV, or KV that has not seen what was forgotten.
      complete_rounds: rounds that began with all their members.
      cut_short_rounds: rounds that began without some, since another one had waited enough.
      computed_fraction: token-layers that those prompts' prefills computed, as a share of all of theirs.
    """

    waiting: int
    held: int
    running: int
    finished: int
    cancelled: int
    failed: int
    preempted: int
    prompt_tokens: int
    prefix_tokens: int
    approximate_prefix_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    omitted_tokens: int
    generated_tokens: int
    healed_tokens: int
    remade_tokens: int
    remade_texts: int
    complete_rounds: int
    cut_short_rounds: int
    computed_fraction: float


class Counts:
    """Counts as things happen."""

    def __init__(self) -> None:
        self._numbers = dict.fromkeys(_COUNTED, 0)
        self._token_layers = 0.0
        self._ends: deque[float] = deque(maxlen=32)

    def told(self, event: Event) -> None:
        self._numbers["generated_tokens"] += len(event.token_ids)
        if event.report is not None:
            self._prefilled(event.report)
        if event.finish_reason is not None:
            self._numbers[_OUTCOMES.get(event.finish_reason, "finished")] += 1
            self._ends.append(time.perf_counter())

    def _prefilled(self, report: Report) -> None:
        for name in _OF_A_PROMPT:
            self._numbers[name] += getattr(report, name)
        self._token_layers += report.computed_fraction * report.prompt_tokens

    def healed(self, done: Sequence) -> None:
        """Count a chunk that was prefilled while nothing was in line."""
        if done.report is not None:
            self._numbers["healed_tokens" if done.remakes is None else "remade_tokens"] += done.report.fresh_tokens
            self._numbers["remade_texts"] += done.handle is not None

    def began(self, rounds: Begun) -> None:
        for name, number in zip(_ROUNDS, rounds, strict=True):
            self._numbers[name] += number

    def seconds_between_ends(self) -> float | None:
        """Of the last sequences, on average; None if there were not two."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def stats(self, *, waiting: int, held: int, running: int, preempted: int) -> LoopStats:
        prompt_tokens = self._numbers["prompt_tokens"]
        fraction = self._token_layers / prompt_tokens if prompt_tokens else 0.0
        return LoopStats(waiting, held, running, preempted=preempted, **self._numbers, computed_fraction=fraction)
