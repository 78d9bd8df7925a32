"""The search for segments: runs of a prompt's tokens that are stored, at any offset in the prompt and in the store.

The search goes through the prompt from left to right. An offset whose window of 8 tokens is stored is an *anchor*. At
the first anchor, the prompt is compared with every place that stores its window: to the left through the parents of
the place's node, to the right through the children. The best run becomes a segment, and the search goes on behind it.

    prompt      3 tokens that are new    s5 s6 s7 s8 . . . . . . s15 s16 s17 s18    others
    index       0 1 2                     3  4  5  6             13  14  15  16     17 ...
                                                   |<-- anchor -->|
                                           <----- |                | ----->
    stored                 [s0 . . . . s5 s6 s7]  [s8 . . . . . s15]  [s16 s17 s18 . . .]    pages 4, 9 and 1

    Run(start=3, length=14, nodes=[of page 4, of page 9, of page 1], offset=5)
    with pages of 8 slots, the segment's slots are 37 38 39, 72 .. 79, 8 9 10
"""

from __future__ import annotations

import dataclasses
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from sparsex_jax.cache.children import MOST_TIES, TOKEN_BYTES, common_prefix
from sparsex_jax.cache.derived import Derived
from sparsex_jax.cache.tree import Node, common_suffix
from sparsex_jax.cache.windows import WINDOW, WindowIndex

# After this many comparisons of pages, a search tries only one place for each anchor, and only every ninth offset, so
# that it still finds long runs. An ordinary prompt needs a few thousand comparisons. Only text that repeats itself, in
# the prompt and in the store, uses up the budget.
COMPARISON_BUDGET = 1 << 15
# A run of 15 tokens holds a whole window wherever it begins, so each run of this length is found.
LEAST_FOUND = 2 * WINDOW - 1
# Stored windows begin 8 tokens apart, so steps of 9 meet each alignment to their grid in turn.
HURRIED_STRIDE = WINDOW + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A run of prompt tokens whose KV is in the store: the donor's.

    Example: prompt tokens 100..149 were computed as tokens 20..69 of another prompt. `start` is 100, `length` is 50,
    `donor_start` is 20, and the keys have to be rotated by `shift` = 80 positions.

    Attributes:
      start: index of its first token in the prompt.
      length: how many tokens it has.
      donor_start: the position that its first token was computed at. The others follow one by one.
      slots: the slot mapping, page * page_size + offset for each token. Where a page is a derived one, it cannot be
        copied from; `Mirrors.located` says where its rows are.
      exact: whether all its KV is what full recompute of the donor's prompt gives.
      tier: where its KV was when the prompt came: `device`, `host` or `disk`, whichever of its pages' is farthest.
      rows: where its rows are, if not all of them are in `slots` as they are.
    """

    start: int
    length: int
    donor_start: int
    slots: Int64[np.ndarray, "length"]
    exact: bool
    tier: str = "device"
    rows: Derived | None = None

    @property
    def end(self) -> int:
        """Index of the first prompt token behind it."""
        return self.start + self.length

    def pages(self, page_size: int) -> list[int]:
        """The pages of the store that its slots are in, in rising order."""
        return np.unique(self.slots // page_size).tolist()

    @property
    def shift(self) -> int:
        """How many positions its keys have to be rotated by."""
        return self.start - self.donor_start


def run_of_slots(pages: Sequence[int], begin: int, length: int, page_size: int) -> Int64[np.ndarray, "length"]:
    """Where the tokens from `begin` on are, of a sequence whose pages follow each other."""
    first, end = begin // page_size, -(-(begin + length) // page_size)
    slots = (np.array(pages[first:end], np.int64)[:, None] * page_size + np.arange(page_size)).ravel()
    return slots[begin - first * page_size :][:length]


@dataclasses.dataclass(slots=True)
class Run:
    """A run before its slots are known.

    Attributes:
      start: index of its first token in the prompt.
      length: how many tokens it has.
      nodes: the nodes it is stored in, in order.
      offset: index of its first token in the first node.
    """

    start: int
    length: int
    nodes: list[Node]
    offset: int

    @property
    def exact(self) -> bool:
        """Whether all its KV is exact. No exact token follows an approximate one, so the last token decides.

        The run of the module's docstring ends at offset 5 + 14 - (8 + 8) = 3 of its last node, so it is exact if the
        first 3 tokens of that node are.
        """
        last = self.nodes[-1]
        return self.offset + self.length - sum(node.length for node in self.nodes[:-1]) <= last.exact

    def before(self, end: int) -> Run:
        """Its part before this prompt token."""
        nodes = [node for node, start in self.places() if start < end]
        return Run(self.start, end - self.start, nodes, self.offset)

    def places(self) -> Iterator[tuple[Node, int]]:
        """Each node, and the index in the prompt that its first token would have."""
        start = self.start - self.offset
        for node in self.nodes:
            yield node, start
            start += node.length

    def segment(self, page_size: int) -> Segment:
        """The run with its slots, in the page of each node that is copied from."""
        slots = run_of_slots([node.donor for node in self.nodes], self.offset, self.length, page_size)
        return Segment(self.start, self.length, self.nodes[0].start + self.offset, slots, self.exact)


class SegmentSearch:
    """One search in one prompt, for one call of `run`."""

    def __init__(
        self,
        prompt: Int32[np.ndarray, "tokens"],
        namespace: str,
        windows: WindowIndex,
        page_size: int,
        last_used: Int64[np.ndarray, "pages"],
        enough: int = sys.maxsize,
    ) -> None:
        """
        Args:
          prompt: the ids of all tokens.
          namespace: only its nodes are searched.
          last_used: when each page of the store was last used; a larger number is later.
          enough: among donors that have this many tokens of a run or more, the search takes the one that was used last,
            not the longest. A run of an approximate donor then ends where an exact one has as many.
        """
        self._prompt = prompt
        self._bytes = prompt.tobytes()
        self._namespace = namespace
        self._windows = windows
        self._page_size = page_size
        self._last_used = last_used
        self._enough = enough
        self._budget = COMPARISON_BUDGET

    def run(self, begin: int, min_segment: int) -> list[Run]:
        """Disjoint runs of at least `min_segment` tokens, in order. None starts before prompt token `begin`."""
        offsets, hashes = self._windows.probe(self._prompt[begin:], self._namespace)
        anchors, values = (offsets + begin).tolist(), hashes.tolist()
        runs: list[Run] = []
        i = 0
        while i < len(anchors):
            run = self._best(values[i], anchors[i], begin, min_segment) if values[i] in self._windows else None
            if run is not None:
                run = self._best_of_next_anchors(run, anchors, values, i, begin)
                runs.append(self._up_to_exact(run, anchors, values, i, min_segment))
                begin = runs[-1].start + runs[-1].length
                i = bisect_left(anchors, begin, i)
            elif self._budget > 0:
                i += 1
            else:
                i = bisect_left(anchors, anchors[i] + HURRIED_STRIDE, i)
        return runs

    def copies(self) -> list[Run]:
        """Every stored run that holds a window of the text and is long enough to be found: the text's, and copies."""
        self._budget = sys.maxsize
        offsets, hashes = self._windows.probe(self._prompt, self._namespace)
        runs: list[Run] = []
        seen: set[tuple[Node, int]] = set()  # a node, and the index in the text of its first token
        for at, value in zip(offsets.tolist(), hashes.tolist(), strict=True):
            for node, offset in self._windows.places(value):
                run = None if (node, at - offset) in seen else self._run_around(node, offset, at, 0)
                if run is not None and run.length >= LEAST_FOUND:
                    runs.append(run)
                    seen.update(run.places())
        return runs

    def _rank(self, run: Run) -> tuple[bool, int, int]:
        """An exact run is better than an approximate one, then a longer one, then one that was used more recently.

        Of a run, the page in its middle says when: those at its ends are of the runs beside it too.
        """
        middle = run.nodes[len(run.nodes) // 2]
        return run.exact, min(run.length, self._enough), int(self._last_used[middle.pages[0]])

    def _best(self, value: int, at: int, floor: int, least: int) -> Run | None:
        """The best run of at least `least` tokens through prompt tokens `at` .. `at` + 7, whose hash is `value`.

        It does not start before prompt token `floor`. None if there is no such run.
        """
        best = None
        for node, offset in self._windows.candidates(value):
            run = self._run_around(node, offset, at, floor)
            if run is not None and run.length >= least and (best is None or self._rank(run) > self._rank(best)):
                best = run
            if self._budget < 0:
                break
        return best

    def _best_of_next_anchors(self, best: Run, anchors: list[int], values: list[int], i: int, floor: int) -> Run:
        """The best run that covers the beginning of `best`, which was found at anchor `i`.

        Another donor's windows may begin up to 7 tokens later in the prompt, so the anchors there are tried too. An
        anchor with a hash that was tried already has the same text, and leads to the same places.
        """
        seen = {values[i]}
        for j in range(i + 1, bisect_left(anchors, anchors[i] + WINDOW, i)):
            if values[j] not in seen and self._budget > 0:
                seen.add(values[j])
                run = self._best(values[j], anchors[j], floor, min(best.length, self._enough) if best.exact else 1)
                if run is not None and run.start <= best.start and self._rank(run) > self._rank(best):
                    best = run
        return best

    def _up_to_exact(self, run: Run, anchors: list[int], values: list[int], i: int, min_segment: int) -> Run:
        """An approximate run, found at anchor `i`, up to where an exact one begins that is long enough.

        That one itself, if too little is before it.
        """
        end = run.start + run.length
        if run.exact or run.length < self._enough:
            return run
        while (i := i + 1) < len(anchors) and anchors[i] < end and self._budget > 0:
            exact = self._best(values[i], anchors[i], run.start, 1) if self._windows.has_exact(values[i]) else None
            if exact is not None and exact.exact and exact.length >= self._enough:
                return run.before(exact.start) if exact.start - run.start >= min_segment else exact
            if exact is not None and exact.exact:
                i = bisect_left(anchors, exact.start + exact.length, i) - 1
        return run

    def _run_around(self, node: Node, offset: int, at: int, floor: int) -> Run | None:
        """The longest run that has the token at `offset` of `node` as prompt token `at`. None if they differ.

        In the module's docstring: offset 0 of page 9's node is prompt token 6. `_right` gives the nodes of pages 9 and
        1 and end = 17, `_left` gives the node of page 4 and start = 3, so the offset in it is 0 - (6 - 3) + 8 = 5.
        """
        if node.namespace != self._namespace:
            return None
        nodes, end = self._right(node, offset, at)
        before, start = self._left(node, offset, at, floor)
        if end == at:
            return None
        first_offset = offset - (at - start) + sum(other.length for other in before)
        return Run(start, end - start, before + nodes, first_offset)

    def _slice(self, start: int, end: int) -> bytes:
        return self._bytes[start * TOKEN_BYTES : end * TOKEN_BYTES]

    def _right(self, node: Node, offset: int, at: int) -> tuple[list[Node], int]:
        """Compare to the right from `at`. Returns the nodes from `node` on, and the end of the equal prompt tokens."""
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
        """The child of `node` that shares the most tokens with the prompt from `at` on, and how many. Else (None, 0).

        Of two that share equally many, the sharable one.
        """
        row = self._slice(at, at + self._page_size)
        child = node.child(row)
        if child is not None:
            self._budget -= 1
            return child, child.length
        if self._budget < 0:
            return None, 0
        best, most = None, (0, False)
        for number, (shared, child) in enumerate(node.children.near(row)):
            if shared < most[0] or most[1] or number == MOST_TIES:
                break
            self._budget -= 1
            if (shared, child.sharable) > most:
                best, most = child, (shared, child.sharable)
        return best, most[0]

    def _left(self, node: Node, offset: int, at: int, floor: int) -> tuple[list[Node], int]:
        """Compare to the left from `at`. Returns the nodes before `node`, and the start of the equal prompt tokens.

        `whole` is where the run would start if it covered its first node from the node's first token on. Only a run
        that does can go on in the parent.
        """
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
