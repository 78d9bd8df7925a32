"""Who is next. The policy decides and moves pages; it computes nothing on the device.

Pages. A sequence is admitted with pages for its prompt and a few tokens, and takes more as it grows. If there are
none, the youngest is preempted: its pages go back, and later it is computed again (mostly it is found again: what was
exact is committed). The oldest is never preempted for another, so it always gets on.

Order. The oldest is admitted first; a priority makes a sequence some seconds older or younger. Younger ones overtake it
only while it waits for pages and they find theirs, and only a limited number of times. Among those being prefilled,
turns go round: a prompt of many chunks comes last after each, and so does one that is cut by layers.

Rounds. A member of a round is not looked at until its round has begun. Then the members come one behind the other, and
as many share a plan as compute no more together than a plan of the token budget does in all layers: most rows of a
prompt that was found nearly whole are left out behind the boundary.

Token budget. A prefill plan has at most `prefill_tokens` rows. Sequences of the same schedule share a plan within it.
A sparse plan with more rows runs a few layers at a time, and decode runs in between. Its state between two layers is
as large as its rows, so only one such prefill is under way at a time; the others' plain chunks take turns with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np

from sparsex_jax.config import EngineConfig, ReuseConfig
from sparsex_jax.errors import InvalidRequestError, NoRoomError, StoreFullError
from sparsex_jax.reuse.planner import Shapes
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.chunks import layers_within, stages, token_layers
from sparsex_jax.scheduler.rounds import all_of_one
from sparsex_jax.scheduler.sequence import Sequence, State
from sparsex_jax.scheduler.sharing import Offer

# Tokens that a dispatch has at most where somebody waits for its end, or may.
FEW_STEPS = 4
# Where half as many take a device so long, they will do: by then the host has handled those before them, and sent the
# next. A request that comes meanwhile waits half as long. A dispatch that takes so long is also sent behind a prefill
# before its first tokens are known.
LONG_SECONDS = 0.008
# A dispatch of more than few tokens should not take longer: who comes meanwhile waits for its end. It matters on slow
# devices.
MOST_SECONDS = 0.2
# What the host does for 64 sequences between two dispatches takes about so long (`scripts/bench_host.py`). Where few
# tokens take a device longer, they are sent for before the host has seen those before them. Where they do not, it is
# better to send for many at once.
ROUND_SECONDS = 0.002
# How long before the tokens of a dispatch are due the next one is sent: what the host may take to send it. A request
# that comes after that waits for both.
LEAD_SECONDS = 0.006
# What the host looks at in a round does not grow with the line: so many that find no pages, and so many comparisons of
# one that waits with one that is being prefilled. Who is not looked at has its turn in one of the next rounds.
MOST_TRIED = 16
MOST_COMPARED = 32


class DecodeBatch(NamedTuple):
    """Who decodes: suspects one by one, then the others together, at most `steps` tokens each."""

    alone: list[Sequence]
    together: list[Sequence]
    steps: int


class PrefillBatch(NamedTuple):
    """Whose next stages are one plan, and how many layers of it run; None: all that are left."""

    sequences: list[Sequence]
    layers: int | None


def few_steps(most: int) -> int:
    """Tokens of a dispatch whose end somebody waits for, or may. A dispatch has `most` at most."""
    return min(FEW_STEPS, most)


class Policy:
    """Decides for the sequences of one loop.

    Attributes:
      sequences: all that are not finished, the oldest first.
      max_num_seqs: sequences that are prefilled or decoded at once.
      prefill_tokens: the token budget of a prefill plan.
      preemptions: how often a sequence was preempted.
    """

    def __init__(
        self, config: EngineConfig, shapes: Shapes, admission: Admission, num_layers: int, max_num_seqs: int
    ) -> None:
        self._config, self._admission, self._num_layers, self.max_num_seqs = config, admission, num_layers, max_num_seqs
        self._max_rows = shapes.max_rows
        asked = config.prefill_tokens
        self.prefill_tokens = shapes.buckets[1][0] if asked is None else asked
        if not 1 <= self.prefill_tokens <= shapes.max_rows:
            raise InvalidRequestError(f"prefill_tokens={asked} must be from 1 to {shapes.max_rows}")
        self.sequences: list[Sequence] = []
        self.preemptions = 0
        self._turns = itertools.count(1)

    def of_state(self, *states: State) -> list[Sequence]:
        """The sequences in one of these states, the oldest first."""
        return [sequence for sequence in self.sequences if sequence.state in states]

    @property
    def waiting(self) -> list[Sequence]:
        """Those that may be admitted, the oldest first."""
        return [sequence for sequence in self.of_state(State.WAITING) if not sequence.is_held]

    @property
    def running(self) -> list[Sequence]:
        return self.of_state(State.PREFILLING, State.DECODING)

    # Decode -------------------------------------------------------------------------------------------------

    def decode_batch(self, step_seconds: float) -> DecodeBatch:
        """Who decodes next. All have pages for the tokens to come.

        Args:
          step_seconds: what a token of the last dispatch took.
        """
        steps = self._steps(step_seconds)
        self._grow(steps)
        decoding = self.of_state(State.DECODING)
        alone, together = ([one for one in decoding if one.suspect is suspect] for suspect in (True, False))
        return DecodeBatch(alone, together, steps)

    def _steps(self, step_seconds: float) -> int:
        """As many as a dispatch may have and soon gets done, or few where some sequence's first token is near, or where
        the next ones are sent for meanwhile."""
        most = self._config.decode_steps
        if self._is_near or step_seconds * most > MOST_SECONDS or self._hides_a_round(step_seconds):
            return self._few_steps(step_seconds)
        return most

    @property
    def _is_near(self) -> bool:
        """Whether some sequence is being prefilled, or may be soon."""
        free = len(self.running) < self.max_num_seqs
        found = free and any(self._may_find_pages(one) for one in self.waiting)
        return found or bool(self.of_state(State.PREFILLING))

    def _few_steps(self, step_seconds: float) -> int:
        few = few_steps(self._config.decode_steps)
        half = -(-few // 2)
        return half if step_seconds * half >= LONG_SECONDS else few

    def _hides_a_round(self, step_seconds: float) -> bool:
        return step_seconds * self._few_steps(step_seconds) >= ROUND_SECONDS

    def steps_ahead(self, sequences: list[Sequence], behind: int, step_seconds: float) -> int:
        """How many tokens a dispatch has that is sent before the host knows up to `behind` tokens of its sequences. All
        have pages for them then. 0: it has to wait for those, since they may change what is done next.

        Few, because who comes from now on waits for all of them; who waits already should not.
        """
        steps = self._few_steps(step_seconds)
        if not self._hides_a_round(step_seconds) or self._is_near or sequences != self.of_state(State.DECODING):
            return 0
        if any(one.suspect or one.cancelled for one in sequences):
            return 0
        if all(one.slots(behind) >= one.most_slots for one in sequences):  # none of them needs another token
            return 0
        is_full = any(not self._may_find_pages(one) for one in self.waiting)
        return 0 if is_full or not self._admission.grow_together(sequences, behind + steps) else steps

    def decode_behind(self, prefilled: Several[Sequence], step_seconds: float) -> tuple[list[Sequence], int]:
        """Who decodes behind the next stages of these, and how many tokens, before their first tokens are known. All
        have pages then. Nobody decodes yet if who it is depends on these tokens, or if steps are so short that the host
        is not in the way."""
        steps = self._few_steps(step_seconds)
        going_on = [one for one in prefilled if one.decodes_next]
        together = [one for one in self.sequences if one.state is State.DECODING or one in going_on]
        if not going_on or step_seconds * steps < LONG_SECONDS:
            return [], 0
        if any(one.suspect or one.cancelled or one.output.matcher for one in together):
            return [], 0
        return (together, steps) if self._admission.grow_together(together, 1 + steps) else ([], 0)

    def _grow(self, steps: int) -> None:
        """Take pages for the tokens to come, the oldest first. Where there are none, the youngest makes room.

        If the only one that runs finds none, texts that were frozen since it came have them, and its answer ends here.
        """
        for sequence in self.of_state(State.DECODING):
            while sequence.state is State.DECODING and not self._admission.grow(sequence, steps):
                if self._admission.end_transfers():
                    continue
                if self.running == [sequence]:
                    self._end_here(sequence)
                else:
                    self._preempt(self.running[-1])

    def _end_here(self, sequence: Sequence) -> None:
        sequence.output.cut()
        self._admission.commit(sequence)
        self._admission.finish(sequence, "length")

    def _preempt(self, sequence: Sequence) -> None:
        self._admission.preempt(sequence)
        sequence.blocked_at = self._admission.releases
        self.preemptions += 1

    # Admission ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """In the order of their ranks. A later one passes those that wait for pages, or for what another computes."""
        blocked: list[Sequence] = []
        compared = 0
        for sequence in sorted(self.waiting, key=_place):
            full = len(self.running) >= self.max_num_seqs
            if full or any(older.overtaken >= self._config.max_overtakes for older in blocked):
                return
            if compared >= MOST_COMPARED or len(blocked) == MOST_TRIED:
                return
            if self._admission.is_coming(sequence):
                continue
            if self._may_find_pages(sequence):
                self._admission.accompany(sequence)
            self._admission.renew(sequence)
            offers = self._offers_to(sequence)
            compared += sum(not sequence.wanted.knows(offer) for offer in offers)
            if any(sequence.wanted.shares(offer) for offer in offers):
                continue
            self._try_to_admit(sequence)
            if sequence.state is State.WAITING:
                blocked.append(sequence)
            elif sequence.state is State.PREFILLING:
                for older in blocked:
                    older.overtaken += 1

    def _offers_to(self, sequence: Sequence) -> list[Offer]:
        """What older sequences compute now. It waits for one that shares a long run of its tokens. Each waits for older
        ones only, so the oldest never waits."""
        return [
            other.offer
            for other in self.of_state(State.PREFILLING)
            if _place(other) < _place(sequence)
            and (other.keep or (other.lent is not None and other.lent is sequence.lent))
            and other.namespace == sequence.namespace
            and other.offer is not None
        ]

    def _may_find_pages(self, sequence: Sequence) -> bool:
        return sequence.blocked_at != self._admission.releases

    def _try_to_admit(self, sequence: Sequence) -> None:
        """It is prefilling then, or waits for pages, or has failed."""
        if not self._may_find_pages(sequence) and self.running:
            return
        try:
            sequence.handle = self._admission.remembered(sequence) if sequence.remember else None
            if sequence.handle is not None:
                self._admission.finish(sequence, "length")
                return
            try:
                self._admit_with(sequence, *sequence.to_prefill())
            except NoRoomError:
                raise
            except StoreFullError:
                sequence.blocked_at = self._admission.releases
                if not self.running and self._admission.end_transfers():
                    self._try_to_admit(sequence)  # prefixes that come for others had the pages
                elif not self.running:
                    self._admit_without_donors(sequence)
        except Exception as error:
            self._admission.finish(sequence, "error", error)

    def _admit_without_donors(self, sequence: Sequence) -> None:
        """The sequence has the store to itself, and still there are not enough pages.

        It can only be for what it would copy, since donors stay until they are copied. So it takes a prefix only; or
        nothing, if the page that the prefix ends in is one too many. A text to remember does without company.
        """
        self._admission.go_alone(sequence)
        try:
            self._admit_with(sequence, sequence.tokens, ReuseConfig(method=sequence.exact_method))
        except StoreFullError:
            self._admit_with(sequence, sequence.tokens, ReuseConfig(method="full"))

    def _admit_with(self, sequence: Sequence, tokens: np.ndarray, reuse: ReuseConfig) -> None:
        self._admission.admit(sequence, tokens, sequence.slots(1 + self._config.decode_steps), reuse)
        parts = stages(sequence.plan, sequence.tokens, self.prefill_tokens)
        sequence.start_prefill(parts, self._num_layers)
        self.end_turn(sequence)

    # Prefill ------------------------------------------------------------------------------------------------

    def prefill_batch(self) -> PrefillBatch:
        """Admit who may come in, and say what is prefilled next: nothing, one plan, or some layers of one."""
        self._admit()
        chosen: list[Sequence] = []
        for sequence in sorted(self.of_state(State.PREFILLING), key=lambda one: one.turn):
            if self._fits(sequence, chosen) if chosen else not self._must_wait(sequence):
                chosen.append(sequence)
        return PrefillBatch(chosen, self._layers(chosen[0]) if len(chosen) == 1 and self._is_cut(chosen[0]) else None)

    def end_turn(self, sequence: Sequence) -> None:
        """All others that are being prefilled come before it now."""
        sequence.turn = next(self._turns)

    def _is_cut(self, sequence: Sequence) -> bool:
        return sequence.stages[0].num_rows > self.prefill_tokens

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether its next stage would be a second prefill cut by layers."""
        under_way = (one for one in self.of_state(State.PREFILLING) if one.run is not None)
        return self._is_cut(sequence) and any(one is not sequence for one in under_way)

    def _fits(self, sequence: Sequence, chosen: Several[Sequence]) -> bool:
        """Whether its next stage has the schedule of these, and their plan has room for its rows."""
        if sequence.suspect or chosen[0].suspect or len(chosen) >= self._config.max_prefill_seqs:
            return False
        together = [one.stages[0] for one in (*chosen, sequence)]
        if together[-1].kind != together[0].kind:
            return False
        rows = sum(stage.num_rows for stage in together)
        return rows <= self.prefill_tokens or (rows <= self._max_rows and self._are_one([*chosen, sequence]))

    def _are_one(self, sequences: Several[Sequence]) -> bool:
        """Whether they are of one round, and all layers of their next stages compute no more than a plan may."""
        if not all_of_one(sequences) or any(one.run is not None or self._must_wait(one) for one in sequences):
            return False
        work = sum(token_layers(one.stages[0].phases, self._num_layers) for one in sequences)
        return work <= self.prefill_tokens * self._num_layers

    def _layers(self, sequence: Sequence) -> int:
        """Layers of its stage that cost about as much as a plan of the token budget."""
        stage, first = sequence.stages[0], sequence.run.next_layer if sequence.run else 0
        return layers_within(stage.phases, first, self._num_layers, self.prefill_tokens * self._num_layers)


def _place(sequence: Sequence) -> tuple[float, int]:
    """Its place in line: who has a lower one is admitted first."""
    return sequence.rank, sequence.id
