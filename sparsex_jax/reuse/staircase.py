"""Which part of a stored prefix is computed again while the rest is loaded: a staircase.

A prefix is cut into chunks of tokens, and the layers into groups. Each *cell*, a chunk in a group of layers, is either
computed, which takes the chunk's hidden states out of the group before and the KV of all chunks before it, or loaded:

    chunk      0  1  2  3  4  5
    group 0    c  c  c  c  .  .     4 leading chunks are computed
    group 1    c  c  c  .  .  .     3
    group 2    c  c  .  .  .  .     2: never more than in the group before

So no computed cell ever waits for a loaded one, and both sides end about together: late chunks are dear to compute, as
they attend to many keys, and cost the same to load (CacheFlow, arXiv 2604.25080). Host side, NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

# Of the search for what is better than the best weighted sum: how many continuations it looks at together.
_MOST_LOOKED_AT = 1 << 18
_BISECTIONS = 24
_ROUNDING = 1e-12  # of a time; what is not better by more than this is not better


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """What the cells of one prefix take, in seconds.

    Attributes:
      compute: finite.
      load: infinite where a cell is not stored.
    """

    compute: Float[np.ndarray, "groups chunks"]
    load: Float[np.ndarray, "groups chunks"]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.compute).all() and (self.compute >= 0).all() and (self.load >= 0).all()):
            raise ValueError("compute must be finite, and no time negative or NaN")

    @property
    def num_chunks(self) -> int:
        return self.compute.shape[1]


@dataclasses.dataclass(frozen=True)
class Staircase:
    """What of a prefix is computed.

    Attributes:
      computed: for each group, how many leading chunks are computed; it never rises.
      compute_seconds, load_seconds: what its two sides take, each without a pause.
    """

    computed: tuple[int, ...]
    compute_seconds: float
    load_seconds: float

    @classmethod
    def of(cls, computed: Sequence[int], costs: Costs) -> Staircase:
        compute = sum(float(line[:end].sum()) for line, end in zip(costs.compute, computed, strict=True))
        load = sum(float(line[end:].sum()) for line, end in zip(costs.load, computed, strict=True))
        return cls(tuple(map(int, computed)), compute, load)

    def heights(self, num_chunks: int) -> Int[np.ndarray, "chunks"]:
        """In how many groups, from the first on, each chunk is computed. It never rises either."""
        return (np.array(self.computed)[:, None] > np.arange(num_chunks)).sum(axis=0)


def plan_staircases(
    requests: Sequence[Costs], *, compute_busy: float = 0.0, load_busy: float = 0.0, within: float = 0.0
) -> list[Staircase]:
    """The staircases of prefixes that share a device and a link, such that the later of both ends as early as can be.

    Args:
      compute_busy, load_busy: seconds that the device and the link are busy with other things before.
      within: a share of that time; a plan that is later than the best one by no more than this does. 0: the best one,
        up to some 5000 plans that are in question at the same time.
    """
    stages = [_Stage.of(costs, group) for costs in requests for group in range(len(costs.compute))]
    busy = np.array([compute_busy, load_busy])
    if not stages:
        return []
    choice, weight, least = _by_weights(stages, busy)
    most = float(_seconds(stages, choice, busy).max())
    if most - least > max(within, _ROUNDING) * most:
        choice = _search(stages, busy, weight, most) or choice
    ends = np.cumsum([0, *(len(costs.compute) for costs in requests)])
    return [Staircase.of(choice[begin:end], costs) for begin, end, costs in zip(ends, ends[1:], requests, strict=False)]


def plan_heights(
    costs: Costs, *, compute_busy: float = 0.0, load_busy: float = 0.0, within: float = 0.0
) -> tuple[Int[np.ndarray, "chunks"], float]:
    """In how many groups, from the first on, each chunk of a prefix is computed, and when both sides have ended.

    What is not stored can be computed in two ways: with all chunks before it, as a staircase does; or alone, once those
    are there. Then the heights may rise where it stands. The sooner one is taken. Arguments as `plan_staircases`.
    """
    busy = {"compute_busy": compute_busy, "load_busy": load_busy, "within": within}
    [stair] = plan_staircases([costs], **busy)
    heights = stair.heights(costs.num_chunks)
    seconds = max(compute_busy + stair.compute_seconds, load_busy + stair.load_seconds)
    depth = np.where(np.isinf(costs.load), np.arange(1, len(costs.load) + 1)[:, None], 0).max(axis=0)
    if not depth.any():
        return heights, seconds
    alone = np.arange(len(costs.load))[:, None] < depth
    rest = Costs(np.where(alone, 0.0, costs.compute), np.where(alone, 0.0, costs.load))
    [stair] = plan_staircases([rest], **busy)
    behind = max(compute_busy + stair.compute_seconds, load_busy + stair.load_seconds) + costs.compute[alone].sum()
    return (
        (np.maximum(stair.heights(costs.num_chunks), depth), float(behind)) if behind < seconds else (heights, seconds)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
    """A group of a request: seconds of computing and of loading, by the number of leading chunks that are computed.

    The groups of all requests make one chain, in which each stage bounds the next; but not where a request begins.
    """

    begins: bool
    seconds: Float[np.ndarray, "2 choices"]

    @classmethod
    def of(cls, costs: Costs, group: int) -> _Stage:
        compute = np.append(0.0, np.cumsum(costs.compute[group]))
        load = np.append(0.0, np.cumsum(costs.load[group][::-1]))[::-1]
        return cls(group == 0, np.stack([np.where(np.isfinite(load), compute, np.inf), load]))

    def weighted(self, weight: float) -> Float[np.ndarray, "choices"]:
        return weight * self.seconds[0] + (1 - weight) * self.seconds[1]


def _seconds(stages: Sequence[_Stage], choice: Sequence[int], busy: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    return busy + sum(stage.seconds[:, j] for stage, j in zip(stages, choice, strict=True))


def _behind(stages: Sequence[_Stage], weight: float) -> list[Float[np.ndarray, "choices"]]:
    """For each stage and each choice there, the least weighted seconds of all stages behind it."""
    behind = [np.zeros_like(stages[-1].seconds[0])]
    for before, stage in zip(stages[-2::-1], stages[:0:-1], strict=True):
        best = np.minimum.accumulate(stage.weighted(weight) + behind[-1])
        behind.append(np.full_like(before.seconds[0], best[-1]) if stage.begins else best)
    return behind[::-1]


def _least_choice(stages: Sequence[_Stage], weight: float) -> list[int]:
    """The choices of least weighted seconds."""
    choice: list[int] = []
    for stage, behind in zip(stages, _behind(stages, weight), strict=True):
        most = len(behind) if stage.begins else choice[-1] + 1
        choice.append(int(np.argmin((stage.weighted(weight) + behind)[:most])))
    return choice


def _by_weights(stages: Sequence[_Stage], busy: Float[np.ndarray, "2"]) -> tuple[list[int], float, float]:
    """The best of the choices that a weighted sum of both sides is least at.

    No plan ends before the least weighted sum, whatever the weight: the later side is at least the mean of both.

    Returns:
      The choices; the weight of computing whose least sum is the highest; and that sum.
    """
    low, high, tried = 0.0, 1.0, []
    for _ in range(_BISECTIONS):
        weight = (low + high) / 2
        choice = _least_choice(stages, weight)
        compute, load = _seconds(stages, choice, busy)
        tried.append((max(compute, load), choice, weight, weight * compute + (1 - weight) * load))
        low, high = (weight, high) if compute > load else (low, weight)
    best = min(tried, key=lambda one: one[0])
    _, _, weight, least = max(tried, key=lambda one: one[-1])
    return best[1], weight, least


def _search(stages: Sequence[_Stage], busy: Float[np.ndarray, "2"], weight: float, most: float) -> list[int] | None:
    """The best choices whose later side ends before `most`; None if there are none.

    Stage by stage, all beginnings that may end there: by their sides alone, and by the weighted sum of both.
    """
    weights = np.array([weight, 1.0 - 1e-9, 1e-9])[:, None]
    behind = [np.stack(lines) for lines in zip(*(_behind(stages, float(each)) for each in weights[:, 0]), strict=True)]
    sums, last, trail = busy[:, None], np.zeros(1, int), np.zeros((1, 0), int)
    for stage, rest in zip(stages, behind, strict=True):
        choices = np.arange(rest.shape[1])
        both = sums[:, :, None] + stage.seconds[:, None, :]  # [2, beginnings, choices]
        least = (weights[..., None] * both[0] + (1 - weights[..., None]) * both[1] + rest[:, None, :]).max(axis=0)
        allowed = (least < most * (1 - _ROUNDING)) & (stage.begins | (choices <= last[:, None]))
        begun, choice = np.nonzero(allowed)
        kept = _undominated(both[:, begun, choice], choice, least[begun, choice], _MOST_LOOKED_AT // len(choices))
        begun, last = begun[kept], choice[kept]
        sums, trail = both[:, begun, last], np.column_stack([trail[begun], last])
    return trail[sums.max(axis=0).argmin()].tolist() if len(trail) else None


def _undominated(
    sums: Float[np.ndarray, "2 n"], choice: Int[np.ndarray, "n"], least: Float[np.ndarray, "n"], most: int
) -> Int[np.ndarray, "_"]:
    """Of beginnings with the same last choice, those that no other beats on both sides; of these, the `most` best."""
    order = np.lexsort((sums[1], sums[0], choice))
    load, same = sums[1][order], choice[order]
    # Load sorts below that of any other choice before, so that the running minimum starts anew with each choice.
    below = load - same * (load.max(initial=0.0) + 1.0)
    before = np.minimum.accumulate(np.append(np.inf, below))[:-1]
    kept = order[below < before]
    return kept if len(kept) <= most else kept[np.argpartition(least[kept], most)[:most]]
