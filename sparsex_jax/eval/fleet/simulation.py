"""The events of a fleet: prompts arrive at routers, replicas compute, digests travel, replicas die and come back.

    arrival --> router --> replica: rounds --> first token, end --> router
                  ^                    |
                  +--- digest, load ---+   every `digest_s`, `latency_s` later

A digest that does not follow on what the router knows makes it ask for all that the replica holds. A replica that dies
fails what it has; routers learn of it `detect_s` later, and until then what they send there fails too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.eval.fleet.policies import Dispatcher, Make, samples_of, tag_of, tenant_of
from sparsex_jax.eval.fleet.replica import NEVER, Outcome, Replica, ReplicaConfig
from sparsex_jax.eval.fleet.store import Peers
from sparsex_jax.eval.fleet.timing import Timing
from sparsex_jax.eval.fleet.traffic import Prompt
from sparsex_jax.routing import Applied, Holdings, Load, Update


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """A fleet.

    Attributes:
      replicas: how many.
      replica: each of them.
      routers: processes that route, each with a share of the prompts.
      digest_s: seconds between two digests of a replica. None: there are none.
      every: one window in so many is in digests.
      latency_s: a digest's way to the routers.
      deaths: when which replica dies.
      detect_s: seconds until routers know that one died.
      restart_s: seconds until it takes requests again, with nothing stored.
    """

    replicas: int
    replica: ReplicaConfig = dataclasses.field(default_factory=ReplicaConfig)
    routers: int = 1
    digest_s: float | None = 1.0
    every: int = 64
    latency_s: float = 0.005
    deaths: tuple[tuple[float, int], ...] = ()
    detect_s: float = 1.0
    restart_s: float = 90.0

    def __post_init__(self) -> None:
        require(self.replicas >= 1, f"replicas={self.replicas} must be at least 1")
        require(self.routers >= 1, f"routers={self.routers} must be at least 1")
        require(self.digest_s is None or self.digest_s > 0, f"digest_s={self.digest_s} must be more than 0, or None")
        for _, replica in self.deaths:
            require(0 <= replica < self.replicas, f"deaths: replica {replica} must be from 0 to {self.replicas - 1}")


@dataclasses.dataclass
class Run:
    """What a simulation gave.

    Attributes:
      outcomes: of all requests, in the order in which they ended.
      seconds: from the first arrival to the last end, in the simulation.
      busy: seconds that each replica computed.
      loaded_bytes: over each of a replica's links, all replicas together.
      digest_bytes: that each router got, one router's.
      snapshot_bytes: those of them that told all that a replica holds.
      samples: in the digests of all replicas, in the end.
      route_seconds, digest_seconds: of this machine's processor, that routing requests and taking in digests took, all
        routers together.
      cpu_seconds: of this machine's processor, that the simulation took.
      events: that it consisted of.
    """

    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    busy: list[float] = dataclasses.field(default_factory=list)
    loaded_bytes: list[float] = dataclasses.field(default_factory=list)
    digest_bytes: int = 0
    snapshot_bytes: int = 0
    samples: int = 0
    route_seconds: float = 0.0
    digest_seconds: float = 0.0
    cpu_seconds: float = 0.0
    events: int = 0


class Simulation:
    """One run of a fleet.

    Attributes:
      now: seconds since the beginning.
      replicas: by number; None where one is dead.
    """

    def __init__(self, config: FleetConfig, timing: Timing, make: Make) -> None:
        """
        Args:
          make: makes a dispatcher, for each router one.
        """
        self.config, self.now, self._timing = config, 0.0, timing
        self._run = Run(busy=[0.0] * config.replicas, loaded_bytes=[0.0] * len(config.replica.links))
        self._peers = Peers() if config.replica.network else None
        self.replicas: list[Replica | None] = [None] * config.replicas
        self._holdings = [Holdings() for _ in self.replicas]
        self._routers: list[Dispatcher] = [make(lambda: self.now) for _ in range(config.routers)]
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._due = [NEVER] * config.replicas  # the event that is in line for each replica's round
        self._count = self._arrived = 0
        for number in range(config.replicas):
            self._start(number)
        for when, number in config.deaths:
            self._at(when, self._die, number)

    def run(self, prompts: Iterator[Prompt]) -> Run:
        """Until all of these rising prompts have ended."""
        run, began = self._run, time.thread_time()
        coming = next(prompts, None)
        while coming or self._arrived > len(run.outcomes):
            if coming and (not self._events or coming.due <= self._events[0][0]):
                self.now = coming.due
                self._arrive(coming)
                coming = next(prompts, None)
            else:
                self.now, _, handle, about = heapq.heappop(self._events)
                handle(about)
            run.events += 1
        run.seconds = max((outcome.end for outcome in run.outcomes), default=0.0)
        for replica in self.replicas:
            self._account(replica)
        run.samples = sum(holdings.num_samples for holdings in self._holdings)
        run.cpu_seconds = time.thread_time() - began
        return run

    @contextlib.contextmanager
    def _timed(self, field: str) -> Iterator[None]:
        """Add the processor's time to a field of the run."""
        began = time.thread_time()
        yield
        setattr(self._run, field, getattr(self._run, field) + time.thread_time() - began)

    def _at(self, when: float, handle: Callable[[Any], None], about: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, handle, about))

    # Requests -------------------------------------------------------------------------------------------------

    def _arrive(self, prompt: Prompt) -> None:
        self._arrived += 1
        with self._timed("route_seconds"):
            number = self._router(prompt.number).route(prompt)
        replica = self.replicas[number] if number is not None else None
        if replica is None:
            self._fail(prompt, -1 if number is None else number)
            return
        replica.submit(prompt, self.now)
        self._schedule(replica)

    def _router(self, number: int) -> Dispatcher:
        return self._routers[number % len(self._routers)]

    def _fail(self, prompt: Prompt, number: int) -> None:
        about = prompt.number, prompt.due, prompt.tenant, prompt.tokens, prompt.answer.tokens, number
        self._done(Outcome(*about, self.now, self.now, True, 0, 0, 0, 0.0))

    def _first(self, number: int) -> None:
        with self._timed("route_seconds"):
            self._router(number).started(number)

    def _done(self, outcome: Outcome) -> None:
        self._run.outcomes.append(outcome)
        with self._timed("route_seconds"):
            self._router(outcome.number).done(outcome.number, failed=outcome.failed)

    # Replicas -------------------------------------------------------------------------------------------------

    def _schedule(self, replica: Replica) -> None:
        due = replica.next_time
        if due != self._due[replica.number]:
            self._due[replica.number] = due
            if due < NEVER:
                self._at(due, self._wake, replica)

    def _wake(self, replica: Replica) -> None:
        """End a round, unless it was put off or its replica died since."""
        if replica.next_time == self.now and self.replicas[replica.number] is replica:
            self._due[replica.number] = NEVER
            replica.wake(self.now)
            self._schedule(replica)

    def _start(self, number: int) -> None:
        """A replica with nothing stored takes requests from now on."""
        about = number, self.config.replica, self._timing
        self.replicas[number] = Replica(*about, self._done, self._first, self._peers)
        self._holdings[number], self._due[number] = Holdings(), NEVER
        for router in self._routers:
            router.join(number)
        if self.config.digest_s is not None:
            share = (number + 1) / self.config.replicas  # they do not all tell at once
            self._at(self.now + share * self.config.digest_s, self._publish, self.replicas[number])

    def _die(self, number: int) -> None:
        replica = self.replicas[number]
        if replica is None:
            return
        self._account(replica)
        self.replicas[number] = None
        replica.die(self.now)
        self._at(self.now + self.config.detect_s, self._leave, number)
        self._at(self.now + max(self.config.restart_s, self.config.detect_s), self._start, number)

    def _leave(self, number: int) -> None:
        for router in self._routers:
            router.leave(number)

    def _account(self, replica: Replica | None) -> None:
        if replica is not None:
            self._run.busy[replica.number] += replica.busy
            for index, nbytes in enumerate(replica.loaded_bytes):
                self._run.loaded_bytes[index] += nbytes

    # Digests --------------------------------------------------------------------------------------------------

    def _publish(self, replica: Replica) -> None:
        """A replica tells what changed, and will again."""
        number = replica.number
        if self.replicas[number] is not replica:
            return
        holdings, every = self._holdings[number], self.config.every
        for key, (segment, is_found) in replica.store.take_changes().items():
            samples, tag = samples_of(key, segment.tokens, every).tolist(), tag_of(tenant_of(segment))
            (holdings.add if is_found else holdings.remove)(tag, samples)
        update = holdings.delta()
        self._run.digest_bytes += len(update.to_bytes()) if update else 0
        load = Load(replica.queued_tokens, replica.running)
        self._at(self.now + self.config.latency_s, self._tell, (replica, update, load))
        assert self.config.digest_s is not None
        self._at(self.now + self.config.digest_s, self._publish, replica)

    def _tell(self, about: tuple[Replica, Update | None, Load]) -> None:
        """Routers hear of it. One that misses something asks for all of it."""
        replica, update, load = about
        if self.replicas[replica.number] is not replica:
            return
        with self._timed("digest_seconds"):
            gaps = [router for router in self._routers if router.told(replica.number, update, load) is Applied.GAP]
        if gaps:
            whole = self._holdings[replica.number].snapshot()
            self._run.snapshot_bytes += len(whole.to_bytes())
            for router in gaps:
                self._at(self.now + 2 * self.config.latency_s, self._tell_whole, (replica, router, whole, load))

    def _tell_whole(self, about: tuple[Replica, Dispatcher, Update, Load]) -> None:
        replica, router, whole, load = about
        if self.replicas[replica.number] is replica:
            with self._timed("digest_seconds"):
                router.told(replica.number, whole, load)
