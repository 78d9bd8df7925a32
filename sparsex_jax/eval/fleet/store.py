"""What one replica has stored: chains of segments on the device, and what was evicted from there in slower tiers.

A prompt is a chain, as in a radix tree: the same segment behind other ones is another node, since its KV is another.

    prompts             [s d1 d2 q]   [s d2 d1 p]
    nodes               s   s.d1   s.d1.d2   s.d1.d2.q   s.d2   s.d2.d1   s.d2.d1.p
    found of [s d2 x]   by its prefix: s, s.d2; of [s x d1]: s by its prefix, and d1 as a segment, in two places

The least recently used node that nobody pins is evicted first. A chain's end counts as older than what is before it, so
no node of a chain is evicted before those behind it. An evicted node goes to the first tier that has room for it, and
what is evicted there to the next one. What other replicas hold may be fetched from them, and counts as one more tier.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from sparsex_jax.config.checks import require
from sparsex_jax.eval.fleet.traffic import Segment


@dataclasses.dataclass(frozen=True)
class TierConfig:
    """Host memory or a disk.

    Attributes:
      tokens: that it holds.
      bytes_per_s: of the link to the device.
    """

    tokens: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        require(self.tokens >= 0, f"tokens={self.tokens} must be at least 0")
        require(self.bytes_per_s > 0, f"bytes_per_s={self.bytes_per_s} must be more than 0")


class Found(NamedTuple):
    """What a lookup found of a prompt, in tokens.

    Attributes:
      prefix: at its beginning, those to be loaded among them.
      reused: elsewhere, those to be loaded among them.
      borders: places where a reused segment stands beside a fresh one.
      fresh: all others.
      loaded: to be loaded from each tier, and last, if that is possible, from other replicas.
      fresh_keys, reused_keys: the sum over those tokens of the tokens up to their own.
    """

    prefix: int
    reused: int
    borders: int
    fresh: int
    loaded: tuple[int, ...]
    fresh_keys: float
    reused_keys: float


def chain_of(segments: Sequence[Segment]) -> list[int]:
    """The node of each segment behind those before it. Hashes of integers, the same in every process."""
    chain, node = [], 0
    for segment in segments:
        node = hash((node, segment.key))
        chain.append(node)
    return chain


class Tier:
    """Nodes in the order of their last use, at most so many tokens."""

    def __init__(self, config: TierConfig) -> None:
        self.config, self.held = config, 0
        self.nodes: OrderedDict[int, Segment] = OrderedDict()

    def put(self, node: int, segment: Segment) -> list[tuple[int, Segment]]:
        """Keep a node. Returns those that had to go, itself if it is larger than the tier."""
        if segment.tokens > self.config.tokens:
            return [(node, segment)]
        self.nodes[node] = segment
        self.held += segment.tokens
        gone = []
        while self.held > self.config.tokens:
            gone.append(self.nodes.popitem(last=False))
            self.held -= gone[-1][1].tokens
        return gone

    def take(self, node: int) -> None:
        """Keep it no more, if it is here."""
        segment = self.nodes.pop(node, None)
        self.held -= segment.tokens if segment else 0


class Peers:
    """What all replicas of a fleet can find, as if each knew it at once."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # replicas by key

    def __contains__(self, key: int) -> bool:
        return key in self._counts

    def change(self, key: int, is_found: bool) -> None:
        """One replica more finds it, or one fewer."""
        number = self._counts.get(key, 0) + (1 if is_found else -1)
        if number:
            self._counts[key] = number
        else:
            del self._counts[key]


class Store:
    """The device's store and the tiers below it.

    Attributes:
      capacity: tokens that the device holds.
      held: tokens that are taken on the device, by nodes or by those who reserved them.
      changes: since `take_changes`, by key: a segment, and whether it is to be found now or no more. The keys are those
        of segments, or nodes if only prefixes are found.
    """

    def __init__(
        self,
        capacity: int,
        tiers: Sequence[TierConfig] = (),
        *,
        segments: bool = True,
        peers: Peers | None = None,
    ) -> None:
        """
        Args:
          segments: whether segments are found anywhere, or prefixes only.
          peers: of the fleet, if what others hold is fetched from them.
        """
        require(capacity >= 1, f"capacity={capacity} must be at least 1")
        self.capacity, self.held, self.segments, self._peers = capacity, 0, segments, peers
        self.tiers = [Tier(config) for config in tiers]
        self.changes: dict[int, tuple[Segment, bool]] = {}
        self._nodes: dict[int, Segment] = {}
        self._pins: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()  # nodes that nobody pins, the oldest first
        self._counts: dict[int, int] = {}  # on the device, by key
        self._below: list[dict[int, int]] = [{} for _ in tiers]  # in each tier, by key

    @property
    def keys(self) -> set[int]:
        """All that can be found."""
        return set(self._counts).union(*self._below)

    @property
    def tokens_of_nodes(self) -> int:
        """On the device, without those that are reserved."""
        return sum(segment.tokens for segment in self._nodes.values())

    @property
    def pinned(self) -> int:
        """Nodes that somebody pins."""
        return len(self._pins)

    def has(self, node: int, segment: Segment) -> bool:
        """Whether a segment is found, on the device or below; by its node, if only prefixes are found."""
        return self._is_found(self.key(node, segment))

    def key(self, node: int, segment: Segment) -> int:
        """By which a segment is found."""
        return segment.key if self.segments else node

    def find(self, segments: Sequence[Segment], chain: Sequence[int], *, below: bool = True) -> Found:
        """What of a prompt is stored, on the device or, unless not `below`, in its tiers and at others.

        A prompt's last segment is always computed.
        """
        links = len(self.tiers) + (self._peers is not None) if below else 0
        loaded, last = [0] * links, len(segments) - 1
        prefix = at = 0
        while at < last and self._has(chain[at], segments[at], loaded):
            prefix += segments[at].tokens
            at += 1
        reused = fresh = borders = 0
        fresh_keys = reused_keys = 0.0
        offset, before = prefix, None
        for index in range(at, last + 1):
            segment = segments[index]
            keys = segment.tokens * (offset + 0.5 * segment.tokens)
            offset += segment.tokens
            found = index < last and self.segments and self._has_key(segment, loaded)
            if found:
                reused, reused_keys = reused + segment.tokens, reused_keys + keys
            else:
                fresh, fresh_keys = fresh + segment.tokens, fresh_keys + keys
            borders, before = borders + (before is not None and before != found), found
        return Found(prefix, reused, borders, fresh, tuple(loaded), fresh_keys, reused_keys)

    def _has(self, node: int, segment: Segment, loaded: list[int]) -> bool:
        """Whether a node is here. If it is in a tier, it counts as loaded."""
        if node in self._nodes:
            return True
        for index, tier in enumerate(self.tiers[: len(loaded)]):
            if node in tier.nodes:
                loaded[index] += segment.tokens
                return True
        return not self.segments and self._others_have(node, segment, loaded)

    def _has_key(self, segment: Segment, loaded: list[int]) -> bool:
        if segment.key in self._counts:
            return True
        for index, counts in enumerate(self._below[: len(loaded)]):
            if segment.key in counts:
                loaded[index] += segment.tokens
                return True
        return self._others_have(segment.key, segment, loaded)

    def _others_have(self, key: int, segment: Segment, loaded: list[int]) -> bool:
        if not loaded or self._peers is None or key not in self._peers:
            return False
        loaded[-1] += segment.tokens
        return True

    def leave(self) -> None:
        """Nothing of it is there for others any more."""
        peers, self._peers = self._peers, None
        if peers is not None:
            for key in self.keys:
                peers.change(key, False)

    def reserve(self, tokens: int) -> bool:
        """Take room for so many tokens, evicting what nobody pins. False, and nothing is evicted, if there is none."""
        need = self.held + tokens - self.capacity
        if need > 0 and not self._can_free(need):
            return False
        while self.held + tokens > self.capacity:
            self._evict()
        self.held += tokens
        return True

    def release(self, tokens: int) -> None:
        """Give reserved room back."""
        self.held -= tokens

    def pin(self, chain: Sequence[int]) -> int:
        """Pin those nodes of a chain that are on the device, up to the first that is not. Returns how many."""
        count = 0
        for node in chain:
            if node not in self._nodes:
                break
            self._pins[node] = self._pins.get(node, 0) + 1
            self._free.pop(node, None)
            count += 1
        return count

    def commit(self, segments: Sequence[Segment], chain: Sequence[int], pinned: int) -> int:
        """Make nodes of the segments behind the first `pinned` ones, out of reserved room, and pin them.

        Returns:
          Reserved tokens that were not needed, since the nodes are here already. They are released.
        """
        spare = 0
        for segment, node in zip(segments[pinned:], chain[pinned:], strict=True):
            self._pins[node] = self._pins.get(node, 0) + 1
            if node in self._nodes:
                self._free.pop(node, None)
                spare += segment.tokens
            else:
                self._add(node, segment)
        self.release(spare)
        return spare

    def unpin(self, chain: Sequence[int]) -> None:
        """Take a pin from each node of a chain. The ends become older than the beginnings."""
        for node in reversed(chain):
            left = self._pins[node] - 1
            if left:
                self._pins[node] = left
            else:
                del self._pins[node]
                self._free[node] = None

    def take_changes(self) -> dict[int, tuple[Segment, bool]]:
        """The changes since the last call."""
        changes, self.changes = self.changes, {}
        return changes

    def _can_free(self, tokens: int) -> bool:
        for node in self._free:
            tokens -= self._nodes[node].tokens
            if tokens <= 0:
                return True
        return False

    def _add(self, node: int, segment: Segment) -> None:
        self._nodes[node] = segment
        self._count(self._counts, node, segment, 1)
        for tier, counts in zip(self.tiers, self._below, strict=True):
            if node in tier.nodes:
                tier.take(node)
                self._count(counts, node, segment, -1)

    def _evict(self) -> None:
        node, _ = self._free.popitem(last=False)
        segment = self._nodes.pop(node)
        self.held -= segment.tokens
        falling = [(node, segment)]
        for tier, counts in zip(self.tiers, self._below, strict=True):
            kept, falling = falling, []
            for each in kept:
                self._count(counts, *each, 1)
                falling += tier.put(*each)
            for each in falling:
                self._count(counts, *each, -1)
        self._count(self._counts, node, segment, -1)

    def _count(self, counts: dict[int, int], node: int, segment: Segment, change: int) -> None:
        """Note that a key is in one more place, or in one fewer, and whether that makes it found or lost."""
        key = self.key(node, segment)
        was, number = self._is_found(key), counts.get(key, 0) + change
        if number:
            counts[key] = number
        else:
            del counts[key]
        if was != (is_found := self._is_found(key)):
            self._change(key, segment, is_found)

    def _change(self, key: int, segment: Segment, is_found: bool) -> None:
        if self._peers is not None:
            self._peers.change(key, is_found)
        if self.changes.pop(key, None) is None:
            self.changes[key] = segment, is_found  # what came and went since is not told at all

    def _is_found(self, key: int) -> bool:
        return key in self._counts or any(key in counts for counts in self._below)
