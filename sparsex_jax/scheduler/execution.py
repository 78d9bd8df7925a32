"""Runs what the policy decided on the device: decode dispatches, prefill plans, sampling."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from sparsex_jax.cache import Segment
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.runner import Computed, PrefillRun, ProbeRun, Runner
from sparsex_jax.device.sampling import NON_FINITE, Sampled
from sparsex_jax.device.scoring import Scores
from sparsex_jax.device.state import BatchSlot, allowed_tokens, batch_slots, sampling_arrays, state_in
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.scheduler.constrained import ConstrainedDecode
from sparsex_jax.scheduler.sequence import Sequence, State


class Batch(NamedTuple):
    """Sequences that decode together, and where they stand. Plans are compared by identity: a sequence that was
    admitted again has another one.

    Attributes:
      sequences: one batch slot each.
      plans: of each sequence.
      tokens: how many new tokens each has.
    """

    sequences: list[Sequence]
    plans: list[RequestPlan]
    tokens: list[int]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> Batch:
        return cls(sequences, [one.plan for one in sequences], [len(one.output.token_ids) for one in sequences])

    def behind(self, steps: int) -> Batch:
        """The same once each has got so many more."""
        return self._replace(tokens=[number + steps for number in self.tokens])

    @property
    def pages(self) -> list[Several[int]]:
        """Of each slot. A sequence that has ended since has none any more, and does not write to those."""
        return [plan.pages for plan in self.plans]

    @property
    def live(self) -> list[int]:
        """The slots of sequences that stand there now. Others have ended since, or were preempted."""
        return [slot for slot in range(len(self.sequences)) if self._stands_there(slot)]

    @property
    def ended(self) -> list[Sequence]:
        """The others."""
        return [one for slot, one in enumerate(self.sequences) if not self._stands_there(slot)]

    def _stands_there(self, slot: int) -> bool:
        one = self.sequences[slot]
        has_plan = one.admitted_plan is self.plans[slot] and one.state is State.DECODING
        return has_plan and len(one.output.token_ids) == self.tokens[slot]


class _Kept(NamedTuple):
    """A decode state on the device, and what it was made of.

    Attributes:
      batch: where its sequences stand by it.
      pages: how many pages each has.
    """

    state: DecodeState
    batch: Batch
    pages: list[int]

    @classmethod
    def of(cls, state: DecodeState, batch: Batch) -> _Kept:
        return cls(state, batch, [len(pages) for pages in batch.pages])

    def is_of(self, batch: Batch) -> bool:
        """Whether it is where this batch is, but perhaps for pages that its sequences got since."""
        return (self.batch.plans, self.batch.tokens) == (batch.plans, batch.tokens)


class Dispatch(NamedTuple):
    """Tokens on their way.

    Attributes:
      batch: whose, and where they stood before.
      steps: at most how many for each.
      sampled: where they will be on the device, what brings them, or why the dispatch failed.
      started: `time.perf_counter()` then.
    """

    batch: Batch
    steps: int
    sampled: Sampled | ConstrainedDecode | Exception
    started: float

    @property
    def sequences(self) -> list[Sequence]:
        """Those that the tokens are still for."""
        return [self.batch.sequences[slot] for slot in self.batch.live]


class _SentPrefill(NamedTuple):
    """A prefill all layers of which are on their way, and the first tokens behind it.

    Attributes:
      sequences: whose it is.
      stages: what it prefills of each.
      run: the prefill; or why it could not be sent.
      first: the token behind each sequence's stage, a line for each; None: no sequence wants one.
    """

    sequences: list[Sequence]
    stages: list[RequestPlan]
    run: PrefillRun | Exception
    first: Sampled | None


class Prefilled(NamedTuple):
    """What came of a plan.

    Attributes:
      sampled: the token behind each sequence's stage, as NumPy arrays; no tokens if no sequence of the plan wants one.
      computed: of each sequence.
      logits: float32 `[vocab]` of each sequence that wants those behind its prompt, on their way from the device.
      scores: what the rows of each sequence say of the prompt's tokens. None: no sequence asks for that.
    """

    sampled: Sampled
    computed: list[Computed]
    logits: dict[int, Float[Array, "vocab"]]
    scores: list[Scores] | None


class Execution:
    """Computes for sequences, and changes nothing of them but `Sequence.run`.

    Attributes:
      step_seconds: what a token of the last dispatch took.
      ahead: the dispatch that was sent before the tokens of the one before it were fetched, if there is one.
    """

    def __init__(self, runner: Runner) -> None:
        self.step_seconds = 0.0
        self.ahead: Dispatch | None = None
        self._fetched = 0.0  # `time.perf_counter()` when the last tokens came
        self._runner = runner
        self._kept: _Kept | None = None
        self._sent: _SentPrefill | None = None

    # Decode -------------------------------------------------------------------------------------------------

    def start_decode(self, sequences: list[Sequence], steps: int) -> Dispatch | None:
        """Dispatch at most `steps` tokens for each sequence; None if there is no sequence.

        A dispatch that fails raises its error when it is fetched, as one that fails on the device does.
        """
        if not sequences:
            return None
        batch, kept = Batch.of(sequences), self._kept
        return self._dispatched(batch, steps, functools.partial(self._state, batch, kept))

    def can_follow(self, dispatch: Dispatch) -> bool:
        """Whether the device has all that the dispatch behind this one needs, before the tokens of this one are known.

        It has not if the host makes the state anew: for a structure, for sequences whose end the device does not know,
        or because those that are left fit into fewer slots.
        """
        if self._kept is None or not isinstance(dispatch.sampled, Sampled):
            return False
        batch, number = dispatch.batch, len(dispatch.batch.live)
        as_many = number > 0 and self._num_slots(number) == self._num_slots(len(batch.sequences))
        return as_many and all(map(_ended_on_the_device, batch.ended))

    def _num_slots(self, sequences: int) -> int:
        return batch_slots(sequences, self._runner.shapes.row_multiple)

    def seconds_left(self, dispatch: Dispatch) -> float:
        """Until the tokens of a dispatch are there, if they take as long as those of the last one; 0 if they are."""
        token = getattr(dispatch.sampled, "token", None)
        if isinstance(token, jax.Array) and token.is_ready():  # type: ignore[attr-defined]
            return 0.0
        return self._began(dispatch) + dispatch.steps * self.step_seconds - time.perf_counter()

    def _began(self, dispatch: Dispatch) -> float:
        """When the device began with a dispatch whose tokens have not come: not before those in front of it did."""
        return max(dispatch.started, self._fetched)

    def start_ahead(self, dispatch: Dispatch, steps: int) -> None:
        """Dispatch `steps` more tokens behind a dispatch that can be followed. Its sequences have pages for them."""
        kept = self._kept
        assert kept is not None
        batch = dispatch.batch.behind(dispatch.steps)
        self.ahead = self._dispatched(batch, steps, functools.partial(self._grown, kept, batch))

    def start_behind(self, sequences: list[Sequence], steps: int) -> None:
        """Dispatch `steps` tokens for each sequence behind the prefill that was sent, which gives some of them the one
        in front of those. All have pages, and none has a structure."""
        sent = self._sent
        if sent is None or sent.first is None:  # it failed
            return
        line = np.full(self._num_slots(len(sequences)), -1, np.int32)
        line[: len(sequences)] = [sent.sequences.index(one) if one in sent.sequences else -1 for one in sequences]
        now = Batch.of(sequences)
        batch = now._replace(tokens=[number + int(at >= 0) for number, at in zip(now.tokens, line, strict=False)])
        self.ahead = self._dispatched(batch, steps, functools.partial(self._made_anew, batch), sent.first, line)

    def _dispatched(self, batch: Batch, steps: int, state: Callable[[], DecodeState], *first: Any) -> Dispatch:
        """Arguments as `_dispatch`, the state once it is made."""
        started, self._kept = time.perf_counter(), None
        try:
            return Dispatch(batch, steps, self._dispatch(batch, steps, state(), *first), started)
        except Exception as error:
            return Dispatch(batch, steps, error, started)

    def _dispatch(self, batch: Batch, steps: int, state: DecodeState, *first: Any) -> Sampled | ConstrainedDecode:
        """Dispatch `steps` tokens, and keep the state behind them.

        Args:
          first: of `Runner.start_decode`, if the state lacks tokens.
        """
        matchers = [sequence.output.matcher for sequence in batch.sequences]
        if any(matchers):
            return ConstrainedDecode(self._runner, state, matchers, steps)
        state, sampled = self._runner.start_decode(state, steps, *first)
        self._kept = _Kept.of(state, batch.behind(steps))
        return sampled

    def _state(self, batch: Batch, kept: _Kept | None) -> DecodeState:
        """The state stays on the device from one dispatch to the next. Where sequences got pages meanwhile, the page
        tables alone are made anew; where one came or went, all of it is, of what the host knows."""
        if kept is not None and kept.is_of(batch):
            return self._grown(kept, batch)
        return self._made_anew(batch)

    def _made_anew(self, batch: Batch) -> DecodeState:
        return state_in(_slots(batch.sequences), self._runner.shapes, self._runner.model.vocab_size)

    def _grown(self, kept: _Kept, batch: Batch) -> DecodeState:
        pages = batch.pages
        grown = kept.pages != [len(each) for each in pages]
        return self._runner.with_pages(kept.state, pages) if grown else kept.state

    def fetch(self, dispatch: Dispatch) -> Sampled:
        """What was sampled, as NumPy arrays, a line for each of `Dispatch.sequences`. Raises why the dispatch failed;
        what was sent behind it is dropped then."""
        try:
            sampled = self._finished(dispatch)
        except Exception:
            self._kept = self.ahead = self._sent = None  # they came out of the same dispatch
            raise
        began, self._fetched = self._began(dispatch), time.perf_counter()
        self.step_seconds = (self._fetched - began) / dispatch.steps
        live = dispatch.batch.live
        if len(live) == len(dispatch.batch.sequences):
            return sampled
        return jax.tree.map(lambda lines: lines[live], sampled)

    def _finished(self, dispatch: Dispatch) -> Sampled:
        if isinstance(dispatch.sampled, Exception):
            raise dispatch.sampled
        if isinstance(dispatch.sampled, Sampled):
            return jax.device_get(dispatch.sampled)
        state, sampled = dispatch.sampled.finish()
        steps = sampled.token.shape[1]
        self._kept = _Kept.of(state, dispatch.batch.behind(steps))
        return sampled

    def decode_alone(self, sequence: Sequence, steps: int) -> Sampled:
        """A dispatch of one sequence, and its tokens."""
        dispatch = self.start_decode([sequence], steps)
        assert dispatch is not None
        return self.fetch(dispatch)

    # Prefill ------------------------------------------------------------------------------------------------

    def can_follow_prefill(self, sequences: list[Sequence]) -> bool:
        """Whether a decode dispatch may be sent before the results of a prefill are fetched: nothing else is asked of
        the device for these, which would come behind the dispatch."""
        return not any(one.copy_pages or one.scores or one.wants_logits_next for one in sequences)

    def send_prefill(self, sequences: list[Sequence], dispatch: Dispatch | None = None) -> bool:
        """Send the next stages of these as one plan, also before the tokens of a dispatch are known. `prefill` goes on
        from there, and raises the error if this fails. False where that cannot be done."""
        stages = [sequence.stages[0] for sequence in sequences]
        if self._sent is not None and self._sent.stages == stages:
            return True
        if not self.can_send(sequences, dispatch):
            return False
        try:
            run = self._begin(sequences)
            self._runner.advance(run)
            self._sent = _SentPrefill(sequences, stages, run, self._first_tokens(run, sequences))
        except Exception as error:
            self._sent = _SentPrefill(sequences, stages, error, None)
        return True

    def can_send(self, sequences: list[Sequence], dispatch: Dispatch | None) -> bool:
        """Whether the next stages of these can be sent as one plan, also before the tokens of a dispatch are known.

        Not if the tokens would come later for it: where the host is asked something between two layers or two tokens,
        and where a part of what is reused has still to come.
        """
        stages = [sequence.stages[0] for sequence in sequences]
        steers = dispatch is not None and not isinstance(dispatch.sampled, Sampled)
        if steers or any(stage.probe is not None for stage in stages):
            return False
        is_begun = any(sequence.late is not None or sequence.run is not None for sequence in sequences)
        return not is_begun and self._runner.asks_nothing(stages)

    def _take_sent(self, sequences: list[Sequence]) -> _SentPrefill | None:
        """These stages, if they were sent. Raises why they could not be."""
        sent, self._sent = self._sent, None
        if sent is None or sent.stages != [sequence.stages[0] for sequence in sequences]:
            return None
        if isinstance(sent.run, Exception):
            raise sent.run
        return sent

    def prefill(self, sequences: list[Sequence], layers: int | None = None) -> Prefilled | None:
        """Run the next stage of each sequence in one plan, or the next `layers` of it. None while layers are left.

        What fails on the device raises here: the logits behind chunks are looked at too, and a plan that rests between
        two layers is waited for. What was sent behind the prefill is dropped then.
        """
        try:
            return self._prefill(sequences, layers)
        except Exception:
            self._kept = self.ahead = None
            raise

    def _prefill(self, sequences: list[Sequence], layers: int | None) -> Prefilled | None:
        sent = self._take_sent(sequences)
        run = sent.run if sent else sequences[0].run or self._begin(sequences)
        assert isinstance(run, PrefillRun)
        if not run.done:
            self._runner.advance(run, layers)
        if self._rests(run, sequences):
            return None
        assert run.logits is not None
        self._copy_texts(sequences)
        # All that is fetched is on its way before anything waits for the device.
        logits = {
            slot: self._runner.logits_of(run.logits, slot)
            for slot, one in enumerate(sequences)
            if one.wants_logits_next
        }
        first = sent.first if sent else self._first_tokens(run, sequences)
        sampled = self._no_tokens(run.logits) if first is None else jax.device_get(first)
        self._fetched = time.perf_counter()
        return Prefilled(sampled, run.computed(), logits, self._scores(run, sequences))

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

    def _first_tokens(self, run: PrefillRun, sequences: list[Sequence]) -> Sampled | None:
        """The token behind each sequence's prompt and answer so far, on its way; None: no sequence wants one."""
        if not any(len(one.stages) == 1 and one.output.max_new_tokens for one in sequences):
            return None
        logits = run.logits
        assert logits is not None
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


def _ended_on_the_device(sequence: Sequence) -> bool:
    """Whether the device knows that it has ended: by a token of the model, or by its length."""
    output = sequence.output
    if sequence.state is not State.FINISHED or not output.token_ids:
        return False
    return output.token_ids[-1] in output.end_tokens or len(output.token_ids) >= output.max_new_tokens
