"""Where a prompt goes: simple policies to compare with, and the router of `sparsex_jax.routing` itself.

Each router process of a fleet has one dispatcher, which knows only what went through it and what replicas told it.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect
from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import UInt32

from sparsex_jax.cache.windows import mix
from sparsex_jax.errors import NoReplicaError
from sparsex_jax.eval.fleet.store import chain_of
from sparsex_jax.eval.fleet.traffic import TENANT_KEYS, Prompt, Segment
from sparsex_jax.routing import Applied, Ask, Load, Policy, Router, SegmentPolicy, Ticket, Update

_PREFIX = 512  # tokens of a prompt by which consistent hashing tells prompts apart
_RUNNING = 64  # tokens that a running sequence counts for
_POINTS = 64  # of each replica on the ring
_BOUND = 1.25  # a replica takes at most this many times the mean load


class Dispatcher(Protocol):
    """One router process."""

    def join(self, replica: int) -> None:
        """A replica takes requests from now on."""

    def leave(self, replica: int) -> None:
        """It takes none any more."""

    def route(self, prompt: Prompt) -> int | None:
        """The replica of a prompt. None: there is none."""

    def started(self, number: int) -> None:
        """The first token of the prompt with this number came."""

    def done(self, number: int, *, failed: bool) -> None:
        """A request ended. One that is not known is ignored."""

    def told(self, replica: int, update: Update | None, load: Load) -> Applied:
        """A replica tells what it holds (None: nothing new) and has to do."""


class Counting:
    """Knows how many tokens are to be computed at each replica, of those that went through it. Policies choose by that.

    Tokens of a prompt count until its first token comes, and a running sequence as few, as in `SegmentPolicy`.
    """

    def __init__(self) -> None:
        self._alive: list[int] = []
        self._open: dict[int, int] = {}  # tokens by replica
        self._sent: dict[int, tuple[int, int]] = {}  # replica and what it counts for, by prompt

    def join(self, replica: int) -> None:
        if replica not in self._open:
            self._alive.append(replica)
            self._open[replica] = 0

    def leave(self, replica: int) -> None:
        if self._open.pop(replica, None) is not None:
            self._alive.remove(replica)

    def route(self, prompt: Prompt) -> int | None:
        if not self._alive:
            return None
        replica = self.choose(prompt)
        self._count(prompt.number, replica, prompt.tokens)
        return replica

    def choose(self, prompt: Prompt) -> int:
        """One of those that take requests."""
        raise NotImplementedError

    def started(self, number: int) -> None:
        replica = self._sent[number][0] if number in self._sent else -1
        self.done(number, failed=False)
        if replica in self._open:
            self._count(number, replica, _RUNNING)

    def done(self, number: int, *, failed: bool) -> None:
        replica, tokens = self._sent.pop(number, (-1, 0))
        if replica in self._open:
            self._open[replica] -= tokens

    def told(self, replica: int, update: Update | None, load: Load) -> Applied:
        return Applied.APPLIED

    def least(self) -> int:
        """The replica with the fewest open tokens, the first of them."""
        return min(self._alive, key=self._open.__getitem__)

    def _count(self, number: int, replica: int, tokens: int) -> None:
        self._open[replica] += tokens
        self._sent[number] = replica, tokens


class RoundRobin(Counting):
    """One replica after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def choose(self, prompt: Prompt) -> int:
        self._next += 1
        return self._alive[self._next % len(self._alive)]


class LeastLoaded(Counting):
    """The replica with the fewest tokens of prompts open."""

    def choose(self, prompt: Prompt) -> int:
        return self.least()


class SessionAffinity(Counting):
    """A session stays where its first prompt went, which was the least loaded replica then."""

    def __init__(self) -> None:
        super().__init__()
        self._homes: dict[int, int] = {}

    def choose(self, prompt: Prompt) -> int:
        home = self._homes.get(prompt.session)
        if home not in self._open:
            home = self._homes[prompt.session] = self.least()
        return home


class PrefixHash(Counting):
    """Consistent hashing of a prompt's first tokens, with bounded loads.

    Replicas are points on a ring (Karger et al., 1997). A prompt goes to the first one behind its own point that has at
    most 1.25 times the mean load, this prompt counted (Mirrokni, Thorup and Zadimoghaddam, 2018).
    """

    def __init__(self) -> None:
        super().__init__()
        self._ring: list[tuple[int, int]] = []
        self._is_sorted = True

    def join(self, replica: int) -> None:
        if replica not in self._open:
            points = mix(np.arange(_POINTS, dtype=np.uint64) + np.uint64(replica * _POINTS)).tolist()
            self._ring += ((point, replica) for point in points)
            self._is_sorted = False
        super().join(replica)

    def leave(self, replica: int) -> None:
        self._ring = [point for point in self._ring if point[1] != replica]
        super().leave(replica)

    def choose(self, prompt: Prompt) -> int:
        if not self._is_sorted:
            self._ring.sort()
            self._is_sorted = True
        at = bisect(self._ring, (_hash(_beginning(prompt)), -1))
        most = _BOUND * (sum(self._open.values()) + prompt.tokens) / len(self._alive)
        for step in range(len(self._ring)):
            _, replica = self._ring[(at + step) % len(self._ring)]
            if self._open[replica] <= most:
                return replica
        return self.least()


def _beginning(prompt: Prompt) -> int:
    """The node of the first segment that reaches `_PREFIX` tokens, or of the last but one."""
    reached = itertools.accumulate(segment.tokens for segment in prompt.segments[:-1])
    short = sum(tokens < _PREFIX for tokens in reached)
    return chain_of(prompt.segments)[min(short, max(len(prompt.segments) - 2, 0))]


def _hash(value: int) -> int:
    return int(mix(np.array([value % 2**64], np.uint64))[0])


class Routed:
    """The router that serves, driven by the simulator's clock.

    Attributes:
      router: of `sparsex_jax.routing`.
    """

    def __init__(self, router: Router, every: int, *, segments: bool) -> None:
        """
        Args:
          every: one window in so many is in digests.
          segments: whether digests are of segments, or of chains, as where only prefixes are found.
        """
        self.router, self._every, self._segments = router, every, segments
        self._tickets: dict[int, Ticket] = {}

    def join(self, replica: int) -> None:
        self.router.join(str(replica))

    def leave(self, replica: int) -> None:
        self.router.leave(str(replica))

    def route(self, prompt: Prompt) -> int | None:
        try:
            ticket = self.router.route(ask_of(prompt, self._every, segments=self._segments))
        except NoReplicaError:
            return None
        self._tickets[prompt.number] = ticket
        return int(ticket.replica)

    def started(self, number: int) -> None:
        if number in self._tickets:
            self.router.started(self._tickets[number])

    def done(self, number: int, *, failed: bool) -> None:
        if number in self._tickets:
            self.router.done(self._tickets.pop(number), failed=failed)

    def told(self, replica: int, update: Update | None, load: Load) -> Applied:
        self.router.report(str(replica), load)
        return Applied.APPLIED if update is None else self.router.apply(str(replica), update)


def tag_of(tenant: int) -> bytes:
    """What stands for a tenant's namespace."""
    return tenant.to_bytes(8, "little")


def tenant_of(segment: Segment) -> int:
    """Whose text it is."""
    return segment.key // TENANT_KEYS


@functools.lru_cache(maxsize=1 << 18)
def samples_of(key: int, tokens: int, every: int) -> UInt32[np.ndarray, "samples"]:
    """The sample of a text: about one number for every so many tokens, the same wherever it stands."""
    number = (tokens + _hash(key) % every) // every
    seed = np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
    return (mix(np.arange(number, dtype=np.uint64) + seed) >> np.uint64(32)).astype(np.uint32)


def ask_of(prompt: Prompt, every: int, *, segments: bool) -> Ask:
    """What a router knows of a prompt."""
    keys = [segment.key for segment in prompt.segments] if segments else chain_of(prompt.segments)
    samples = [samples_of(key, segment.tokens, every) for key, segment in zip(keys, prompt.segments, strict=True)]
    return Ask(tag_of(prompt.tenant), np.concatenate(samples), prompt.tokens)


Make = Callable[[Callable[[], float]], Dispatcher]


def routed(
    every: int = 64,
    *,
    segments: bool = True,
    policy: Policy = SegmentPolicy(),  # noqa: B008  it is frozen
    stale_after_s: float = 10.0,
    assume_s: float = 2.0,
) -> Make:
    """Makes the router that serves, by a clock. Arguments as `Router` and `Routed`."""

    def make(clock: Callable[[], float]) -> Dispatcher:
        router = Router(policy, stale_after_s=stale_after_s, assume_s=assume_s, clock=clock)
        return Routed(router, every, segments=segments)

    return make


SIMPLE: dict[str, Make] = {
    "round robin": lambda clock: RoundRobin(),
    "least loaded": lambda clock: LeastLoaded(),
    "session affinity": lambda clock: SessionAffinity(),
    "prefix hash": lambda clock: PrefixHash(),
}
