"""The router: the state of all replicas as one process knows it, and where the next request goes.

What one request goes through:

    ticket = router.route(ask)     # the replica is chosen, and counts the prompt as queued
    router.started(ticket)         # its first token came: the prompt is computed, the sequence runs
    router.done(ticket)            # it ended, however that was

and beside that, whenever a replica tells something:

    router.join("a"); router.apply("a", update); router.report("a", Load(...)); router.leave("a")

Digests are hints. One that is old, or wrong by a hash, makes a request slower and never changes an answer, because the
replica looks itself up what it has. Any thread may call any method.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from jaxtyping import Float64

from sparsex_jax.config.checks import is_int, is_number, require
from sparsex_jax.errors import DigestError, NoReplicaError
from sparsex_jax.routing.digest import Ask
from sparsex_jax.routing.expected import Assumed, Groups
from sparsex_jax.routing.fleet import Fleet, Load
from sparsex_jax.routing.holders import Holders, counted
from sparsex_jax.routing.policy import Policy
from sparsex_jax.routing.updates import Update


class Applied(enum.Enum):
    """What became of an update."""

    APPLIED = "applied"
    OLD = "old"  # it was known already
    GAP = "gap"  # deltas before it are missing, so a snapshot is needed; what is known stays until then


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request's way to a replica.

    Attributes:
      replica: where it goes.
      ask: what is known of it.
      hit_tokens: how many of its tokens the replica is thought to have.
      work: what it costs there, in tokens to compute.
      holder: another replica that is thought to have much more of it. None: there is none.
      is_started: it has its first token.
      is_done: it ended.
    """

    replica: str
    ask: Ask
    hit_tokens: float
    work: float
    holder: str | None = None
    is_started: bool = False
    is_done: bool = False


@dataclasses.dataclass(frozen=True)
class Position:
    """Up to where a replica's updates are known.

    Attributes:
      epoch: of the last update. None: there was none, or some are missing, so a snapshot is needed.
      seq: its number.
    """

    epoch: int | None = None
    seq: int = 0


def _locked[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        router: Any = args[0]
        with router.mutex:
            return method(*args, **kwargs)

    return locked


class Router:
    """Chooses replicas for requests."""

    def __init__(
        self,
        policy: Policy,
        *,
        stale_after_s: float = 10.0,
        assume_s: float = 2.0,
        group_s: float = 60.0,
        holder_tokens: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          stale_after_s: of a replica that was not heard of for so long, nothing is thought to be found.
          assume_s: a prompt is thought to be found where it was sent, until so long after it ended. By then a digest
            says so. 0: only digests count.
          group_s: a group is remembered for so long after its last request.
          holder_tokens: a replica is named as holder of a prompt if it is thought to have so many tokens more than the
            one that was chosen.
          clock: gives the time in seconds.

        Raises:
          InvalidRequestError: a time is negative, or holder_tokens is less than 1.
        """
        for name, value in (("stale_after_s", stale_after_s), ("assume_s", assume_s), ("group_s", group_s)):
            require(is_number(value) and value >= 0, f"{name}={value!r} must be a number >= 0")
        require(
            is_int(holder_tokens) and holder_tokens >= 1, f"holder_tokens={holder_tokens!r} must be an integer >= 1"
        )
        self._holder_tokens = holder_tokens
        self.policy, self.mutex = policy, threading.RLock()
        self._stale_after_s, self._clock = stale_after_s, clock
        self._fleet, self._held = Fleet(), Holders()
        self._assumed, self._groups = Assumed(assume_s), Groups(group_s)
        self._positions: dict[str, Position] = {}
        self._tickets: dict[str, dict[Ticket, None]] = {}

    # Replicas -----------------------------------------------------------------------------------------------

    @_locked
    def join(self, replica: str) -> None:
        """A replica takes requests from now on. Nothing happens if it does already."""
        if replica not in self._fleet.slots:
            self._fleet.join(replica, self._clock())
            self._positions[replica], self._tickets[replica] = Position(), {}

    @_locked
    def leave(self, replica: str) -> list[Ticket]:
        """A replica died, or takes no requests any more.

        Returns:
          The requests that are not done there. They stay open until `done`, which then changes nothing.
        """
        slot = self._fleet.leave(replica)
        if slot is None:
            return []
        self._held.replace(slot, {})
        self._assumed.leave(slot)
        self._groups.leave(replica)
        del self._positions[replica]
        return list(self._tickets.pop(replica))

    @_locked
    def apply(self, replica: str, update: Update) -> Applied:
        """Take over what a replica says that it holds. One that has not joined is ignored, as OLD.

        Raises:
          DigestError: the update contradicts itself.
        """
        if replica not in self._fleet.slots:
            return Applied.OLD
        slot, at = self._fleet.slots[replica], self._positions[replica]
        self._fleet.numbers["heard_s"][slot] = self._clock()
        if at.epoch == update.epoch and update.seq <= at.seq:
            return Applied.OLD
        if not update.whole and (at.epoch != update.epoch or update.seq != at.seq + 1):
            self._positions[replica] = Position()
            return Applied.GAP
        self._take(slot, update)
        self._positions[replica] = Position(update.epoch, update.seq)
        return Applied.APPLIED

    def _take(self, slot: int, update: Update) -> None:
        if update.whole and update.removed:
            raise DigestError("update: a snapshot removes nothing")
        if update.whole:
            self._held.replace(slot, {tag: set(each.tolist()) for tag, each in update.added.items()})
            return
        for tag, samples in update.added.items():
            self._held.add(slot, tag, samples.tolist())
        for tag, samples in update.removed.items():
            self._held.remove(slot, tag, samples.tolist())

    @_locked
    def report(self, replica: str, load: Load) -> None:
        """Take over what a replica says that it has to do. It counts as heard of."""
        if replica in self._fleet.slots:
            slot = self._fleet.slots[replica]
            self._fleet.tell(slot, load)
            self._fleet.numbers["heard_s"][slot] = self._clock()

    @_locked
    def position(self, replica: str) -> Position:
        """Up to where its updates are known, for the replica to go on from there."""
        return self._positions.get(replica, Position())

    @property
    def replicas(self) -> list[str]:
        """Those that take requests, in the order in which they joined."""
        with self.mutex:
            return list(self._fleet.slots)

    @_locked
    def states(self) -> dict[str, dict[str, float]]:
        """Of each replica: samples held, tokens queued, sequences running, requests open, and seconds of silence."""
        queued, running, heard_s = self._fleet.queued(), self._fleet.running(), self._fleet.numbers["heard_s"]
        return {
            name: {
                "samples": self._held.num_held(slot),
                "queued_tokens": float(queued[slot]),
                "running": int(running[slot]),
                "open": len(self._tickets[name]),
                "silent_s": float(self._clock() - heard_s[slot]),
            }
            for name, slot in self._fleet.slots.items()
        }

    # Requests -----------------------------------------------------------------------------------------------

    @_locked
    def route(self, ask: Ask, among: Collection[str] | None = None) -> Ticket:
        """Choose the replica of a request, and count the request there until `done`.

        Args:
          among: only these may be chosen. None: all.

        Raises:
          NoReplicaError: there is none.
        """
        slots = np.array([at for name, at in self._fleet.slots.items() if among is None or name in among], np.int64)
        if len(slots) == 0:
            raise NoReplicaError("no replica takes requests now")
        hits, content = self._hits(ask)
        candidates, together = self._fleet.candidates(slots, hits), self._slot_of_group(ask)
        if together in slots:
            chosen = int(np.flatnonzero(slots == together)[0])
        else:
            chosen = self.policy.choose(ask.num_tokens, candidates, content)
        work = float(self.policy.work(ask.num_tokens, candidates)[chosen])
        chosen_hits = float(candidates.hits[chosen])
        ticket = Ticket(self._fleet.name(int(slots[chosen])), ask, chosen_hits, work, self._holder(hits, chosen_hits))
        self._open(ticket)
        return ticket

    def _holder(self, hits: Float64[np.ndarray, "slots"], chosen_hits: float) -> str | None:
        """The replica that has most, if that is much more than what the chosen one has."""
        most = int(np.argmax(hits))
        return self._fleet.name(most) if hits[most] >= chosen_hits + self._holder_tokens else None

    def _slot_of_group(self, ask: Ask) -> int | None:
        """The replica that has the rest of the group; None if none has."""
        return self._fleet.slots.get(self._groups.replica_of(ask, self._clock()) or "")

    def _hits(self, ask: Ask) -> tuple[Float64[np.ndarray, "slots"], int]:
        """How many tokens each replica is thought to have, and the content by which ties are broken.

        The content is the least sample that nobody has (or the least of all), as in MinHash: two prompts have the same
        with the probability of what they have in common, in whatever order.
        """
        now = self._clock()
        self._assumed.expire(now)
        held, assumed = self._held.of(ask.tag), self._assumed.holders.of(ask.tag)
        samples = ask.samples.tolist()
        found = [held.get(sample, 0) | assumed.get(sample, 0) for sample in samples]
        new = [sample for sample, slots in zip(samples, found, strict=True) if not slots] or samples
        content = int.from_bytes(ask.tag, "little") ^ (min(new) if new else ask.num_tokens)
        numbers = self._fleet.numbers
        counts = counted([slots for slots in found if slots], len(numbers))
        is_fresh = now - numbers["heard_s"] <= self._stale_after_s
        return counts * is_fresh * (ask.num_tokens / max(len(samples), 1)), content

    def _open(self, ticket: Ticket) -> None:
        slot = self._fleet.slots[ticket.replica]
        self._tickets[ticket.replica][ticket] = None
        self._assumed.add(slot, ticket.ask)
        self._groups.use(ticket.ask, ticket.replica, self._clock())
        self._count(ticket, 1)

    def _count(self, ticket: Ticket, step: int) -> None:
        numbers = self._fleet.numbers[self._fleet.slots[ticket.replica]]  # a view
        if ticket.is_started:
            numbers["sent_running"] += step
        else:
            numbers["sent_tokens"] += step * ticket.work

    @_locked
    def started(self, ticket: Ticket) -> None:
        """Its first token came."""
        if ticket.is_done or ticket.is_started or not self._is_open(ticket):
            return
        self._count(ticket, -1)
        ticket.is_started = True
        self._count(ticket, 1)

    def _is_open(self, ticket: Ticket) -> bool:
        """Whether it counts at its replica, which has not left since."""
        return ticket in self._tickets.get(ticket.replica, {})

    @_locked
    def moved(self, ticket: Ticket, replica: str) -> None:
        """It went to another replica than was chosen, because that one was gone. It has no token yet.

        Raises:
          NoReplicaError: that replica takes no requests.
        """
        if ticket.replica == replica or ticket.is_done:
            return
        if replica not in self._fleet.slots:
            raise NoReplicaError(f"replica {replica!r} takes no requests")
        self._close(ticket, None)
        ticket.replica, ticket.hit_tokens, ticket.work = replica, 0.0, float(ticket.ask.num_tokens)
        self._open(ticket)

    @_locked
    def done(self, ticket: Ticket, *, failed: bool = False) -> None:
        """It ended. Idempotent.

        Args:
          failed: nothing of it is thought to be stored.
        """
        if not ticket.is_done:
            ticket.is_done = True
            self._close(ticket, None if failed else self._clock())

    def _close(self, ticket: Ticket, now: float | None) -> None:
        if self._is_open(ticket):
            del self._tickets[ticket.replica][ticket]
            self._assumed.end(self._fleet.slots[ticket.replica], ticket.ask, now)
            self._count(ticket, -1)

    @_locked
    def check(self) -> None:
        """Raise AssertionError unless all parts agree with each other."""
        self._held.check()
        self._assumed.check()
        assert set(self._positions) == set(self._tickets) == set(self._fleet.slots)
        for name, slot in self._fleet.slots.items():
            tickets, numbers = self._tickets[name], self._fleet.numbers[slot]
            assert all(ticket.replica == name and not ticket.is_done for ticket in tickets)
            assert numbers["sent_running"] == sum(ticket.is_started for ticket in tickets)
            waiting = sum(ticket.work for ticket in tickets if not ticket.is_started)
            assert abs(numbers["sent_tokens"] - waiting) < 1e-6 * max(waiting, 1)
        for slot in {*range(len(self._fleet.numbers))} - {*self._fleet.slots.values()}:
            assert self._held.num_held(slot) == 0
            assert not any(self._fleet.numbers[slot].item())
