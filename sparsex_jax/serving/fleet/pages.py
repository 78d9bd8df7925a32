"""What comes into a store, and the tiers below it, and goes: written down on the loop's thread, read on another."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from sparsex_jax.cache.children import TOKEN_BYTES
from sparsex_jax.cache.tree import Node
from sparsex_jax.cache.windows import WINDOW
from sparsex_jax.tiers.blocks import Block

_BEFORE = (WINDOW - 1) * TOKEN_BYTES  # of the page before: windows may begin there


class Page(NamedTuple):
    """A page of the store, or a block of the tiers below, as it was when something happened to it. Any thread may read
    it.

    Attributes:
      is_stored: it came; else it went.
      node: stands for it, and is not looked into. A block's is its key.
      parent: the node of the page before it. None: there is none, or it is not known.
      tokens: its own, int32 as bytes.
      before: the last 7 of the page before, if that is known. Windows that begin there are told of as long as the page
        itself is there, also where the page before went first.
      is_in_prefix: it is on the devices, and so is all before it, from position 0 on.
    """

    is_stored: bool
    node: Hashable
    parent: Hashable | None
    namespace: str
    tokens: bytes
    before: bytes
    is_in_prefix: bool

    @classmethod
    def of(cls, node: Node, is_stored: bool) -> Page:
        parent = node.parent if node.parent is not None and node.parent.pages else None
        before = parent.key[-_BEFORE:] if parent is not None else b""
        return cls(is_stored, node, parent, node.namespace, node.key, before, node.in_place)

    @classmethod
    def of_block(cls, block: Block, is_stored: bool) -> Page:
        return cls(is_stored, block.key, None, block.namespace, block.tokens, b"", False)


LEAST_MOST = 1 << 18  # some 30 MB, and more than any store and its tiers tell at once


class Journal:
    """An observer of a store that takes down what happens until somebody reads it. It never waits.

    Of more than `most` pages nobody has read, nothing is kept: `is_lost`, until the cache tells everything again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._mutex = threading.Lock()  # held for as long as it takes to append
        self._pages: list[Page] = []
        self._is_cleared = self._is_lost = False

    def stored(self, nodes: Sequence[Node]) -> None:
        self._take([Page.of(node, True) for node in nodes])

    def removed(self, nodes: Sequence[Node]) -> None:
        self._take([Page.of(node, False) for node in nodes])

    def block_stored(self, block: Block) -> None:
        self._take([Page.of_block(block, True)])

    def block_removed(self, block: Block) -> None:
        self._take([Page.of_block(block, False)])

    def cleared(self) -> None:
        with self._mutex:
            self._pages, self._is_cleared, self._is_lost = [], True, False

    def _take(self, pages: list[Page]) -> None:
        with self._mutex:
            if self._is_lost or len(self._pages) + len(pages) > self._most:
                self._pages, self._is_lost = [], True
            else:
                self._pages += pages

    @property
    def is_lost(self) -> bool:
        """Something was not taken down. `Admission.watch`, behind `cleared`, tells everything again."""
        with self._mutex:
            return self._is_lost

    def read(self) -> tuple[bool, list[Page]]:
        """Whether everything before is void, and what happened since, in order. Nothing of it is given again."""
        with self._mutex:
            taken = self._is_cleared, self._pages
            self._is_cleared, self._pages = False, []
            return taken
