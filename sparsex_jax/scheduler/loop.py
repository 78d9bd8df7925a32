"""The serving loop: sequences come and go between dispatches, and none waits for the longest of them.

One round, `Loop.step`:

    take in      new sequences, cancellations, rounds whose members are there
    schedule     who decodes, and how many tokens; while the device decodes, who is admitted and what is prefilled
    send ahead   what comes behind this decode dispatch, where its tokens cannot change that: the next one, or a prefill
    run          the decode dispatch, then at most one prefill plan or probe, or a few layers of one; the next decode
                 dispatch is sent before the first tokens of a prefill are here, where steps are long
    postprocess  new tokens, ends, what others can find from now on; who was probed waits again, with an excerpt
    report       news to the listeners

`policy` decides, `execution` computes, `isolation` deals with what fails, `admission` keeps the books of the store,
`choice` says what of it a plan uses, `company` what a text to remember is prefilled behind. While nothing is in line,
`healing` says what is made exact, and `remaking` which texts are made again.

A dispatch that was sent ahead continues from the state on the device. The host sees and handles the tokens before it
while the device computes. If they end a sequence, what the dispatch brings for it is thrown away and never committed.
Its pages may go to another sequence at once, since what that one writes is computed behind the dispatch. A dispatch
ahead has few tokens, so that a request which comes meanwhile waits no longer than it would otherwise.

Everything but `submit`, `remember`, `wait`, `stats` and `Ticket.cancel` belongs to one thread, and so does the engine.
Listeners run on that thread, in the middle of a round. They must not call the engine, which raises RuntimeError then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.config.checks import counted
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.sampling import NON_FINITE, Sampled
from sparsex_jax.errors import (
    AdapterInUseError,
    InvalidRequestError,
    NonFiniteLogitsError,
    OverloadedError,
    UnknownAdapterError,
)
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.scheduler.adapters import Adapter
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.counts import Counts, LoopStats
from sparsex_jax.scheduler.execution import Dispatch, Execution, Prefilled
from sparsex_jax.scheduler.healing import Healing
from sparsex_jax.scheduler.interrupts import interrupts_at_the_end
from sparsex_jax.scheduler.isolation import Isolation
from sparsex_jax.scheduler.lending import Lent
from sparsex_jax.scheduler.pinning import Pinning
from sparsex_jax.scheduler.policy import LEAD_SECONDS, DecodeBatch, Policy, PrefillBatch
from sparsex_jax.scheduler.requests import Requests
from sparsex_jax.scheduler.rounds import Member, Rounds
from sparsex_jax.scheduler.sequence import DEFAULT_NAMESPACE, Event, Listener, Sequence, State, Ticket, ignore
from sparsex_jax.scheduler.timeline import Timeline
from sparsex_jax.text.encoding import Prompt

__all__ = ["Event", "Listener", "Loop", "LoopStats", "Ticket"]

_DONE = (State.HELD, State.FINISHED)
MOMENT = 0.002  # seconds between two looks at what moves between tiers, or whether tokens are there
HELD_MOMENT = 0.01  # seconds between two looks at what a worker was called for, while all that is in line is held

log = logging.getLogger(__name__)


class Loop:
    """Continuous batching on one engine.

    Attributes:
      runner, admission: the device's side and the host's side of the store.
      requests: makes sequences of what callers ask.
      policy: who is next.
      snapshot, tiers: the stats of the store, and of the tiers below it if there are any, as the last round left them.
        From any thread, also in the middle of a round.
      traced: whether tickets of what is submitted from now on have a timeline.
    """

    def __init__(self, runner: Runner, admission: Admission, tokenizer: Any | None, reuse: ReuseConfig) -> None:
        """
        Args:
          tokenizer: a transformers tokenizer, or None for token ids only.
          reuse: of a request that names none.
        """
        self.runner, self.admission, self._config = runner, admission, runner.engine
        self.requests = Requests(runner.model, tokenizer, admission, reuse)
        max_num_seqs = self._config.num_seqs_on(runner.mesh.devices.flat[0].platform)
        self.policy = Policy(self._config, runner.shapes, admission, runner.model.num_layers, max_num_seqs)
        self._execution = Execution(runner)
        self._healing = Healing(self._config, runner.shapes, admission, self.requests)
        self._isolation = Isolation(runner, admission)
        self._counts = Counts()
        self._rounds = Rounds(max_num_seqs)
        self.traced = False
        self.publish()
        self._ids = itertools.count(1)
        self._inbox: list[Sequence] = []
        self._news = threading.Condition()
        self._round = threading.Lock()
        self._stepper: int | None = None  # the thread that is in a round

    # From any thread ----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
        turns: frozenset[bytes] | None = None,
        lent: Lent | None = None,
        pinning: Pinning | None = None,
        member: Member | None = None,
        adapter: str | None = None,
        sharing: str = "isolated",
        delay_s: float = 0.0,
        listener: Listener,
    ) -> Ticket:
        """Check a request and put it in line. Arguments as `Engine.generate`.

        Args:
          turns: `turns_of` the prompt, if it is given as the tokens of a chat.
          lent: shared by several answers to one prompt that is not kept. None: there is one answer, or it is kept.
          pinning: pins prompt and answer once it is answered; shared by several answers to one request.
          member: its place in a round; shared by several answers to one prompt.
          delay_s: wait as if it had come so much later, or earlier if negative. So it overtakes only those who came
            less than that before it.
          listener: called with each `Event`, on the thread that steps. If it raises, it is dropped and its request is
            cancelled.

        Raises:
          InvalidRequestError: an argument is wrong, or the round has another size or all its members; the message
            names it and its limit.
          ContextLengthError: prompt and answer are longer than the model takes, or than an empty store can hold.
          UnknownAdapterError: no adapter of that name is loaded.
          OverloadedError: too many wait already; says when to try again.
        """
        sampling = SamplingParams() if sampling is None else sampling
        options: dict[str, Any] = {"reuse": reuse, "namespace": namespace, "keep": keep, "turns": turns}
        options |= {"lent": lent, "pinning": pinning, "member": member, "delay_s": delay_s}
        options |= {"adapter": adapter, "sharing": sharing}
        return self._submit(self.requests.generation(prompt, sampling, listener=listener, **options))

    def remember(
        self,
        prompt: Prompt,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        frozen: bool = False,
        preamble: Prompt | None = None,
        company: bool | None = None,
        adapter: str | None = None,
        sharing: str = "isolated",
        listener: Listener,
    ) -> Ticket:
        """Put a text to remember in line. Its last event has the handle. Arguments as `Engine.remember`, errors and
        listener as `submit`."""
        options: dict[str, Any] = {"namespace": namespace, "frozen": frozen, "preamble": preamble, "company": company}
        options |= {"adapter": adapter, "sharing": sharing}
        return self._submit(self.requests.remember(prompt, listener=listener, **options))

    def wait(self, timeout: float) -> None:
        """Block until there may be work, or for this many seconds."""
        with self._news:
            if not self._has_work():
                self._news.wait(timeout)

    def hold_nobody(self) -> None:
        """Begin all rounds with the members that are there, now and from now on: others do not come any more."""
        with self._news:
            self._rounds.holds = False
            self._news.notify_all()

    @property
    def stats(self) -> LoopStats:
        running, preempted = len(self.policy.running), self.policy.preemptions
        with self._news:
            waiting, held = self._num_waiting(), self._rounds.num_held
        return self._counts.stats(waiting=waiting, held=held, running=running, preempted=preempted)

    @property
    def queued_tokens(self) -> int:
        """Tokens of the prompts that wait or are being prefilled, whatever of them is found."""
        with self._news:
            in_line = [*self._inbox, *self.policy.of_state(State.WAITING, State.PREFILLING)]
        return sum(len(sequence.prompt) for sequence in in_line if not sequence.cancelled)

    def _submit(self, sequence: Sequence) -> Ticket:
        with self._news:
            waiting, most = self._num_waiting(), self._config.max_waiting
            if waiting >= most:
                raise OverloadedError(f"{waiting} requests wait already, and max_waiting is {most}", self._retry())
            if self.traced:
                sequence.timeline = Timeline()
                sequence.timeline.enter("queue")
            self._put_in_line([sequence])
            return Ticket(sequence, self._wake)  # before a round can make another prompt of it

    def _put_in_line(self, sequences: Several[Sequence]) -> None:
        with self._news:
            self._require_adapters(sequences)
            for sequence in sequences:
                sequence.id, sequence.rank = next(self._ids), time.monotonic() + sequence.delay_s
            self._join_rounds(sequences)
            self._inbox += sequences
            self._news.notify_all()

    def _require_adapters(self, sequences: Several[Sequence]) -> None:
        """Raise UnknownAdapterError if one's adapter was unloaded since the sequence was made."""
        for acting in (sequence.adapter for sequence in sequences):
            if acting and not self.admission.adapters.stands(acting):
                raise UnknownAdapterError(f"adapter={acting.name!r} was unloaded meanwhile")

    def _join_rounds(self, sequences: Several[Sequence]) -> None:
        """All of them or none. Raises InvalidRequestError if one cannot join its round."""
        try:
            for sequence in sequences:
                self._rounds.join(sequence)
        except InvalidRequestError:
            for sequence in sequences:
                sequence.cancelled = True  # which leaves its place
            raise

    def _num_waiting(self) -> int:
        in_line = [*self._inbox, *self.policy.of_state(State.WAITING)]
        return sum(not sequence.cancelled for sequence in in_line)

    def _has_work(self) -> bool:
        return self.admission.moves_blocks or self._has_requests()

    def _has_requests(self) -> bool:
        return bool(self._inbox) or any(one.state not in _DONE for one in self.policy.sequences)

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _retry(self) -> float:
        """Seconds until a quarter of the line has moved on, if requests end as fast as the last ones did."""
        interval = self._counts.seconds_between_ends()
        return 1.0 if interval is None else min(max(interval * self._config.max_waiting / 4, 1.0), 60.0)

    # On the thread that steps -------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round of work. False when nothing is running or waiting.

        What fails beside the steps of sequences, such as moving blocks, ends none of them if it took the store with it:
        all is computed again. Else it is raised.
        """
        with self._one_round():
            try:
                self._work()
            except Exception:
                if not self.recover():
                    raise
                log.exception("the store was lost by no sequence's step; what ran is computed again")
            return self._report()

    def _work(self) -> None:
        self._take_in()
        decode = self._next_decode()
        prefill = self.policy.prefill_batch()  # while the device decodes
        self._send_ahead(decode, prefill)
        prefill = self._with_newcomers(prefill)
        self._send_prefill(decode, prefill)
        self._finish_decode(decode)
        prefill = self._with_newcomers(prefill)
        self._prefill(prefill)
        idle = decode is None and not prefill.sequences
        self._move_blocks(idle=idle)
        if idle:
            self._wait_for_rounds()

    def _with_newcomers(self, prefill: PrefillBatch) -> PrefillBatch:
        """If there is none: what is prefilled for those who came meanwhile. They need not wait for another dispatch."""
        if not self._inbox or prefill.sequences or self._execution.ahead is not None:
            return prefill
        self._take_in()
        return self.policy.prefill_batch()

    def complete(self, sequences: Several[Sequence]) -> None:
        """Put sequences in line and step until they are done; whatever else is in line goes on too.

        `max_waiting` is a limit for servers and does not count here.

        Raises:
          Exception: why the first of them failed. The others are cancelled, and what is unfinished is not kept.
        """
        self._refuse_listeners()
        self._put_in_line(sequences)
        try:
            while any(sequence.state not in _DONE for sequence in sequences):
                self.step()
                for sequence in sequences:
                    if sequence.error is not None:
                        raise sequence.error
        except BaseException:
            self._drop(sequences)
            raise

    def heal(self, *, asked: bool = False) -> float | None:
        """Prefill a chunk of approximate content exactly, or of a remembered text again, if nothing else is in line.

        Who comes meanwhile waits for one chunk at most.

        Args:
          asked: even where healing is off, or paused after a failure. Then a failure is raised.

        Returns:
          For how many seconds to leave the device idle before the next chunk, if no request comes before. None if there
          is nothing to heal, or it must not be done.
        """
        with self._one_round(), self._news:
            sequence = None if self._has_requests() else self._healing.next(asked=asked)
        if sequence is None:
            return None
        started = time.perf_counter()
        try:
            self.complete([sequence])
        except Exception:
            if asked:
                raise
            self._healing.pause()
            return None
        self._counts.healed(sequence)
        return self._healing.rest(time.perf_counter() - started)

    def release(self, sequence: Sequence) -> None:
        """Give back the pages of a sequence that was held."""
        with self._one_round():
            self.admission.finish(sequence, "length")
            self._report()

    def load_adapter(self, name: str, weights: AdapterWeights) -> Adapter:
        """Place an adapter on the devices. Requests can ask for it from then on. Raises as `Engine.load_adapter`."""
        with self._one_round():
            adapter = self.admission.adapters.new(name, weights)
            self.runner.place_adapter(adapter.slot, name, weights)
            self.admission.let_go_of(None)
            self.admission.adapters.add(adapter)
            self.publish()
            return adapter

    def unload_adapter(self, name: str, timeout_s: float) -> Adapter:
        """Let go of an adapter and of what was computed under it, once its sequences have ended. Arguments and errors
        as `Engine.unload_adapter`."""
        adapters = self.admission.adapters
        with adapters.leaving(name) as adapter:
            self._end_those_of(adapter, timeout_s)
            with self._one_round(), self._news:
                self._require_unused(adapter, timeout_s)
                adapters.remove(name)
                self.admission.let_go_of(adapter)
                self.publish()
                return adapter

    def _end_those_of(self, adapter: Adapter, timeout_s: float) -> None:
        """Step until no sequence has this adapter, at most so long; or until nothing is left but what is held, which no
        step ends."""
        until = time.monotonic() + timeout_s
        while self.adapter_state(adapter).uses and time.monotonic() < until and self.step():
            pass

    def _require_unused(self, adapter: Adapter, timeout_s: float) -> None:
        if uses := self.adapter_state(adapter).uses:
            raise AdapterInUseError(
                f"adapter {adapter.name!r} cannot be unloaded: {counted(uses, 'sequence')} with it did not end within "
                f"timeout_s={timeout_s:g}. It takes requests again"
            )

    def adapter_state(self, adapter: Adapter) -> Adapter:
        """With how many sequences use it now. From any thread."""
        with self._news:
            there = [one for one in (*self._inbox, *self.policy.sequences) if one.state is not State.FINISHED]
        users = [one.adapter for one in there if one.adapter and one.adapter.number == adapter.number]
        return dataclasses.replace(adapter, uses=len(users))

    def settle(self) -> None:
        """Wait until all that is on its way to a lower tier is there."""
        while self.admission.moves_blocks:
            with self._one_round():
                self._move_blocks(idle=True)

    def publish(self) -> None:
        """Let `snapshot` say how the store is now."""
        self.snapshot = self.admission.cache.stats()
        self.tiers = self.admission.tiers.stats() if self.admission.tiers is not None else None

    def recover(self) -> bool:
        """After a failure: whether the KV is lost. Then store and cache are new, and what ran is computed again."""
        return self._isolation.recover()

    def _move_blocks(self, *, idle: bool) -> None:
        """Take what came from other tiers, and send what is to go there. Who has nothing else to do waits a moment."""
        tiers, restoring = self.admission.tiers, self.admission.restoring
        if tiers is None or restoring is None:
            return
        tiers.pump(self.admission.cache)
        self.admission.take_loaded()
        if restoring.active:
            restoring.pump(MOMENT if idle else 0.0)
        elif idle and self.admission.moves_blocks:
            tiers.wait(MOMENT)

    def _wait_for_rounds(self) -> None:
        """Wait a moment if all that is in line is held for others of its round."""
        with self._news:
            left = self._rounds.seconds_to_next()
            held = all(one.is_held or one.state in _DONE for one in self.policy.sequences)
            if left and held and not self._inbox:
                self._news.wait(min(left, HELD_MOMENT))

    def _drop(self, sequences: Several[Sequence]) -> None:
        with self._one_round():
            for sequence in sequences:
                sequence.cancelled = True
                self.admission.withdraw(sequence)
            self._take_in()
            self._report()

    @contextlib.contextmanager
    def _one_round(self) -> Iterator[None]:
        """Rounds of several threads come one after the other, and a listener cannot begin one within another."""
        self._refuse_listeners()
        with interrupts_at_the_end(), self._round:
            self._stepper = threading.get_ident()
            try:
                yield
            finally:
                self._stepper = None

    def _refuse_listeners(self) -> None:
        if self._stepper == threading.get_ident():
            raise RuntimeError("a listener called the engine in the middle of a round; listeners may only submit")

    def _take_in(self) -> None:
        self.admission.expire_pins()
        with self._news:
            new, self._inbox = self._inbox, []
            self.policy.sequences += new
            self._counts.began(self._rounds.begin())
        for sequence in self.policy.sequences:
            if sequence.cancelled and sequence.state is not State.FINISHED:
                self.admission.finish(sequence, "cancelled")

    # Decode -------------------------------------------------------------------------------------------------

    def _next_decode(self) -> Dispatch | None:
        """The dispatch that was sent ahead, or else a new one."""
        ahead, self._execution.ahead = self._execution.ahead, None
        if ahead is not None:
            return ahead
        return self._start_decode(self.policy.decode_batch(self._execution.step_seconds))

    def _send_ahead(self, decode: Dispatch | None, prefill: PrefillBatch) -> None:
        """Send the next dispatch before the host has seen the tokens of this one, so that the device never waits for
        what the host does with them. Not if something comes in between, or may."""
        if decode is None or prefill.sequences or not self._execution.can_follow(decode):
            return
        if self._comes_before(lambda: self._execution.seconds_left(decode) - LEAD_SECONDS):
            return
        steps = self.policy.steps_ahead(decode.sequences, decode.steps, self._execution.step_seconds)
        if steps:
            self._execution.start_ahead(decode, steps)

    def _comes_before(self, seconds_left: Callable[[], float]) -> bool:
        """Wait while seconds are left, and say whether a request has come."""
        with self._news:
            while not self._inbox and (left := seconds_left()) > 0:
                self._news.wait(min(left, MOMENT))
            return bool(self._inbox)

    def _start_decode(self, batch: DecodeBatch) -> Dispatch | None:
        """Decode suspects one by one, and send the others' dispatch on its way."""
        for sequence in batch.alone:
            if sequence.state is State.DECODING:  # not if one before it lost the store
                alone = functools.partial(self._execution.decode_alone, sequence, batch.steps)
                self._take_decoded([sequence], alone, batch.steps)
        together = [sequence for sequence in batch.together if sequence.state is State.DECODING]
        return self._execution.start_decode(together, batch.steps)

    def _finish_decode(self, dispatch: Dispatch | None) -> None:
        """Take the tokens of a dispatch, and report them before the prefill runs."""
        if dispatch is not None:
            together = functools.partial(self._execution.fetch, dispatch)
            self._take_decoded(dispatch.sequences, together, dispatch.steps)
        self._report()

    def _take_decoded(self, sequences: list[Sequence], together: Callable[[], Sampled], steps: int) -> None:
        alone = functools.partial(self._execution.decode_alone, steps=steps)
        for group, sampled in self._isolation.attempt(sequences, together, alone):
            for slot, sequence in enumerate(group):
                self._take(sequence, sampled, slot)

    # Prefill ------------------------------------------------------------------------------------------------

    def _send_prefill(self, decode: Dispatch | None, batch: PrefillBatch) -> None:
        """Send a plan before the host has seen the tokens in front of it, so that the device need not wait while the
        host lays it out and launches it."""
        if decode is not None and batch.sequences and batch.layers is None:
            self._execution.send_prefill(batch.sequences, decode)

    def _prefill(self, batch: PrefillBatch) -> None:
        """Run the plan, or some layers of it, for those who still hold their pages: the decode may have lost them."""
        sequences = [sequence for sequence in batch.sequences if sequence.state is State.PREFILLING]
        if not sequences:
            return
        if batch.layers is None and self._execution.can_follow_prefill(sequences):
            self._send_behind(sequences)
        if sequences[0].stages[0].probe is None:
            self._run_stage(sequences, functools.partial(self._execution.prefill, layers=batch.layers), self._prefilled)
        else:
            self._run_stage(sequences, functools.partial(self._execution.probe, layers=batch.layers), self._probed)

    def _send_behind(self, sequences: list[Sequence]) -> None:
        """Send the next decode dispatch before the first tokens of a prefill are fetched: the device knows them."""
        together, steps = self.policy.decode_behind(sequences, self._execution.step_seconds)
        if together and self._execution.send_prefill(sequences):
            self._execution.start_behind(together, steps)

    def _run_stage[Result](
        self,
        sequences: list[Sequence],
        run: Callable[[list[Sequence]], Result | None],
        take: Callable[[Sequence, Result, int], None],
    ) -> None:
        """Run the first stage of sequences, or some layers of it, and take the result if it is done."""
        together = functools.partial(run, sequences)
        for group, result in self._isolation.attempt(sequences, together, lambda one: run([one])):
            for slot, sequence in enumerate(group):
                if sequence.late is None:
                    self.admission.let_go_of_donors(sequence)  # the copies are made before the first layer
                self.policy.end_turn(sequence)
                if result is not None:
                    take(sequence, result, slot)

    def _probed(self, sequence: Sequence, focus: list[np.ndarray], slot: int) -> None:
        """What a prompt's fresh tokens look at is known. The sequence waits again, with what is kept of it."""
        if not np.isfinite(focus[slot]).all():
            self._isolation.judge(sequence, NonFiniteLogitsError("the attention to what was found is not all finite"))
            return
        sequence.answer_from(focus[slot])
        self.admission.leave(sequence)

    def _prefilled(self, sequence: Sequence, prefilled: Prefilled, slot: int) -> None:
        """A stage of the sequence has run."""
        if (prefilled.sampled.token[slot] == NON_FINITE).any():
            self._isolation.judge(sequence, NonFiniteLogitsError("the logits behind the prompt are not all finite"))
            return
        try:
            if prefilled.scores is not None:
                sequence.take_scores(prefilled.scores[slot])
        except NonFiniteLogitsError as error:
            self._isolation.judge(sequence, error)
            return
        sequence.finish_stage(prefilled.computed[slot])
        if not sequence.stages:
            if slot in prefilled.logits:
                sequence.logits = np.asarray(prefilled.logits[slot])
            sequence.finish_prefill(self.runner.model.num_layers)
            self._take(sequence, prefilled.sampled, slot, first=True)

    # What came of it ----------------------------------------------------------------------------------------

    def _take(self, sequence: Sequence, sampled: Sampled, slot: int, *, first: bool = False) -> None:
        """Give a sequence its new tokens, as NumPy arrays, and end it if one of them does.

        Args:
          first: the token is that behind the prefill. What the prefill wrote can be found from now on.
        """
        try:
            sequence.output.take(sampled, slot)
            sequence.num_computed = sequence.slots(0)  # all but the last token, which was no input yet
            only_prefilled = sequence.output.max_new_tokens == 0
            reason = "length" if only_prefilled else sequence.output.finish_reason
            if first or reason:
                self.admission.commit(sequence)
            if reason:
                self._end(sequence, reason)
        except Exception as error:
            self._isolation.judge(sequence, error)

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.hold:
            sequence.state = State.HELD
        elif sequence.remember and (sequence.forgotten or self.admission.is_outdated(sequence)):
            self.admission.leave(sequence)  # it began with what is forgotten by now, or is let go of: compute it anew
        else:
            sequence.handle = self.admission.register(sequence) if sequence.remember else None
            self.admission.finish(sequence, reason)

    def _report(self) -> bool:
        """Tell all news. False when nothing is running or waiting.

        All is counted before anybody hears of it, so that who looks at the counts then finds himself in them.
        """
        news = [(sequence, sequence.news()) for sequence in self.policy.sequences if sequence.has_news]
        for sequence, event in news:
            self._count(sequence, event)
        self.publish()
        for sequence, event in news:
            self._tell(sequence, event)
        with self._news:
            self.policy.sequences = [one for one in self.policy.sequences if one.state is not State.FINISHED]
            return self._has_work()

    def _count(self, sequence: Sequence, event: Event) -> None:
        if not sequence.asked:
            return
        self._counts.told(event)
        if event.report is not None:
            self.admission.count_found(sequence)

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:
            log.exception("the listener of request %d failed; the request is cancelled", sequence.id)
            sequence.listener, sequence.cancelled = ignore, True
