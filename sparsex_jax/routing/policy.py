"""The choice between replicas, by numbers alone: what they hold of a prompt, and what they have to do.

`SegmentPolicy` estimates for each replica what the prompt costs there, in tokens to compute:

    work  = fresh tokens + reuse_cost * tokens found there
    delay = tokens queued there + running_cost * sequences running there
    cost  = work_weight * work + delay

A token of work counts more than one of delay, because it also takes time from all who come later; so a prompt waits a
little where its segments are before it is computed anew elsewhere, which then has them too. Replicas whose cost is near
the least are equally good as far as anybody knows. Of those, two are drawn by a hash of the
prompt's content, and the one with the shorter queue is taken: power of two choices, as Azar et al. ("Balanced
allocations", 1994) have it. Equal content draws the same two, so a text that nobody holds yet is not computed in many
places at once; different contents draw different ones, so that routers with old numbers do not all run to one replica.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from sparsex_jax.cache.windows import mix
from sparsex_jax.config.checks import NotNegative, checked


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Replicas that a request may go to, at least one. The arrays have one number for each.

    Attributes:
      hits: tokens of the prompt that are found there, an estimate.
      queued: tokens that are still to be computed there before the prompt is.
      running: sequences there.
      hashes: of their names, to order them by.
    """

    hits: Float64[np.ndarray, "replicas"]
    queued: Float64[np.ndarray, "replicas"]
    running: Int64[np.ndarray, "replicas"]
    hashes: UInt64[np.ndarray, "replicas"]

    def ranks(self, content: int) -> UInt64[np.ndarray, "replicas"]:
        """A number for each replica, random by `content` and name (rendezvous hashing): the largest comes first.

        If a replica joins or leaves, the order of the others stays.
        """
        return mix(self.hashes ^ np.uint64(content))


class Policy(Protocol):
    """Chooses among replicas."""

    def choose(self, num_tokens: int, candidates: Candidates, content: int) -> int:
        """The index of the chosen one.

        Args:
          num_tokens: of the prompt.
          content: 64 bits of the prompt's content; similar prompts tend to have the same.
        """

    def work(self, num_tokens: int, candidates: Candidates) -> Float64[np.ndarray, "replicas"]:
        """What the prompt costs each of them, in tokens to compute, without the queue."""


@dataclasses.dataclass(frozen=True)
class SegmentPolicy:
    """Least expected cost, and two choices among those near it.

    Attributes:
      reuse_cost: what a token that is found costs, as a share of a fresh one: copies, rotation and recomputed tokens.
      running_cost: by how many tokens each running sequence delays a prompt.
      work_weight: how much a token of the prompt's own work counts beside one of delay. 1: the least time to this
        prompt's first token; more: less work for all.
      slack: replicas within this share of the prompt's tokens from the least cost are equally good.
    """

    reuse_cost: NotNegative = 0.15
    running_cost: NotNegative = 64.0
    work_weight: NotNegative = 4.0
    slack: NotNegative = 0.1

    def __post_init__(self) -> None:
        checked(type(self), vars(self))

    def work(self, num_tokens: int, candidates: Candidates) -> Float64[np.ndarray, "replicas"]:
        hits = np.minimum(candidates.hits, num_tokens)
        return num_tokens - hits * max(1 - self.reuse_cost, 0.0)

    def choose(self, num_tokens: int, candidates: Candidates, content: int) -> int:
        delay = candidates.queued + self.running_cost * candidates.running
        cost = self.work_weight * self.work(num_tokens, candidates) + delay
        near = np.flatnonzero(cost <= cost.min() + self.slack * num_tokens)
        ranks = candidates.ranks(content)[near]
        two = near[np.argsort(ranks)[::-1][:2]]
        return int(two[np.argmin(delay[two])])  # the first of two that are equal, which is sticky


@dataclasses.dataclass(frozen=True)
class LeastLoaded:
    """The replica with the least to do, whatever it holds."""

    running_cost: float = 64.0

    def work(self, num_tokens: int, candidates: Candidates) -> Float64[np.ndarray, "replicas"]:
        return np.full(len(candidates.hits), float(num_tokens))

    def choose(self, num_tokens: int, candidates: Candidates, content: int) -> int:
        return int(np.argmin(candidates.queued + self.running_cost * candidates.running))


class RoundRobin:
    """One replica after the other, to compare with."""

    def __init__(self) -> None:
        self._next = 0

    def work(self, num_tokens: int, candidates: Candidates) -> Float64[np.ndarray, "replicas"]:
        return np.full(len(candidates.hits), float(num_tokens))

    def choose(self, num_tokens: int, candidates: Candidates, content: int) -> int:
        self._next += 1
        return (self._next - 1) % len(candidates.hits)


# Those that a command may name. Each router has one of its own, since some count.
POLICIES: Mapping[str, Callable[[], Policy]] = {
    "segments": SegmentPolicy,
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
}
