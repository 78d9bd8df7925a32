"""Several answers to a prompt that is not to be kept: it is computed once all the same."""

from __future__ import annotations

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.tree import Node


class Lent:
    """A prompt that can be found until all of its answers have ended.

    Meanwhile other prompts of its namespace can find it too. What is found of it is never written to a lower tier.
    """

    def __init__(self, num_answers: int) -> None:
        self._num_open = num_answers
        self._nodes: dict[int, Node | None] = {}

    def commit(self, cache: PageCache, pages: list[int]) -> None:
        """Note pages of a sequence's own that it has just made findable."""
        self._nodes |= {page: cache.tree.node_of[page] for page in pages}

    def end_one(self, cache: PageCache) -> None:
        """One of the answers has ended. With the last one, nothing can be found any more."""
        self._num_open -= 1
        if self._num_open == 0:
            there = [page for page, node in self._nodes.items() if node and cache.tree.node_of[page] is node]
            cache.withdraw(there)
            self._nodes = {}
