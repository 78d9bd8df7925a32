"""Runs what the policy decided on the device: decode dispatches, prefill plans, sampling."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float32

from sparsex_jax.cache import Segment
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.runner import Computed, PrefillRun, ProbeRun, Runner
from sparsex_jax.device.sampling import NON_FINITE, Sampled
from sparsex_jax.device.scoring import Scores
from sparsex_jax.device.state import BatchSlot, allowed_tokens, decode_state, sampling_arrays
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.scheduler.constrained import ConstrainedDecode
from sparsex_jax.scheduler.sequence import Sequence


class _Kept(NamedTuple):
    """A decode state on the device, and what it was made of. Plans are compared by identity: a sequence that was
    admitted again has another one.

    Attributes:
      plans: of each sequence.
      pages: how many pages each has.
      tokens: how many new tokens each sequence has behind it.
    """

    state: DecodeState
    plans: list[RequestPlan]
    pages: list[int]
    tokens: list[int]

    @classmethod
    def behind(cls, state: DecodeState, sequences: list[Sequence], ahead: int) -> _Kept:
        """What holds once `ahead` new tokens have come."""
        plans, pages = [one.plan for one in sequences], [len(one.pages) for one in sequences]
        return cls(state, plans, pages, _tokens(sequences, ahead))

    def is_of(self, sequences: list[Sequence]) -> bool:
        """Whether it is where these sequences are now, but perhaps for pages that they got since."""
        return self.plans == [one.plan for one in sequences] and self.tokens == _tokens(sequences, 0)


class Dispatch(NamedTuple):
    """Tokens on their way.

    Attributes:
      sequences: whose; one batch slot each.
      steps: at most how many for each.
      sampled: where they will be on the device, what brings them, or why the dispatch failed.
      started: `time.perf_counter()` then.
    """

    sequences: list[Sequence]
    steps: int
    sampled: Sampled | ConstrainedDecode | Exception
    started: float


class Prefilled(NamedTuple):
    """What came of a plan.

    Attributes:
      sampled: the token behind each sequence's stage, as NumPy arrays; no tokens if no sequence of the plan wants one.
      computed: of each sequence.
      logits: float32 `[sequences, vocab]`, on the device.
      scores: what the rows of each sequence say of the prompt's tokens. None: no sequence asks for that.
    """

    sampled: Sampled
    computed: list[Computed]
    logits: Array
    scores: list[Scores] | None


class Execution:
    """Computes for sequences, and changes nothing of them but `Sequence.run`.

    Attributes:
      step_seconds: what a token of the last dispatch took.
    """

    def __init__(self, runner: Runner) -> None:
        self.step_seconds = 0.0
        self._runner = runner
        self._kept: _Kept | None = None

    # Decode -------------------------------------------------------------------------------------------------

    def start_decode(self, sequences: list[Sequence], steps: int) -> Dispatch | None:
        """Dispatch at most `steps` tokens for each sequence; None if there is no sequence.

        A dispatch that fails raises its error when it is fetched, as one that fails on the device does.
        """
        started = time.perf_counter()
        if not sequences:
            return None
        try:
            return Dispatch(sequences, steps, self._dispatch(sequences, steps), started)
        except Exception as error:
            return Dispatch(sequences, steps, error, started)

    def _dispatch(self, sequences: list[Sequence], steps: int) -> Sampled | ConstrainedDecode:
        kept, self._kept = self._kept, None
        state, matchers = self._state(sequences, kept), [sequence.output.matcher for sequence in sequences]
        if any(matchers):
            return ConstrainedDecode(self._runner, state, matchers, steps)
        state, sampled = self._runner.start_decode(state, steps)
        self._kept = _Kept.behind(state, sequences, steps)
        return sampled

    def _state(self, sequences: list[Sequence], kept: _Kept | None) -> DecodeState:
        """The state stays on the device from one dispatch to the next. Where sequences got pages meanwhile, the page
        tables alone are made anew; where one came or went, all of it is, of what the host knows."""
        shapes, vocab_size = self._runner.shapes, self._runner.model.vocab_size
        if kept is not None and kept.is_of(sequences):
            grown = kept.pages != [len(one.pages) for one in sequences]
            return self._runner.with_pages(kept.state, [one.pages for one in sequences]) if grown else kept.state
        return decode_state(_slots(sequences), shapes.max_pages, vocab_size, adapters=shapes.adapters)

    def fetch(self, dispatch: Dispatch) -> Sampled:
        """What was sampled, as NumPy arrays, a batch slot for each sequence. Raises why the dispatch failed."""
        try:
            sampled = self._finished(dispatch)
        except Exception:
            self._kept = None  # it came out of the same dispatch
            raise
        self.step_seconds = (time.perf_counter() - dispatch.started) / dispatch.steps
        return sampled

    def _finished(self, dispatch: Dispatch) -> Sampled:
        if isinstance(dispatch.sampled, Exception):
            raise dispatch.sampled
        if isinstance(dispatch.sampled, Sampled):
            return jax.device_get(dispatch.sampled)
        state, sampled = dispatch.sampled.finish()
        steps = sampled.token.shape[1]
        self._kept = _Kept.behind(state, dispatch.sequences, steps)
        return sampled

    def decode_alone(self, sequence: Sequence, steps: int) -> Sampled:
        """A dispatch of one sequence, and its tokens."""
        dispatch = self.start_decode([sequence], steps)
        assert dispatch is not None
        return self.fetch(dispatch)

    # Prefill ------------------------------------------------------------------------------------------------

    def prefill(self, sequences: list[Sequence], layers: int | None = None) -> Prefilled | None:
        """Run the next stage of each sequence in one plan, or the next `layers` of it. None while layers are left.

        What fails on the device raises here: the logits behind chunks are looked at too, and a plan that rests between
        two layers is waited for.
        """
        run = sequences[0].run or self._begin(sequences)
        assert isinstance(run, PrefillRun)
        self._runner.advance(run, layers)
        if self._rests(run, sequences):
            return None
        assert run.logits is not None
        self._copy_texts(sequences)
        wanted = any(len(one.stages) == 1 and one.output.max_new_tokens for one in sequences)
        sampled = self._first_tokens(run.logits, sequences) if wanted else self._no_tokens(run.logits)
        return Prefilled(sampled, run.computed(), run.logits, self._scores(run, sequences))

    def _scores(self, run: PrefillRun, sequences: list[Sequence]) -> list[Scores] | None:
        numbers = [sequence.scores.number for sequence in sequences if sequence.scores is not None]
        return self._runner.score(run, [one.to_score for one in sequences], max(numbers)) if numbers else None

    def _begin(self, sequences: list[Sequence]) -> PrefillRun:
        stages = [sequence.stages[0] for sequence in sequences]
        late = [
            one.late for one, stage in zip(sequences, stages, strict=True) if one.late and stage.prompt.reused.any()
        ]
        began = time.perf_counter()
        run = self._runner.begin(stages, late)
        for sequence, stage in zip(sequences, stages, strict=True):
            if stage.copies:
                sequence.timeline.add("copy", began, sum(copy.length for copy in stage.copies))
        return run

    def probe(self, sequences: list[Sequence], layers: int | None = None) -> list[Float32[np.ndarray, "tokens"]] | None:
        """Run the probes of these sequences in one plan, or the next `layers` of it. None while layers are left.

        Returns:
          For each sequence, how much each token of its prompt was looked at.
        """
        run = sequences[0].run or self._runner.begin_probe([sequence.stages[0] for sequence in sequences])
        assert isinstance(run, ProbeRun)
        self._runner.advance_probe(run, layers)
        if self._rests(run, sequences):
            return None
        return run.focus()

    def _rests(self, run: PrefillRun | ProbeRun, sequences: list[Sequence]) -> bool:
        """Whether layers are left of a plan. Then it waits with its first sequence, once the device is done with it."""
        if not run.done:
            sequences[0].run = run
            jax.block_until_ready(self._runner.store)
        return not run.done

    def _copy_texts(self, sequences: list[Sequence]) -> None:
        """Copy the texts to remember that are computed now away from their preambles, as they are."""
        done = [sequence for sequence in sequences if sequence.copy_pages and len(sequence.stages) == 1]
        if done:
            self._runner.copy([(self._text(sequence), sequence.copy_pages) for sequence in done])
            jax.block_until_ready(self._runner.store)

    def _text(self, sequence: Sequence) -> Segment:
        """Where the text's KV is. Its positions stay, since nothing of it moves to another place of a prompt."""
        places = np.arange(len(sequence.prompt) - sequence.num_copied, len(sequence.prompt))
        slots = slots_of(sequence.pages, places, self._runner.engine.page_size)
        return Segment(0, sequence.num_copied, 0, slots, exact=True)

    def _no_tokens(self, logits: Array) -> Sampled:
        """What sampling says of logits whose tokens are not wanted: whether they are finite.

        It takes none of sampling's arrays, which saves 2 ms on a GPU.
        """
        finite = self._runner.are_finite(logits)
        return Sampled(np.where(finite, -1, NON_FINITE)[:, None].astype(np.int32), None)

    def _first_tokens(self, logits: Array, sequences: list[Sequence]) -> Sampled:
        """Sample the token behind each sequence's prompt and answer so far."""
        slots = [sequence.batch_slot for sequence in sequences]
        position = np.zeros(len(logits), np.int32)
        position[: len(slots)] = [slot.length for slot in slots]
        vocab_size = self._runner.model.vocab_size
        sampling = sampling_arrays(slots, len(logits), vocab_size)
        if any(slot.matcher for slot in slots):
            allowed: Any = allowed_tokens([slot.matcher for slot in slots], len(logits), vocab_size)
            sampling = dataclasses.replace(sampling, allowed=allowed)
        return self._runner.first_tokens(logits, sampling, position)


def _slots(sequences: list[Sequence]) -> list[BatchSlot]:
    return [sequence.batch_slot for sequence in sequences]


def _tokens(sequences: list[Sequence], ahead: int) -> list[int]:
    return [len(sequence.output.token_ids) + ahead for sequence in sequences]
