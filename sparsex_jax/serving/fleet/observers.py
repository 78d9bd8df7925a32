"""Several observers of one store."""

from __future__ import annotations

from collections.abc import Sequence

from sparsex_jax.cache.tree import Node
from sparsex_jax.scheduler.admission import StoreObserver
from sparsex_jax.tiers.blocks import Block


class Observers:
    """Tells all of them what it is told."""

    def __init__(self, *observers: StoreObserver) -> None:
        self._all = observers

    def stored(self, nodes: Sequence[Node]) -> None:
        for each in self._all:
            each.stored(nodes)

    def removed(self, nodes: Sequence[Node]) -> None:
        for each in self._all:
            each.removed(nodes)

    def cleared(self) -> None:
        for each in self._all:
            each.cleared()

    def block_stored(self, block: Block) -> None:
        for each in self._all:
            each.block_stored(block)

    def block_removed(self, block: Block) -> None:
        for each in self._all:
            each.block_removed(block)
