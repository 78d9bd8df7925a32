"""Several observers of one cache."""

from __future__ import annotations

from collections.abc import Sequence

from sparsex_jax.cache.tree import Node
from sparsex_jax.cache.windows import Observer


class Observers:
    """Tells all of them what the cache tells it."""

    def __init__(self, *observers: Observer) -> None:
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
