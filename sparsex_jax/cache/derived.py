"""Derived rows: the KV of tokens that is made of what the store has elsewhere, exactly as it was made the first time.

A sequence whose segments were copied from donors differs from them where it was computed again. What it computed is
kept, its *patch rows*, and the rest is copied once more when it is wanted: the same copy, from the same rows, with the
same rotation, so that not a bit differs. A row is one token's KV in one layer. Of 4 layers, a token with depth 1:

    layer 0    slot `patch`, in layer 0 + `layer`          the row that was computed at the token's own position
    layer 1    slot `source`, its key rotated by `shift`   \\
    layer 2    slot `source`, its key rotated by `shift`    the donor's rows
    layer 3    slot `source`, its key rotated by `shift`   /

Patch rows are packed into slots of pages of their own, short stacks of them above each other. A token that was computed
in all layers has a slot there to itself, which is as good a source as any page of a sequence. So a source always has
its rows as they are, and a donor that is derived itself is never one: what was copied from it came from its sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """Where the rows of some tokens are. All arrays have a number for each token.

    Attributes:
      source: the slot of the rows from layer `depth` on; anything where the depth is all layers. -1 where no token is.
      shift: by how many positions their keys are rotated.
      depth: how many layers, from the first on, are patch rows.
      patch: their slot; any where the depth is 0.
      layer: which layer of that slot has the row of layer 0.
      bases: the pages that all of these are in, once they are known.
    """

    source: Int64[np.ndarray, "tokens"]
    shift: Int64[np.ndarray, "tokens"]
    depth: Int64[np.ndarray, "tokens"]
    patch: Int64[np.ndarray, "tokens"]
    layer: Int64[np.ndarray, "tokens"]
    bases: tuple[int, ...] = ()

    @classmethod
    def stored(cls, slots: Int64[np.ndarray, "tokens"]) -> Derived:
        """Rows that are in these slots as they are."""
        nothing = np.zeros_like(slots)
        return cls(slots, nothing, nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.source)

    def at(self, places: Int64[np.ndarray, "some"] | Bool[np.ndarray, "tokens"] | slice) -> Derived:
        """Of some of the tokens."""
        source, shift, depth, patch, layer = (each[places] for each in self._arrays())
        return Derived(source, shift, depth, patch, layer)

    def _arrays(self) -> tuple[Int64[np.ndarray, "tokens"], ...]:
        return self.source, self.shift, self.depth, self.patch, self.layer

    @classmethod
    def joined(cls, parts: Sequence[Derived]) -> Derived:
        each = zip(*(part._arrays() for part in parts), strict=True)
        source, shift, depth, patch, layer = map(np.concatenate, each)
        return cls(source, shift, depth, patch, layer)

    def as_sources(self, num_layers: int) -> Derived:
        """The same rows, as far as they are whole slots of this many layers: those are sources as they are."""
        whole = self.depth == num_layers
        source, shift = np.where(whole, self.patch, self.source), np.where(whole, 0, self.shift)
        return dataclasses.replace(self, source=source, shift=shift, depth=np.where(whole, 0, self.depth))

    def with_bases(self, num_layers: int, page_size: int) -> Derived:
        """The same, with the pages that they are in."""
        pages = np.unique(self.patch[self.depth > 0] // page_size).tolist()
        return dataclasses.replace(
            self, bases=tuple(dict.fromkeys([*self.source_pages(num_layers, page_size), *pages]))
        )

    def source_pages(self, num_layers: int, page_size: int) -> list[int]:
        """The pages of the slots that are copied from, each once."""
        copied = (self.depth < num_layers) & (self.source >= 0)
        return np.unique(self.source[copied] // page_size).tolist()

    @property
    def table_bytes(self) -> int:
        """Host memory of these numbers."""
        return sum(each.nbytes for each in self._arrays()) + 8 * len(self.bases)

    @property
    def num_rows(self) -> int:
        """Patch rows."""
        return int(self.depth.sum())


def pack(
    depth: Int64[np.ndarray, "pages page_size"], num_layers: int
) -> tuple[Int64[np.ndarray, "pages page_size"], Int64[np.ndarray, "pages page_size"], Int64[np.ndarray, "pages"]]:
    """Places for the patch rows of tokens: a column, which is a slot in all layers, and the layer to begin at.

    Stacks of one page and one depth share columns: as many as fit above each other. Neighbours are beside each other
    and not above, so that kernels can move them together. No two pages share a column.

        4 layers, depth     2  1  4  1  1  0      of one page
                 column     1  2  0  2  2  -      deep ones first: 4, then 2, then the three of 1
                 layer      0  0  0  1  2  -

    Returns:
      For each token its column, counted from 0 over all pages, and its layer; 0 for those of depth 0. For each page how
      many columns it has.
    """
    page, place = np.nonzero(depth)
    deep = depth[page, place]
    order = np.lexsort((place, -deep, page))
    page, place, deep = page[order], place[order], deep[order]
    starts = np.ones(len(page), bool)
    starts[1:] = (np.diff(page) != 0) | (np.diff(deep) != 0)
    first, group = np.flatnonzero(starts), np.cumsum(starts) - 1
    size = np.diff(np.append(first, len(page)))
    width = -(-size // (num_layers // deep[first]))  # columns of each group
    begin = np.cumsum(width) - width
    rank = np.arange(len(page)) - first[group]
    column, layer = np.zeros_like(depth), np.zeros_like(depth)
    column[page, place] = begin[group] + rank % width[group]
    layer[page, place] = rank // width[group] * deep
    columns = np.bincount(page[first], width, len(depth)).astype(np.int64)
    return column, layer, columns
