"""A replica's serving loop, round by round, as `sparsex_jax.scheduler.policy` has it.

A round is a few decode steps of all that run and one prefill plan of those whose turn it is, within the token budget:

    round      | 4 steps, plan of a b | 4 steps, plan of c, part 1 | 4 steps, plan of c, part 2 | steps until one ends |
    prefilled            a b                                                    c

Where nobody is being prefilled or loaded, a round goes on until a sequence ends; who arrives meanwhile waits for the
end of a dispatch of 16 steps. A prompt is admitted when there is room for it and its answer. It waits for another that
computes a long run of what it would compute too, and for what comes from host memory or disk.

Left out are preemption (room for the answer is taken at once), page sizes, the limit of 8 prompts a plan, layers that
are computed while others are loaded, and what the host does.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from sparsex_jax.config.checks import require
from sparsex_jax.eval.fleet.store import Found, Peers, Store, TierConfig, chain_of
from sparsex_jax.eval.fleet.timing import Timing, Work
from sparsex_jax.eval.fleet.traffic import Prompt

FEW_STEPS = 4  # decode steps of a round in which somebody is prefilled or loaded
DISPATCH = 16  # of a dispatch at most
_TRIED = 16  # who waits, that a round looks at
_LONG_RUN = 256  # tokens that another computes, for which it is worth waiting
NEVER = float("inf")


@dataclasses.dataclass(frozen=True)
class ReplicaConfig:
    """One replica.

    Attributes:
      store_tokens: that its device holds.
      tiers: below it, the fastest first.
      network: bytes a second at which it fetches what other replicas hold. None: it does not.
      max_running: sequences that are admitted at a time.
    """

    store_tokens: int = 400_000
    tiers: tuple[TierConfig, ...] = ()
    network: float | None = None
    max_running: int = 64

    def __post_init__(self) -> None:
        require(self.network is None or self.network > 0, f"network={self.network} must be more than 0, or None")
        require(self.max_running >= 1, f"max_running={self.max_running} must be at least 1")

    @property
    def links(self) -> tuple[float, ...]:
        """Bytes a second from each tier, and last, if that is possible, from other replicas."""
        return (*(tier.bytes_per_s for tier in self.tiers), *([self.network] if self.network else []))


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
      number, due, tenant, tokens: of the prompt.
      answer: tokens that were asked for.
      replica: where it went; -1: there was none.
      first, end: when its first token came, and its last one. Of one that failed, both are when it failed.
      failed: whether it got an error.
      prefix, reused, loaded: tokens that were found, as in `Found`; loaded are those of all tiers.
      computed: token-layers, as tokens that go through all layers.
    """

    number: int
    due: float
    tenant: int
    tokens: int
    answer: int
    replica: int
    first: float
    end: float
    failed: bool
    prefix: int
    reused: int
    loaded: int
    computed: float


class Job:
    """A prompt on its way through a replica."""

    __slots__ = ("chain", "first", "found", "missing", "pinned", "prompt", "reserved", "stages", "work")

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.chain = chain_of((*prompt.segments, prompt.answer))
        self.found = Found(0, 0, 0, prompt.tokens, (), 0.0, 0.0)
        self.stages: list[Work] = []
        self.missing: dict[int, int] = {}
        self.pinned = self.reserved = 0
        self.work = self.first = 0.0


class Replica:
    """The serving loop. Its caller calls `submit` when a request arrives, and `wake` when `next_time` has come.

    Attributes:
      number: its place in the fleet.
      store: what it has stored.
      next_time: when its round ends; `NEVER` if it has nothing to do.
      busy: seconds that it has computed.
      loaded_bytes: over each of `ReplicaConfig.links`.
    """

    def __init__(
        self,
        number: int,
        config: ReplicaConfig,
        timing: Timing,
        done: Callable[[Outcome], None],
        first: Callable[[int], None] = lambda number: None,
        peers: Peers | None = None,
    ) -> None:
        """
        Args:
          done: is told what became of each request, at the time when it ends.
          first: is told the number of each prompt whose first token came.
          peers: of the fleet, if there is a network.
        """
        self.number, self.config, self.timing, self._done, self._first = number, config, timing, done, first
        self.store = Store(config.store_tokens, config.tiers, segments=timing.method.segments, peers=peers)
        self.next_time, self.busy = NEVER, 0.0
        self.loaded_bytes = [0.0] * len(config.links)
        self._links = [0.0] * len(config.links)  # when each has done what it was asked
        self._waiting: deque[Job] = deque()
        self._loading: list[tuple[float, int, Job]] = []
        self._prefilling: deque[Job] = deque()
        self._running: list[tuple[int, int, Job]] = []  # by the step at which each ends
        self._computing: Counter[int] = Counter()  # keys that are being computed
        self._steps = self._context = 0
        self._began, self._plan, self._plan_steps = 0.0, list[Job](), 0

    @property
    def queued_tokens(self) -> float:
        """Of prompts that wait or are prefilled, as far as is known."""
        ahead = sum(job.prompt.tokens for job in self._waiting) + sum(job.found.fresh for _, _, job in self._loading)
        return ahead + sum(sum(stage.behind for stage in job.stages) for job in self._prefilling)

    @property
    def running(self) -> int:
        """Sequences that decode."""
        return len(self._running)

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._loading) + len(self._prefilling) + len(self._running)

    @property
    def reserved(self) -> int:
        """Tokens of the store that are reserved and not yet nodes."""
        jobs = [*(job for _, _, job in self._loading), *self._prefilling, *(job for _, _, job in self._running)]
        return sum(job.reserved for job in jobs)

    def submit(self, prompt: Prompt, now: float) -> None:
        """Take a request. One that can never fit fails at once."""
        if prompt.tokens + prompt.answer.tokens > self.config.store_tokens:
            self._done(self._outcome(Job(prompt), now, now, failed=True))
            return
        self._waiting.append(Job(prompt))
        if not self._plan and not self._running:
            self._begin(now)
        elif not self._plan:
            self._cut_short(now)

    def wake(self, now: float) -> None:
        """End the round, and begin the next."""
        self._end(now)
        self._begin(now)

    def die(self, now: float) -> None:
        """Fail all requests, and lose all that is stored."""
        self.store.leave()
        jobs = [*self._waiting, *(job for _, _, job in self._loading), *self._prefilling]
        jobs += [job for _, _, job in sorted(self._running)]
        for job in jobs:
            self._done(self._outcome(job, now, now, failed=True))
        self._waiting, self._loading, self._prefilling, self._running = deque(), [], deque(), []
        self.next_time = NEVER

    # Rounds ---------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        """Admit who may come in, and begin a round."""
        while self._loading and self._loading[0][0] <= now:
            self._prefilling.append(heapq.heappop(self._loading)[2])
        self._admit(now)
        self._plan, self._began = self._choose(), now
        most = FEW_STEPS if self._plan or self._loading else NEVER
        self._plan_steps = int(min(most, self._running[0][0] - self._steps)) if self._running else 0
        seconds = self._seconds(self._plan_steps)
        if self._plan:
            seconds += self.timing.plan_seconds([job.stages[0] for job in self._plan])
        self.next_time = now + seconds if seconds else self._loading[0][0] if self._loading else NEVER

    def _seconds(self, steps: int) -> float:
        return self.timing.decode_seconds(steps, len(self._running), self._context)

    def _cut_short(self, now: float) -> None:
        """End a round of decode steps with the dispatch that is under way."""
        for steps in range(DISPATCH, self._plan_steps, DISPATCH):
            if (end := self._began + self._seconds(steps)) >= now:
                self._plan_steps, self.next_time = steps, min(end, self.next_time)
                return

    def _choose(self) -> list[Job]:
        """Whose next stages are one plan, the first in line first."""
        chosen, rows = list[Job](), 0.0
        for job in self._prefilling:
            stage = job.stages[0]
            if chosen and (rows + stage.before > self.timing.budget or stage.sparse != chosen[0].stages[0].sparse):
                break
            chosen.append(job)
            rows += stage.before
        return chosen

    def _end(self, now: float) -> None:
        self.busy += now - self._began if self._plan or self._plan_steps else 0.0
        self._steps += self._plan_steps
        self._context += self._plan_steps * len(self._running)
        while self._running and self._running[0][0] <= self._steps:
            self._finish(heapq.heappop(self._running)[2], now)
        for job in self._plan:
            self._prefilling.popleft()
            job.stages.pop(0)
        for job in self._plan:
            if job.stages:
                self._prefilling.append(job)
            else:
                self._answer(job, now)
        self._plan, self._plan_steps = [], 0

    # A prompt -------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """In the order of arrival. Who waits for room or for others is passed by a few."""
        passed, room = [], self.config.max_running - self.open + len(self._waiting)
        for _ in range(min(_TRIED, len(self._waiting))):
            if room <= 0:
                break
            job = self._waiting.popleft()
            if self._try(job, now):
                room -= 1
            else:
                passed.append(job)
        self._waiting.extendleft(reversed(passed))

    def _try(self, job: Job, now: float) -> bool:
        prompt, store = job.prompt, self.store
        found = store.find(prompt.segments, job.chain)
        missing = self._missing(job, found)
        if (self._prefilling or self._loading) and self._waits_for_others(missing):
            return False
        found = self._worth_loading(job, found, now)
        job.pinned = store.pin(job.chain[:-1])
        here = sum(segment.tokens for segment in prompt.segments[: job.pinned])
        need = prompt.tokens - here + prompt.answer.tokens
        if not store.reserve(need):
            store.unpin(job.chain[: job.pinned])
            return False
        job.reserved, job.found, job.missing = need, found, missing
        self._computing.update(missing.keys())
        job.stages = self.timing.stages(found)
        job.work = self.timing.computed_tokens(found)
        self._load(job, now)
        return True

    def _missing(self, job: Job, found: Found) -> dict[int, int]:
        """What it computes, but for its last segment: tokens by key."""
        if not found.fresh:
            return {}
        has, key = self.store.has, self.store.key
        pairs = zip(job.prompt.segments[:-1], job.chain, strict=False)
        return {key(node, segment): segment.tokens for segment, node in pairs if not has(node, segment)}

    def _waits_for_others(self, missing: Mapping[int, int]) -> bool:
        """Whether others compute a long run of it."""
        return sum(tokens for key, tokens in missing.items() if self._computing[key] > 0) >= _LONG_RUN

    def _worth_loading(self, job: Job, found: Found, now: float) -> Found:
        """What was found, or what is on the device alone if loading the rest takes longer than computing it."""
        if not any(found.loaded):
            return found
        without = self.store.find(job.prompt.segments, job.chain, below=False)
        saved = self.timing.alone_seconds(without) - self.timing.alone_seconds(found)
        return found if self._loaded_at(found, now) - now < saved else without

    def _loaded_at(self, found: Found, now: float) -> float:
        """When all that is to be loaded would be there."""
        times = [
            max(link, now) + tokens * self.timing.token_bytes / bytes_per_s
            for link, tokens, bytes_per_s in zip(self._links, found.loaded, self.config.links, strict=False)
            if tokens
        ]
        return max(times, default=now)

    def _load(self, job: Job, now: float) -> None:
        ready = self._loaded_at(job.found, now)
        for index, tokens in enumerate(job.found.loaded):
            if tokens:
                self._use_link(index, tokens * self.timing.token_bytes, now)
        if ready > now:
            heapq.heappush(self._loading, (ready, job.prompt.number, job))
        else:
            self._prefilling.append(job)

    def _use_link(self, index: int, nbytes: int, now: float) -> None:
        """Load over a link, behind what is being loaded from there."""
        self.loaded_bytes[index] += nbytes
        self._links[index] = max(self._links[index], now) + nbytes / self.config.links[index]

    def _computed(self, keys: Iterable[int]) -> None:
        """These are being computed by one prompt fewer."""
        for key in keys:
            self._computing[key] -= 1
            if not self._computing[key]:
                del self._computing[key]

    def _answer(self, job: Job, now: float) -> None:
        """The first token came: all of the prompt can be found, and the sequence runs."""
        self._computed(job.missing)
        job.first = now
        segments = job.prompt.segments
        new = sum(segment.tokens for segment in segments[job.pinned :])
        self.store.commit(segments, job.chain[:-1], job.pinned)
        job.pinned, job.reserved = len(segments), job.reserved - new
        self._first(job.prompt.number)
        if job.prompt.answer.tokens == 1:
            self._finish(job, now, ran=False)
            return
        heapq.heappush(self._running, (self._steps + job.prompt.answer.tokens - 1, job.prompt.number, job))
        self._context += job.prompt.tokens + 1

    def _finish(self, job: Job, now: float, *, ran: bool = True) -> None:
        prompt = job.prompt
        self._context -= prompt.tokens + prompt.answer.tokens if ran else 0
        self.store.commit((*prompt.segments, prompt.answer), job.chain, job.pinned)
        self.store.unpin(job.chain)
        self._done(self._outcome(job, job.first, now, failed=False))

    def _outcome(self, job: Job, first: float, end: float, *, failed: bool) -> Outcome:
        prompt, found = job.prompt, job.found
        about = prompt.number, prompt.due, prompt.tenant, prompt.tokens, prompt.answer.tokens, self.number
        return Outcome(*about, first, end, failed, found.prefix, found.reused, sum(found.loaded), job.work)
