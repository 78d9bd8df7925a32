"""Mirrors: sequences that are stored as what sets them apart from the donors that they were copied from.

Ten agents that read the same history have ten copies of its KV, alike but for the few tokens that each computed again.
`derive` gives the pages of such a sequence derived pages beside them (`sparsex_jax.cache.derived`). From then on the
pages themselves are spare, and the first to be evicted; what is left of a page of the store are some patch rows.

    pages of the store      [donor's page 4] [donor's page 5]  [7: patch rows of 21 and 22]
    derived pages            21 rests on 4 and 7     22 rests on 4, 5 and 7

A derived page that a prompt finds in its prefix is restored first: a page of the store gets its rows, and belongs to
the same node. Segments are copied from derived pages without that.

What derived pages rest on stays while they do, even if no lookup finds it any more. When pages are needed, derived ones
are evicted like others, those that were used longest ago first, and then what they rested on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from sparsex_jax.cache.counts import CacheCounts
from sparsex_jax.cache.derived import Derived, pack
from sparsex_jax.cache.pages import PagePool
from sparsex_jax.cache.segments import Segment
from sparsex_jax.cache.tree import Node, PageTree
from sparsex_jax.errors import StoreFullError

# Tokens of a run that make a donor as good as one that has more of them: if each sequence took its longest donors, they
# would rest on many, all of which the store would have to keep.
ENOUGH = 256
LEAST_SAVED = 0.25  # of a page's slots; with less, a page stays as it is


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Patch rows to move: layers [0, depth) of slot `source` go to slot `target`, from layer `layer` on.

    Attributes:
      pages: the derived pages that are made of them.
    """

    pages: tuple[int, ...]
    source: Int64[np.ndarray, "tokens"]
    target: Int64[np.ndarray, "tokens"]
    layer: Int64[np.ndarray, "tokens"]
    depth: Int64[np.ndarray, "tokens"]


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """Where the rows of a sequence's tokens came from, and whether that is still there.

    Attributes:
      rows: of each token, what it was copied from; a depth of all layers: of nothing.
      births: of each page of the store that is named there, how often it had been handed out then.
    """

    rows: Derived
    births: dict[int, int]


@dataclasses.dataclass(eq=False)
class _Open:
    """The page whose last columns are still to be filled with patch rows."""

    page: int = -1
    birth: int = 0
    used: int = 0


class Mirrors:
    """The derived pages of one cache.

    Attributes:
      num_layers: of the model. 0: nothing is derived.
      counts: where pages are counted that are derived and restored.
    """

    def __init__(
        self,
        pool: PagePool,
        tree: PageTree,
        page_size: int,
        num_layers: int,
        allocate: Callable[[int], list[int]],
        counts: CacheCounts,
    ) -> None:
        """
        Args:
          allocate: as `PageCache.allocate`.
        """
        self._pool, self._tree, self._page_size, self.num_layers = pool, tree, page_size, num_layers
        self._allocate, self.counts = allocate, counts
        self._open = _Open()

    # Finding rows -------------------------------------------------------------------------------------------

    def located(self, segment: Segment) -> Segment:
        """The same segment with its `rows`, if some of its slots are of derived pages. They stay as long as those."""
        pages = segment.slots // self._page_size
        if (pages < len(self._pool)).all():
            return segment
        rows = Derived.joined(list(self._located(pages, segment.slots)))
        return dataclasses.replace(segment, slots=rows.source, rows=rows)

    def _located(self, pages: Int64[np.ndarray, "tokens"], slots: Int64[np.ndarray, "tokens"]) -> Iterator[Derived]:
        """The rows of these slots, from one change of the page to the next."""
        for part in np.split(slots, np.flatnonzero(np.diff(pages)) + 1):
            page = int(part[0]) // self._page_size
            if self._pool.is_derived(page):
                yield self._pool.derived[page].at(part % self._page_size).as_sources(self.num_layers)
            else:
                yield Derived.stored(part)

    def slots_of(self, page: int) -> Int64[np.ndarray, "slots"]:
        """The slots of the store that the content of a page is in: its own, or those that a derived one rests on."""
        rows = self._pool.derived.get(page)
        if rows is not None:
            return np.concatenate([rows.source[rows.depth < self.num_layers], rows.patch[rows.depth > 0]])
        node = self._tree.node_of[page]
        return page * self._page_size + np.arange(node.length if node else 0)

    # Deriving -----------------------------------------------------------------------------------------------

    def origins(self, segments: Sequence[Segment], length: int) -> Origins:
        """What a prompt of this length is about to be copied from.

        Args:
          segments: as `located` gives them.
        """
        source, shift, nothing = (np.zeros(length, np.int64) for _ in range(3))
        depth = np.full(length, self.num_layers)
        for segment in segments:
            copied = segment.rows or Derived.stored(segment.slots)
            own = slice(segment.start, segment.end)
            source[own], depth[own], shift[own] = copied.source, copied.depth, segment.shift + copied.shift
        rows = Derived(source, shift, depth, nothing, nothing)
        pages = rows.source_pages(self.num_layers, self._page_size)
        return Origins(rows, {page: int(self._pool.births[page]) for page in pages})

    def derive(
        self, pages: Sequence[int], origins: Origins, depth: Int64[np.ndarray, "tokens"], first: int = 0
    ) -> Packing | None:
        """Give the pages of a sequence derived pages, where that saves enough. None if it saves no page.

        Until the rows are moved, the pages must be held, and nothing may be written to the store.

        Args:
          pages: all that the sequence holds, in order; those are looked at that are its own and committed.
          depth: how many layers of each of the prompt's tokens were computed, from the first on. Tokens behind the
            prompt, those of the answer, are computed in all layers.
          first: how many pages at its beginning are not its own.
        """
        own = [number for number in range(first, len(pages)) if self._may_derive(pages[number])]
        if not own:
            return None
        rows = self._rows_at(own, [self._tree[pages[number]].length for number in own], origins, depth)
        _, _, columns = pack(rows.depth.reshape(-1, self._page_size), self.num_layers)
        worth = columns <= (1 - LEAST_SAVED) * self._page_size
        kept = [pages[number] for number, is_worth in zip(own, worth, strict=True) if is_worth]
        return self._store(kept, rows.at(np.repeat(worth, self._page_size)))

    def _may_derive(self, page: int) -> bool:
        """Whether a page is the only one with its content, and is evicted one day."""
        node, pool = self._tree.node_of[page], self._pool
        kept = pool.frozen[page] > 0 or pool.pinned[page] > 0
        return node is not None and node.pages == [page] and node.exact < node.length and not kept

    def _rows_at(
        self, numbers: list[int], lengths: list[int], origins: Origins, depth: Int64[np.ndarray, "tokens"]
    ) -> Derived:
        """Where the rows of the slots of some pages came from. Slots behind a page's tokens have the depth 0."""
        size, from_donors = self._page_size, origins.rows
        places = (np.array(numbers)[:, None] * size + np.arange(size)).ravel()
        known = places < len(depth)
        rows = from_donors.at(np.where(known, places, 0))
        gone = [page for page, birth in origins.births.items() if not self._is_there(page, birth)]
        lost = ~known | np.isin(rows.source // size, gone)
        computed = np.maximum(depth[np.where(known, places, 0)], rows.depth)
        deep = np.where(lost, self.num_layers, computed)
        there = places % size < np.repeat(lengths, size)
        return dataclasses.replace(rows, source=np.where(there, rows.source, -1), depth=np.where(there, deep, 0))

    def _is_there(self, page: int, birth: int) -> bool:
        """Whether a page still has what it had when it had been handed out that often."""
        pool = self._pool
        return int(pool.births[page]) == birth and bool(pool.committed[page] or pool.rested_on[page])

    def _store(self, pages: list[int], rows: Derived) -> Packing | None:
        """Give these pages derived ones, made of these rows. None if there is no room, or it takes as many pages."""
        column, layer, columns = pack(rows.depth.reshape(-1, self._page_size), self.num_layers)
        begun, size = self._begun(), self._page_size
        lacking = int(columns.sum()) - (size - self._open.used if begun else 0)
        num_new = max(-(-lacking // size), 0)
        if num_new >= len(pages):
            return None
        held = list(dict.fromkeys([*rows.source_pages(self.num_layers, size), *begun]))
        self._pool.hold(held)
        try:
            new = self._allocate(num_new)
            held += new
            slots = self._take_columns(begun, new, int(columns.sum()))
            patch = np.where(rows.depth > 0, np.append(slots, 0)[column.ravel()], 0)
            return self._add(pages, dataclasses.replace(rows, patch=patch, layer=layer.ravel()))
        except StoreFullError:
            return None
        finally:
            self._pool.release(held)

    def _begun(self) -> list[int]:
        """The page with columns left, if there is one still."""
        page, pool = self._open.page, self._pool
        there = page >= 0 and self._is_there(page, self._open.birth) and not pool.committed[page]
        return [page] if there and self._open.used < self._page_size else []

    def _take_columns(self, begun: list[int], new: list[int], number: int) -> Int64[np.ndarray, "columns"]:
        """The slots of the next `number` columns, of the page that is begun and of new ones."""
        size, used = self._page_size, self._open.used if begun else 0
        slots = (np.array([*begun, *new], np.int64)[:, None] * size + np.arange(size)).ravel()[used : used + number]
        if number:
            last = int(slots[-1])
            self._open = _Open(last // size, int(self._pool.births[last // size]), last % size + 1)
        return slots

    def _add(self, pages: list[int], rows: Derived) -> Packing:
        """Add a derived page for each of these; as many as there are numbers for."""
        size, numbers = self._page_size, []
        for at, page in enumerate(pages):
            own = rows.at(slice(at * size, at * size + self._tree[page].length))
            number = self._pool.add_derived(own.with_bases(self.num_layers, size))
            if number is None:
                break
            self._tree.add_derived(self._tree[page], number)
            self._pool.committed[number] = self._pool.spare[page] = True
            numbers.append(number)
        self._pool.touch(numbers)
        self.counts.derived_pages += len(numbers)
        return self._packing(pages, numbers, rows)

    def _packing(self, pages: list[int], numbers: list[int], rows: Derived) -> Packing:
        size = self._page_size
        source = (np.array(pages, np.int64)[:, None] * size + np.arange(size)).ravel()
        moved = (rows.depth > 0) & (np.arange(len(source)) < len(numbers) * size)
        own = rows.at(moved)
        return Packing(tuple(numbers), source[moved], own.patch, own.layer, own.depth)

    # Restoring ----------------------------------------------------------------------------------------------

    def restore(self, derived: Sequence[int], pages: Sequence[int]) -> list[Segment]:
        """Let pages of the store, which the caller holds, have the content of derived ones.

        Returns:
          What to copy into those pages, laid end to end, before anything reads them.
        """
        copies = []
        for place, (number, page) in enumerate(zip(derived, pages, strict=True)):
            node, rows = self._tree[number], self._pool.derived[number]
            self._tree.add_restored(node, page)
            self._pool.committed[page] = self._pool.spare[page] = True
            start = place * self._page_size
            copies.append(Segment(start, node.length, start, rows.source, exact=False, rows=rows))
        self.counts.restored_pages += len(copies)
        return copies

    @property
    def derived(self) -> Mapping[int, Derived]:
        """By their numbers, what derived pages are made of."""
        return self._pool.derived

    def is_derived(self, page: int) -> bool:
        """Whether this is the number of a derived page."""
        return self._pool.is_derived(page)

    def saved(self, num_bases: int) -> int:
        """Pages more that the store would need without derived ones, of which so many are bases and nothing else."""
        return max(len(self._pool.derived) - self._pool.num_spares - num_bases, 0)

    def detach(self, pages: Sequence[int]) -> list[Node]:
        """Remove pages from the tree. Returns the nodes that have none any more."""
        for page in pages:
            content = self._tree[page].pages if self.is_derived(page) else [page]
            self._pool.spare[content] = False
        return [node for node in map(self._tree.detach, pages) if node is not None]
