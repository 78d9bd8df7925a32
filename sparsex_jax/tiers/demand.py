"""Which new blocks a full tier takes, so that one which is smaller than what comes back does not only write.

Where all that comes back fits, the least recently used block goes for each new one. Where it does not fit, that is the
worst that can be done: of sixteen sessions that return in turn, in a tier for four, each is evicted just before it
returns. So the *distance* of what returns is measured: how many bytes of sequences were visited since its last visit,
also where the tier refused or evicted it. While much returns from farther than the tier reaches, a new block only takes
the place of what was not used for longer than that block's own distance: so what is in the tier stays and is found, and
goes once it does not return any more. (Low inter-reference recency sets, LIRS, decide by the same comparison.) Where a
refused block returns so soon that it would have been found, refusing was wrong, and soon ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from sparsex_jax.tiers.order import REMEMBERED, UseOrder

MOST_GONE = 1 << 16  # blocks that are remembered after they were refused or evicted
REGRET = 8
PATIENCE = 2  # by how many times its distance a block must be older, since rounds differ in their order
SMOOTHING = 1 / 16  # weight of the last distance in their mean


class New(NamedTuple):
    """A block that could come into a tier.

    Attributes:
      marks: by which it is known again, also when it has grown. The last one stands for all of it.
      remembered: it is of a remembered text, whose distance counts for less.
    """

    nbytes: int
    marks: Sequence[bytes]
    remembered: bool


class Demand[Name: Hashable]:
    """What is asked of one tier.

    Attributes:
      order: of what the tier has.
      limit: of its bytes.
    """

    def __init__(self, order: UseOrder[Name], limit: int) -> None:
        self.order, self.limit = order, limit
        self._gone: OrderedDict[bytes, int] = OrderedDict()  # by marks, the clock of their last visit
        self._distance = 0.0  # mean of what returns from farther than the limit
        self._too_small = 0  # bytes that returned from too far, less what was wrongly refused

    @property
    def keeps(self) -> bool:
        """Whether new blocks must wait for what is there to grow old."""
        return self._too_small > 0

    def use(self, name: Name) -> None:
        """It is there, and was found."""
        for age, nbytes in self.order.use(name):
            if age > self.limit:
                self._returned(age, nbytes)

    def visit(self, new: Sequence[New], nbytes: int, promised: int = 0) -> int:
        """A sequence was computed or found. How many of its blocks that are not there should be taken, as `take`.

        Args:
          nbytes: of all of the sequence's blocks.
        """
        self.order.clock += nbytes
        return self.take(new, promised)

    def take(self, new: Sequence[New], promised: int = 0) -> int:
        """How many leading ones of these blocks should be taken: an end is of no use alone.

        Args:
          new: blocks that are not there, in their order in a sequence.
          promised: bytes of blocks that were taken, but are not there yet.
        """
        distances = [self._distance_of(each) for each in new]
        number = self._room(new, distances, promised) if self.keeps else len(new)
        for each in new[number:]:
            self.left(each.marks[-1], self.order.clock)
        return number

    def left(self, mark: bytes, used: int) -> None:
        """It was evicted or refused. It is known for a while when it was used last."""
        self._gone[mark] = used
        self._gone.move_to_end(mark)
        if len(self._gone) > MOST_GONE:
            self._gone.popitem(last=False)

    def _distance_of(self, new: New) -> float:
        """Since its last visit; if there was none, the mean of what returns."""
        found = [self._gone.pop(mark) for mark in new.marks if mark in self._gone]
        if not found:
            return self._distance / (REMEMBERED if new.remembered else 1)
        distance = self.order.clock - max(found)
        if distance > self.limit:
            self._returned(distance, new.nbytes)
        else:
            self._count(-REGRET * new.nbytes)
        return distance / (REMEMBERED if new.remembered else 1)

    def _returned(self, distance: int, nbytes: int) -> None:
        """From farther than the tier reaches."""
        weight = SMOOTHING if self._distance else 1
        self._distance += (distance - self._distance) * weight
        self._count(nbytes)

    def _count(self, nbytes: int) -> None:
        self._too_small = min(max(self._too_small + nbytes, -self.limit), self.limit)

    def _room(self, new: Sequence[New], distances: Sequence[float], promised: int) -> int:
        """How many find room beside what is younger than they are far."""
        lacking = self.order.nbytes + promised - self.limit
        older = self.order.ages()
        for number, (each, distance) in enumerate(zip(new, distances, strict=True)):
            lacking += each.nbytes
            while lacking > 0:
                _, age, nbytes = next(older, (None, 0.0, 0))
                if age <= PATIENCE * distance:
                    return number
                lacking -= nbytes
        return len(new)
