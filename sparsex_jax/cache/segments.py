"""What a prompt can copy: the runs of its tokens that are stored, at whatever offset, here and there.

From left to right: at the first offset whose window is stored, every place it is stored at is compared token by
token, to the left through the parents of its page and to the right through the children. The best run becomes a
segment, and the search goes on behind it.

    prompt     ...... x x a b c d e f g h i j k l y ......
                          |<--- anchor --->|
                      <-- |                | -->
    stored      [. . . . a b][c d e f g h i j][k l . . .]    three pages, one run of 12 tokens
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, Int64

from sparsex_jax.cache.tree import TOKEN_BYTES, Node, common_prefix, common_suffix
from sparsex_jax.cache.windows import WINDOW, WindowIndex

# Page comparisons per lookup after which it only looks for long runs: one donor an anchor, every ninth anchor.
# Ordinary prompts need a few thousand; only text that repeats itself, here and in the store, comes that far.
COMPARISON_BUDGET = 1 << 15
# Stored windows are 8 apart, so steps of 9 try each of their phases in turn.
HURRIED_STRIDE = WINDOW + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A run of prompt tokens whose KV is in the store.

    Example: prompt tokens 100..149 were computed as tokens 20..69 of another prompt. `start` is 100, `length`
    50, `donor_start` 20, and the keys have to be rotated by `shift` = 80 positions.

    Attributes:
      start: where it begins in the prompt.
      length: tokens.
      donor_start: the position its first token was computed at; the rest follow one by one.
      slots: the slot of each token, page * page_size + offset.
      exact: the KV of all of it is exact (for the donor's own prompt).
    """

    start: int
    length: int
    donor_start: int
    slots: Int64[np.ndarray, "length"]
    exact: bool

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        return self.start - self.donor_start


@dataclasses.dataclass(slots=True)
class Run:
    """A run while it is being looked for: `length` tokens of `nodes`, from `offset` in the first one on."""

    start: int
    length: int
    nodes: list[Node]
    offset: int

    @property
    def exact(self) -> bool:
        """Exact tokens lead in every sequence, so the last one tells."""
        last = self.nodes[-1]
        return self.offset + self.length - sum(node.length for node in self.nodes[:-1]) <= last.exact

    def segment(self, page_size: int) -> Segment:
        pages = np.array([node.pages[0] for node in self.nodes], np.int64)
        slots = (pages[:, None] * page_size + np.arange(page_size)).ravel()
        slots = slots[self.offset : self.offset + self.length]
        return Segment(self.start, self.length, self.nodes[0].start + self.offset, slots, self.exact)


class SegmentSearch:
    """One search over one prompt. `recency` says how recently a node was used, larger is later."""

    def __init__(
        self,
        prompt: Int32[np.ndarray, "tokens"],
        namespace: str,
        windows: WindowIndex,
        page_size: int,
        recency: Callable[[Node], int],
    ) -> None:
        self._prompt = prompt
        self._bytes = prompt.tobytes()
        self._namespace = namespace
        self._windows = windows
        self._page_size = page_size
        self._recency = recency
        self._budget = COMPARISON_BUDGET

    def run(self, begin: int, min_segment: int) -> list[Run]:
        """The disjoint runs of at least `min_segment` tokens at `begin` or behind it, in order."""
        offsets, hashes = self._windows.probe(self._prompt[begin:], self._namespace)
        anchors, values = (offsets + begin).tolist(), hashes.tolist()
        runs: list[Run] = []
        i = 0
        while i < len(anchors):
            run = self._best(values[i], anchors[i], begin, min_segment) if values[i] in self._windows else None
            if run is not None:
                runs.append(self._best_of_other_phases(run, anchors, values, i, begin))
                begin = runs[-1].start + runs[-1].length
                i = bisect_left(anchors, begin, i)
            elif self._budget > 0:
                i += 1
            else:
                i = bisect_left(anchors, anchors[i] + HURRIED_STRIDE, i)
        return runs

    def _rank(self, run: Run) -> tuple[bool, int, int]:
        return run.exact, run.length, self._recency(run.nodes[-1])

    def _best(self, value: int, at: int, floor: int, least: int) -> Run | None:
        """The best run around the window at `at` that does not reach below `floor`."""
        best = None
        for node, offset in self._windows.candidates(value):
            run = self._run_around(node, offset, at, floor)
            if run is not None and run.length >= least and (best is None or self._rank(run) > self._rank(best)):
                best = run
            if self._budget < 0:
                break
        return best

    def _best_of_other_phases(self, best: Run, anchors: list[int], values: list[int], i: int, floor: int) -> Run:
        """A better run than `best`, found at anchor `i`, that covers its beginning too.

        Another donor's windows may lie up to 7 tokens further on. A repeated hash is repeated text: nothing new.
        """
        seen = {values[i]}
        for j in range(i + 1, bisect_left(anchors, anchors[i] + WINDOW, i)):
            if values[j] not in seen and self._budget > 0:
                seen.add(values[j])
                run = self._best(values[j], anchors[j], floor, best.length if best.exact else 1)
                if run is not None and run.start <= best.start and self._rank(run) > self._rank(best):
                    best = run
        return best

    def _run_around(self, node: Node, offset: int, at: int, floor: int) -> Run | None:
        """The longest run through `node`'s token `offset` laid on the prompt's token `at`."""
        if node.namespace != self._namespace:
            return None
        nodes, end = self._right(node, offset, at)
        before, start = self._left(node, offset, at, floor)
        if end == at:
            return None
        skipped = offset - (at - start) + sum(other.length for other in before)
        return Run(start, end - start, before + nodes, skipped)

    def _slice(self, start: int, end: int) -> bytes:
        return self._bytes[start * TOKEN_BYTES : end * TOKEN_BYTES]

    def _right(self, node: Node, offset: int, at: int) -> tuple[list[Node], int]:
        """Compare from `at` on. Returns the nodes compared and the end of what is equal."""
        self._budget -= 1
        rest = node.key[offset * TOKEN_BYTES :]
        shared = common_prefix(rest, self._slice(at, at + self._page_size - offset))
        nodes, end = [node], at + shared
        while offset + shared == self._page_size:
            child, shared = self._next(nodes[-1], end)
            if child is None:
                break
            nodes.append(child)
            end, offset = end + shared, 0
        return nodes, end

    def _next(self, node: Node, at: int) -> tuple[Node | None, int]:
        """The child of `node` that agrees longest with the prompt from `at` on, and how long."""
        row = self._slice(at, at + self._page_size)
        child = node.child(row)
        if child is not None:
            self._budget -= 1
            return child, child.length
        if self._budget < 0:
            return None, 0
        best, most = None, (0, False)
        for child in node.all_children():
            self._budget -= 1
            rank = (common_prefix(child.key, row), child.sharable)
            if rank[0] and rank > most:
                best, most = child, rank
        return best, most[0]

    def _left(self, node: Node, offset: int, at: int, floor: int) -> tuple[list[Node], int]:
        """Compare backwards from `at`. Returns the nodes before `node` that are touched, and where equality begins."""
        before: list[Node] = []
        start = at - common_suffix(node.key[: offset * TOKEN_BYTES], self._slice(max(floor, at - offset), at))
        whole = at - offset
        while start == whole and start > floor and node.parent is not None and node.parent.pages:
            node = node.parent
            self._budget -= 1
            whole = start - node.length
            shared = common_suffix(node.key, self._slice(max(floor, whole), start))
            if not shared:
                break
            before.insert(0, node)
            start -= shared
        return before, start
