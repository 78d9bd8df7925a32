"""Prompts of many tenants at the times when they arrive, each a row of segments.

A segment is a text: a key that is the same wherever the text comes back, and its length. The arrivals are an open loop:
they do not wait for answers, so the same seed gives every policy the same prompts at the same times.

    chat     [system | question, answer, question, answer, ... | question]
    rag      [system | documents by rank, in an order of their own | question]
    agents   [system | the agent's own text | everybody's texts so far, in an order of its own | question]
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from sparsex_jax.config.checks import require

TENANT_KEYS = 1 << 40  # of one tenant; the tenant of a key is the key divided by it


class Segment(NamedTuple):
    """A text.

    Attributes:
      key: the same wherever this tenant uses the text, and of no other text.
      tokens: its length.
    """

    key: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A request.

    Attributes:
      number: its place in the order of arrival, from 0.
      due: when it arrives, in seconds.
      tenant: whose namespace it is in. Nothing is shared between tenants.
      session: the conversation, or the group of agents, that it is of.
      segments: its texts in order.
      answer: what will be generated.
      tokens: of all segments.
    """

    number: int
    due: float
    tenant: int
    session: int
    segments: tuple[Segment, ...]
    answer: Segment
    tokens: int


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """When sessions begin: a Poisson process whose rate may change.

    Attributes:
      rate: sessions a second, on average.
      burst: how many times the rate a burst has; 1: there are none. A burst is the first tenth of each `burst_seconds`.
      burst_seconds: from one burst to the next.
      swing: by what share the rate rises and falls in the course of a `day`, as a sine.
      day: seconds.
    """

    rate: float
    burst: float = 1.0
    burst_seconds: float = 20.0
    swing: float = 0.0
    day: float = 600.0

    def __post_init__(self) -> None:
        require(self.rate > 0, f"rate={self.rate} must be more than 0")
        require(1 <= self.burst <= 10, f"burst={self.burst} must be from 1 to 10")
        require(0 <= self.swing <= 1, f"swing={self.swing} must be from 0 to 1")
        require(min(self.burst_seconds, self.day) > 0, "burst_seconds and day must be more than 0")

    def at(self, time: float) -> float:
        """Sessions a second at this time."""
        in_burst = time % self.burst_seconds < 0.1 * self.burst_seconds
        share = self.burst if in_burst else (1 - 0.1 * self.burst) / 0.9
        return self.rate * share * (1 + self.swing * float(np.sin(2 * np.pi * time / self.day)))

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Rising times without end, by thinning (Lewis and Shedler, 1979)."""
        most, time = self.rate * self.burst * (1 + self.swing), 0.0
        while True:
            for wait, draw in zip(rng.exponential(1 / most, 256).tolist(), rng.random(256).tolist(), strict=True):
                time += wait
                if draw * most < self.at(time):
                    yield time


@dataclasses.dataclass(frozen=True)
class Tenants:
    """Who asks.

    Attributes:
      number: of tenants.
      skew: exponent of Zipf's law for how often each asks. 0: all alike.
      system: tokens that all prompts of a tenant begin with.
    """

    number: int
    skew: float = 0.8
    system: int = 512

    def __post_init__(self) -> None:
        require(self.number >= 1, f"number={self.number} must be at least 1")


class Zipf:
    """Draws ranks from 0 on by Zipf's law.

    >>> Zipf(3, 0.0).shares.tolist() == [1 / 3, 2 / 3, 1.0]
    True
    """

    def __init__(self, number: int, exponent: float) -> None:
        weights = np.arange(1, number + 1, dtype=np.float64) ** -exponent
        self.shares = np.cumsum(weights) / weights.sum()
        self.shares[-1] = 1.0

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """Ranks, independent of each other."""
        return np.searchsorted(self.shares, rng.random(size), side="right").tolist()

    def draws(self, rng: np.random.Generator) -> Iterator[int]:
        """Ranks without end."""
        while True:
            yield from self.draw(rng, 256)


class Asked(NamedTuple):
    """A request of a session, before the requests of all sessions are put in order."""

    due: float
    session: int
    tenant: int
    segments: tuple[Segment, ...]
    answer: Segment


class Texts:
    """Makes texts of one session that no other session has."""

    def __init__(self, tenant: int, session: int) -> None:
        self._keys = itertools.count(tenant * TENANT_KEYS + (1 << 39) + session * 4096)

    def new(self, tokens: float) -> Segment:
        """A text of at least a token."""
        return Segment(next(self._keys), max(int(tokens), 1))


class Kind(Protocol):
    """A kind of sessions."""

    @property
    def prompts(self) -> float:
        """Of a session, on average."""

    def session(
        self, rng: np.random.Generator, start: float, number: int, tenant: int, tenants: Tenants
    ) -> Iterator[Asked]:
        """The requests of a session, rising in time; at least one."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversations that grow.

    Attributes:
      turns: of a conversation, on average (geometric).
      question, answer: tokens, on average (exponential).
      think: seconds from one turn's arrival to the next, on average (exponential, behind the first 5 s).
    """

    turns: float = 6.0
    question: int = 192
    answer: int = 256
    think: float = 10.0

    @property
    def prompts(self) -> float:
        """Of a session, on average."""
        return self.turns

    def session(
        self, rng: np.random.Generator, start: float, number: int, tenant: int, tenants: Tenants
    ) -> Iterator[Asked]:
        """The requests of a conversation, rising in time."""
        texts, history = Texts(tenant, number), [_system(tenant, tenants)]
        due = start
        for _ in range(int(rng.geometric(1 / self.turns))):
            question, answer = texts.new(rng.exponential(self.question)), texts.new(rng.exponential(self.answer))
            history.append(question)
            yield Asked(due, number, tenant, tuple(history), answer)
            history.append(answer)
            due += 5 + float(rng.exponential(max(self.think - 5, 0)))


@dataclasses.dataclass(frozen=True)
class Rag:
    """Questions about documents that are drawn by Zipf's law from the tenant's, in an order of their own.

    Attributes:
      documents: of a tenant.
      skew: exponent of Zipf's law. Rank 0 is the tenant's hottest document.
      found: documents in each prompt.
      length, question, answer: tokens; the last two on average (exponential).
    """

    documents: int = 200
    skew: float = 0.9
    found: int = 8
    length: int = 768
    question: int = 64
    answer: int = 128

    def __post_init__(self) -> None:
        require(1 <= self.found <= self.documents, f"found={self.found} must be from 1 to {self.documents}")
        object.__setattr__(self, "_ranks", Zipf(self.documents, self.skew))

    def session(
        self, rng: np.random.Generator, start: float, number: int, tenant: int, tenants: Tenants
    ) -> Iterator[Asked]:
        """One request."""
        texts = Texts(tenant, number)
        ranks = self._some(rng)
        documents = [self.document(tenant, rank) for rank in ranks]
        segments = (_system(tenant, tenants), *documents, texts.new(rng.exponential(self.question)))
        yield Asked(start, number, tenant, segments, texts.new(rng.exponential(self.answer)))

    @property
    def prompts(self) -> float:
        """Of a session."""
        return 1.0

    def document(self, tenant: int, rank: int) -> Segment:
        """The tenant's document of this rank. Its length is from half to one and a half of `length`."""
        spread = (rank * 2654435761 + tenant * 40503) % 1024 / 1024
        return Segment(tenant * TENANT_KEYS + 1 + rank, int(self.length * (0.5 + spread)))

    def _some(self, rng: np.random.Generator) -> list[int]:
        """Different ranks. They are drawn one by one, so their order is by chance too."""
        ranks: dict[int, None] = {}
        while len(ranks) < self.found:
            ranks |= dict.fromkeys(self._ranks.draw(rng, 2 * self.found))  # type: ignore[attr-defined]
        return list(ranks)[: self.found]


@dataclasses.dataclass(frozen=True)
class Agents:
    """Groups whose members all speak in each round, and read what all have said, each in an order of its own.

    Attributes:
      members, rounds: of a group.
      task: tokens of a text that all members read first among the others'.
      private: tokens of each member's own text.
      message: tokens of an answer, on average (exponential).
      pause: seconds from one round to the next.
      gap: seconds between members of a round, on average.
    """

    members: int = 6
    rounds: int = 4
    task: int = 2048
    private: int = 384
    message: int = 256
    pause: float = 12.0
    gap: float = 0.02

    @property
    def prompts(self) -> float:
        """Of a session."""
        return float(self.members * self.rounds)

    def session(
        self, rng: np.random.Generator, start: float, number: int, tenant: int, tenants: Tenants
    ) -> Iterator[Asked]:
        """The requests of a group, rising in time."""
        texts, system = Texts(tenant, number), _system(tenant, tenants)
        own = [texts.new(self.private) for _ in range(self.members)]
        said = [texts.new(self.task)]
        for each in range(self.rounds):
            answers = [texts.new(rng.exponential(self.message)) for _ in own]
            due = start + each * self.pause
            for private, answer in zip(own, answers, strict=True):
                heard = [said[i] for i in rng.permutation(len(said))]
                yield Asked(due, number, tenant, (system, private, *heard, texts.new(32)), answer)
                due += float(rng.exponential(self.gap))
            said += answers


@dataclasses.dataclass(frozen=True)
class Surge:
    """Requests of one tenant beside all others for a while: a document that all ask about, or a tenant that floods.

    Attributes:
      kind: of its sessions.
      rate: prompts a second.
      start, end: seconds.
      tenant: whose.
    """

    kind: Kind
    rate: float
    start: float
    end: float
    tenant: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.start < self.end, f"start={self.start} must be at least 0 and before end={self.end}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All that comes in.

    Attributes:
      mix: kinds of sessions, each with the prompts a second that it makes on average.
      tenants: who they are of.
      arrivals: how sessions come; the rate is that of `mix`.
      surge: what comes beside them.
    """

    mix: tuple[tuple[Kind, float], ...]
    tenants: Tenants
    arrivals: Arrivals = Arrivals(1.0)
    surge: Surge | None = None

    def prompts(self, seed: int, until: float) -> Iterator[Prompt]:
        """Requests by rising `due`, up to a time in seconds. The same seed gives the same."""
        streams = [self._asked(seed, index, until) for index in range(len(self.mix))]
        if self.surge:
            streams.append(self._surging(seed, until, self.surge))
        merged = heapq.merge(*streams, key=lambda asked: asked.due)
        for number, asked in enumerate(merged):
            tokens = sum(segment.tokens for segment in asked.segments)
            yield Prompt(number, asked.due, asked.tenant, asked.session, asked.segments, asked.answer, tokens)

    def _asked(self, seed: int, index: int, until: float) -> Iterator[Asked]:
        kind, rate = self.mix[index]
        arrivals = dataclasses.replace(self.arrivals, rate=rate / kind.prompts)
        starts = arrivals.times(np.random.default_rng([seed, index, 1]))
        tenants = Zipf(self.tenants.number, self.tenants.skew).draws(np.random.default_rng([seed, index, 2]))
        return self._requests(kind, [seed, index], starts, tenants, until)

    def _surging(self, seed: int, until: float, surge: Surge) -> Iterator[Asked]:
        index = len(self.mix)
        times = Arrivals(surge.rate / surge.kind.prompts).times(np.random.default_rng([seed, index, 1]))
        starts = (surge.start + time for time in times)
        return self._requests(surge.kind, [seed, index], starts, itertools.repeat(surge.tenant), min(until, surge.end))

    def _requests(
        self, kind: Kind, seed: list[int], starts: Iterator[float], tenants: Iterator[int], until: float
    ) -> Iterator[Asked]:
        """The requests of one kind, by rising time. The numbers of its sessions are no other kind's."""
        numbers = itertools.count(seed[-1], len(self.mix) + 1)
        sessions = (
            (start, kind.session(_generator(seed, number), start, number, tenant, self.tenants))
            for start, number, tenant in zip(starts, numbers, tenants, strict=False)
        )
        return _in_order(sessions, until)


def _generator(seed: list[int], number: int) -> np.random.Generator:
    """Of one session. A seed sequence would take longer than the session itself."""
    mixed = (seed[0] * 0x9E3779B97F4A7C15 + seed[1] * 0xBF58476D1CE4E5B9 + number * 0x94D049BB133111EB) % 2**64
    return np.random.Generator(np.random.SFC64(mixed))


def _in_order(sessions: Iterator[tuple[float, Iterator[Asked]]], until: float) -> Iterator[Asked]:
    """The requests of sessions that overlap, by rising time. Only sessions that have begun are held."""
    line: list[tuple[float, int, Asked, Iterator[Asked]]] = []
    for start, session in sessions:
        while line and line[0][0] <= min(start, until):
            yield _next_of(line)
        if start > until:
            return
        first = next(session)
        heapq.heappush(line, (first.due, first.session, first, session))


def _next_of(line: list[tuple[float, int, Asked, Iterator[Asked]]]) -> Asked:
    """The first request in line, in whose place the next of its session comes."""
    _, number, asked, session = line[0]
    following = next(session, None)
    if following is None:
        heapq.heappop(line)
    else:
        heapq.heapreplace(line, (following.due, number, following, session))
    return asked


def _system(tenant: int, tenants: Tenants) -> Segment:
    return Segment(tenant * TENANT_KEYS, tenants.system)


KINDS: dict[str, Kind] = {"chat": Chat(), "rag": Rag(), "agents": Agents()}
