"""Rounds: members are held until all of their round are there, and then come next to each other in line.

    join --> held --+--all are there-------------------+--> begun: each is admitted as any other sequence
                    +--some member has waited enough---+      |
                                                              +--> over, once all have ended: the id is free again

Who is cancelled or fails leaves its place to another, such as its client's second try. Whoever takes a place after the
round has begun is late: it is not held, and is looked up when it comes.

The members of a round are put in an order that does not depend on who came first, and choose between equal donors by
when those were used before the round began. So two members copy a run that both have from the same donor, and what a
member finds does not depend on those that are looked up before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Int64
from numpy import ndarray

from sparsex_jax.config import Round
from sparsex_jax.config.checks import require
from sparsex_jax.reuse.report import RoundShare

if TYPE_CHECKING:
    from sparsex_jax.cache import PageCache
    from sparsex_jax.scheduler.sequence import Sequence

_APART = 1e-6  # seconds between the ranks of two members


class Member:
    """A prompt's place in a round. The sequences of its answers share it.

    Attributes:
      asked: what its request says of the round.
      sequences: of its answers.
      joined: `time.monotonic()` when the first of these was put in line.
    """

    def __init__(self, asked: Round) -> None:
        self.asked, self.joined = asked, 0.0
        self.sequences: list[Sequence] = []
        self._round: Gathering | None = None

    def join(self, gathering: Gathering, now: float) -> None:
        self._round, self.joined = gathering, now
        gathering.members.append(self)

    @property
    def has_begun(self) -> bool:
        """Whether its round has. From any thread."""
        return self._round is not None and self._round.begun is not None

    @property
    def is_late(self) -> bool:
        """Whether it came after its round had begun."""
        return self._round is not None and self._round.begun is not None and self._round.begun < self.joined

    @property
    def gathering(self) -> Gathering:
        assert self._round is not None, "a member that has not joined has no round"
        return self._round

    @property
    def has_left(self) -> bool:
        """Whether nothing comes of it: it was cancelled or failed."""
        return all(one.cancelled or one.finish_reason in ("cancelled", "error") for one in self.sequences)

    @property
    def has_ended(self) -> bool:
        return self.has_left or all(one.finish_reason is not None for one in self.sequences)

    @property
    def ends_waiting(self) -> float:
        """`time.monotonic()` when it has waited enough."""
        return self.joined + self.asked.wait_ms / 1000

    def share(self) -> RoundShare:
        """What its report says of the round."""
        begun = self.gathering.begun or self.joined
        waited = 0.0 if self.is_late else begun - self.joined
        return RoundShare(self.asked.id, self.asked.size, self.gathering.num_together, self.is_late, waited)


class Gathering:
    """A round of which some member has not ended.

    Attributes:
      size: as its members ask for it.
      members: in the order in which they came, also those that have left.
      begun: `time.monotonic()` when it began. None: its members are held.
      num_together: how many members were there then.
    """

    def __init__(self, size: int) -> None:
        self.size, self.num_together = size, 0
        self.members: list[Member] = []
        self.begun: float | None = None
        self._recency: Int64[ndarray, "pages"] | None = None

    @property
    def there(self) -> list[Member]:
        return [member for member in self.members if not member.has_left]

    @property
    def is_over(self) -> bool:
        return all(member.has_ended for member in self.members)

    @property
    def begins(self) -> float:
        """`time.monotonic()` when it begins at the latest. 0: all are there."""
        there = self.there
        if len(there) >= self.size:
            return 0.0
        return min((member.ends_waiting for member in there), default=0.0)

    def begin(self, now: float) -> None:
        """Its members come next to each other in line, as if each had come with the last of them."""
        together = self.there
        self.begun, self.num_together = now, len(together)
        sequences = [one for member in together for one in member.sequences]
        sequences.sort(key=lambda one: (len(one.prompt), one.keys(one.prompt).tobytes(), one.id))
        last = max((one.rank for one in sequences), default=0.0)
        for number, sequence in enumerate(sequences):
            sequence.rank = last + number * _APART

    def recency(self, cache: PageCache) -> Int64[ndarray, "pages"]:
        """When each page was last used before the first of the round was looked up."""
        if self._recency is None:
            self._recency = cache.last_used()
        return self._recency


class Begun(NamedTuple):
    """How many rounds began, with all of their members and with some."""

    complete: int
    cut_short: int


class Rounds:
    """The rounds of one loop. Its callers see to it that one thread at a time is in it.

    Attributes:
      holds: whether members are held. Where nobody comes any more, rounds begin with those that are there.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
          most: members that a round may have.
        """
        self._most, self.holds = most, True
        self._rounds: dict[tuple[str, str], Gathering] = {}
        self._held: list[Gathering] = []

    def join(self, sequence: Sequence) -> None:
        """Take a sequence that is put in line into its round, if it names one.

        Raises:
          InvalidRequestError: the round has another size, or has all its members.
        """
        member = sequence.member
        if member is None:
            return
        if not member.sequences:
            member.join(self._round_for(sequence.namespace, member.asked), time.monotonic())
        member.sequences.append(sequence)

    def _round_for(self, namespace: str, asked: Round) -> Gathering:
        require(asked.size <= self._most, f"round.size={asked.size} must be at most {self._most}, max_num_seqs")
        name = namespace, asked.id
        known = self._rounds.get(name)
        if known is None or known.is_over:
            self._forget_those_that_are_over()
            known = self._rounds[name] = Gathering(asked.size)
            self._held.append(known)
        same = f"round.size={asked.size} must be {known.size}, as the other members of round {asked.id!r:.60} have it"
        require(asked.size == known.size, same)
        full = f"round.id={asked.id!r:.60} has all its {known.size} members; it is free again once they have ended"
        require(len(known.there) < known.size, full)
        return known

    def _forget_those_that_are_over(self) -> None:
        self._rounds = {name: each for name, each in self._rounds.items() if not each.is_over}

    def begin(self) -> Begun:
        """Begin those whose members are all there, or have waited enough. Returns how many did."""
        now = time.monotonic()
        ready = [each for each in self._held if not self.holds or each.begins <= now]
        self._held = [each for each in self._held if each not in ready]
        for each in ready:
            each.begin(now)
        began = [each for each in ready if each.num_together]  # else all its members have left
        complete = sum(each.num_together == each.size for each in began)
        return Begun(complete, len(began) - complete)

    @property
    def num_held(self) -> int:
        """Sequences that wait for others of their round."""
        return sum(len(member.sequences) for each in self._held for member in each.there)

    def seconds_to_next(self) -> float | None:
        """Until one begins that is held now, if nobody comes. None: none is held."""
        now = time.monotonic() if self.holds else math.inf
        return min((max(each.begins - now, 0.0) for each in self._held), default=None)


def all_of_one(sequences: Iterable[Sequence]) -> bool:
    """Whether sequences are members of one round, none of them late."""
    rounds = {one.member.gathering if one.member and not one.member.is_late else None for one in sequences}
    return len(rounds) == 1 and None not in rounds
