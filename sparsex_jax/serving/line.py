"""Who is submitted to the loop next. Keys take turns, and each has its share of the queue whatever the others ask."""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextlib
import time
from collections.abc import Iterator

from sparsex_jax.errors import InvalidRequestError, OverloadedError
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.serving.access import ConcurrencyError, Tenant

SECONDS_A_LEVEL, MOST_LEVELS = 1.0, 60  # of priority
_LONGEST_S = 60.0  # OpenAI's clients ignore a longer Retry-After


def delay_of(priority: int | None) -> float:
    """How many seconds later, or earlier if negative, a request of this priority counts as come. vLLM's: lower is
    earlier, and 0 is the default. Bounded, so that nobody waits for ever."""
    return SECONDS_A_LEVEL * min(max(priority or 0, -MOST_LEVELS), MOST_LEVELS)


class Line:
    """The requests that are under way, counted in sequences. For the event loop's thread.

    With one key, all go to the loop at once, which has a queue of its own. With several, only as many are there as keep
    it busy, and the others wait here for their key's turn. Those that the loop holds for others of their round do not
    keep it busy; a key may have its share of the places in them, or a round of the largest size.

    Attributes:
      places: sequences that may be under way; a key within its share, places / keys, is taken beyond that.
      waiting: requests that wait here.
    """

    def __init__(self, running: int, waiting: int, num_keys: int = 1) -> None:
        """
        Args:
          running: sequences that the loop runs at once.
          waiting: sequences that may wait.
          num_keys: the number of keys, which share the places.
        """
        self.places = running + waiting
        # Of those that the loop was just given all wait, so it refuses more than `waiting` of them.
        self._most_submitted = waiting if waiting >= running else self.places
        self._ahead = self._most_submitted if num_keys == 1 else min(2 * running, self._most_submitted)
        self._largest = waiting
        self._share = self.places // num_keys
        self._under_way: collections.Counter[Tenant] = collections.Counter()
        self._submitted = 0
        self._in_rounds: set[Place] = set()
        self._most_held = max(self._share, running)
        self._queues: dict[Tenant, list[Place]] = {}  # whose turn it is comes first
        self._promised: dict[Tenant, float] = {}  # until when those turned away were told to stay away
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @contextlib.contextmanager
    def place(self, tenant: Tenant) -> Iterator[Place]:
        """Count a request of one sequence while the block runs. Raises as `Place.grow`."""
        place = Place(self, tenant)
        place.grow(1)
        try:
            yield place
        finally:
            self._leave(place)

    def take(self, place: Place, more: int) -> None:
        """As `Place.grow`, which counts them as its own."""
        tenant, size = place.tenant, place.size + more
        limit = tenant.max_concurrent
        most = self._largest if limit is None else min(limit, self._largest)
        if size > most:
            raise InvalidRequestError(f"the request has {size} answers to generate; the most here are {most}")
        own, total = self._under_way[tenant] + more, self._under_way.total() + more
        if limit is not None and own > limit:
            raise ConcurrencyError(
                f"{own - size} sequences of this key are under way and this request has {size} more; "
                f"max_concurrent={limit} is its limit",
                self._retry(tenant, size),
            )
        if total > self.places and own > self._share:
            raise OverloadedError(
                f"{total - size} sequences are under way, this request has {size} more, and {self.places} is the "
                "limit: max_num_seqs that run and max_waiting that wait",
                self._retry(tenant, size),
            )
        self._under_way[tenant] += more

    def queue(self, place: Place) -> None:
        """Make it ready at its key's turn. Raises ConcurrencyError if too many of the key are held for rounds."""
        if place.members:
            self._hold(place)
        place.rank = time.monotonic() + place.delay_s
        bisect.insort(self._queues.setdefault(place.tenant, []), place, key=lambda each: each.rank)
        self._admit()

    def _hold(self, place: Place) -> None:
        held = sum(other.size for other in self._in_rounds if other.tenant is place.tenant and other.is_held)
        if held + place.size > self._most_held:
            raise ConcurrencyError(
                f"{held} sequences of this key are held for their rounds and this request has {place.size} more; "
                f"{self._most_held} is the limit",
                self._retry(place.tenant, place.size),
            )
        self._in_rounds.add(place)

    def _admit(self) -> None:
        """Let places be submitted, one of each key in turn. None passes one that does not fit yet."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            held = sum(place.size for place in self._in_rounds if place.ready.done() and place.is_held)
            fits = self._submitted - held < self._ahead and self._submitted + queue[0].size <= self._most_submitted
            if not fits:
                return
            place = queue.pop(0)
            del self._queues[tenant]
            if queue:
                self._queues[tenant] = queue
            self._submitted += place.size
            self._pace.begin()
            place.ready.set_result(None)

    def _leave(self, place: Place) -> None:
        self._in_rounds.discard(place)
        self._under_way[place.tenant] -= place.size
        if not self._under_way[place.tenant]:
            del self._under_way[place.tenant]
        if place.ready.done():
            self._submitted -= place.size
            self._pace.end(place.size, more=self._submitted > 0)
        else:
            self._unqueue(place)
        self._admit()

    def _unqueue(self, place: Place) -> None:
        queue = self._queues.get(place.tenant)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._queues[place.tenant]

    def _retry(self, tenant: Tenant, size: int) -> float:
        """Seconds after which there will be room. Each who is turned away is told a later time than the one before,
        since all of them come back; at most the time that all those under way take."""
        now, interval = time.monotonic(), self._pace.seconds_between_ends()
        promised = max(self._promised.get(tenant, now), now) + size * interval
        self._promised[tenant] = min(promised, now + self._under_way.total() * interval)
        return min(max(self._promised[tenant] - now, 1.0), _LONGEST_S)


class Place:
    """A request's place in the line.

    Attributes:
      size: its sequences.
      delay_s: `delay_of` its priority, among those of its key that wait here.
      rank: `time.monotonic()` when it was made ready for its turn, and its delay more.
      ready: done once it may be submitted.
      members: the places of its prompts in rounds.
    """

    def __init__(self, line: Line, tenant: Tenant) -> None:
        self.tenant, self.size = tenant, 0
        self.delay_s = self.rank = 0.0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.members: frozenset[Member] = frozenset()
        self._line = line

    @property
    def is_held(self) -> bool:
        """Whether the loop will hold it or does so."""
        return any(not member.has_begun for member in self.members)

    def grow(self, more: int) -> None:
        """Count more sequences.

        Raises:
          InvalidRequestError: they could never all be under way.
          ConcurrencyError: the key has too many under way.
          OverloadedError: all keys together have, and this one more than its share.
        """
        self._line.take(self, more)
        self.size += more

    async def turn(self) -> None:
        """Wait for the request's turn to be submitted. Raises ConcurrencyError if too many are held already."""
        self._line.queue(self)
        await self.ready


class Pace:
    """How fast sequences end while any is under way. Idle time does not count."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._ends: collections.deque[float] = collections.deque(maxlen=64)  # on a clock that stands while idle

    def begin(self) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()

    def end(self, number: int, *, more: bool) -> None:
        """
        Args:
          more: whether others are still under way.
        """
        self._ends += [self._clock()] * number
        if not more:
            self._busy_s, self._busy_since = self._clock(), None

    def seconds_between_ends(self) -> float:
        """Over the last ones, up to now. A second where too few have ended to say, or longer if none ends for long."""
        if len(self._ends) < 8:
            return max(self._clock() / max(len(self._ends), 1), 1.0)
        return (self._clock() - self._ends[0]) / (len(self._ends) - 1)

    def _clock(self) -> float:
        return self._busy_s + (0.0 if self._busy_since is None else time.monotonic() - self._busy_since)
