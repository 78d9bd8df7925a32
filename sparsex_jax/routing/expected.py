"""What a router expects beside what it was told: prompts on their way to a store, and groups that stay together."""

from __future__ import annotations

from collections import Counter, deque

from sparsex_jax.routing.digest import Ask
from sparsex_jax.routing.holders import Holders


class Assumed:
    """What replicas are thought to hold soon: the prompts that were sent there, until digests have them.

    Attributes:
      holders: who is thought to hold what.
    """

    def __init__(self, keep_s: float) -> None:
        self.holders, self._keep_s = Holders(), keep_s
        self._counts: dict[tuple[int, bytes], Counter[int]] = {}  # by slot and tag
        self._ending: deque[tuple[float, int, Ask]] = deque()

    def add(self, slot: int, ask: Ask) -> None:
        if self._counts_for(ask):
            self._counts.setdefault((slot, ask.tag), Counter()).update(ask.samples.tolist())
            self.holders.add(slot, ask.tag, ask.samples.tolist())

    def end(self, slot: int, ask: Ask, now: float | None) -> None:
        """One that was added is dropped after a while. None: at once."""
        if self._counts_for(ask) and now is not None:
            self._ending.append((now + self._keep_s, slot, ask))
        elif self._counts_for(ask):
            self._drop(slot, ask)

    def _counts_for(self, ask: Ask) -> bool:
        return self._keep_s > 0 and len(ask.samples) > 0

    def expire(self, now: float) -> None:
        while self._ending and self._ending[0][0] <= now:
            _, slot, ask = self._ending.popleft()
            self._drop(slot, ask)

    def _drop(self, slot: int, ask: Ask) -> None:
        counts = self._counts[slot, ask.tag]
        counts.subtract(ask.samples.tolist())
        gone = [sample for sample in ask.samples.tolist() if counts[sample] == 0]
        for sample in gone:
            counts.pop(sample, None)
        self.holders.remove(slot, ask.tag, gone)
        if not counts:
            del self._counts[slot, ask.tag]

    def leave(self, slot: int) -> None:
        self.holders.replace(slot, {})
        self._counts = {key: counts for key, counts in self._counts.items() if key[0] != slot}
        self._ending = deque(each for each in self._ending if each[1] != slot)

    def check(self) -> None:
        self.holders.check()
        for (slot, tag), counts in self._counts.items():
            assert set(counts) == self.holders.held(slot).get(tag, set())
            assert all(count > 0 for count in counts.values())


class Groups:
    """Which replica each group is at."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._known: dict[tuple[bytes, bytes], tuple[str, float]] = {}  # replica and last use, the oldest use first

    def replica_of(self, ask: Ask, now: float) -> str | None:
        while self._known and next(iter(self._known.values()))[1] + self._keep_s < now:
            del self._known[next(iter(self._known))]
        return self._known[ask.tag, ask.group][0] if ask.group and (ask.tag, ask.group) in self._known else None

    def use(self, ask: Ask, replica: str, now: float) -> None:
        if ask.group:
            self._known.pop((ask.tag, ask.group), None)
            self._known[ask.tag, ask.group] = replica, now

    def leave(self, replica: str) -> None:
        self._known = {key: at for key, at in self._known.items() if at[0] != replica}
