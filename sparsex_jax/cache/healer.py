"""What is made exact next: the prompts whose exact prefill replaces approximate content of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache.children import TOKEN_BYTES
from sparsex_jax.cache.tree import Node, PageTree

TRIES = 8  # sequences for which room is looked for; each costs a walk through its pages


class Healer:
    """Chooses for one cache."""

    def __init__(
        self,
        tree: PageTree,
        page_size: int,
        is_kept: Callable[[int], bool],
        drop: Callable[[Sequence[int]], None],
    ) -> None:
        """
        Args:
          is_kept: whether an entry or a pin has a page.
          drop: removes pages that are of no more use.
        """
        self._tree, self._page_size, self._is_kept, self._drop = tree, page_size, is_kept, drop

    def next(self, most: int, num_available: int) -> tuple[Int32[np.ndarray, "tokens"], str] | None:
        """As `PageCache.to_heal`.

        Args:
          num_available: pages that can be had now.
        """
        before = -1
        while len(self._tree.approximate) != before:  # until none of them is retired any more
            before = len(self._tree.approximate)
            for chain in self._tree.approximate_chains(TRIES):
                tokens = self._prompt_of(chain, most, num_available)
                if tokens is not None:
                    return tokens, chain[0].namespace
        return None

    def _prompt_of(self, chain: list[Node], most: int, num_available: int) -> Int32[np.ndarray, "tokens"] | None:
        """The prompt for one chain. None if there is no room for it, or if it is exact elsewhere: then its end goes.

        Nor for one with pages that are derived: exact ones would take the room that is saved. It is settled then.
        """
        if any(node.derived is not None for node in chain):
            for node in chain:
                self._tree.settle(node)
            return None
        prompt = b"".join(node.key for node in chain)
        exact = self._tree.prefix(prompt, chain[0].namespace).num_tokens
        length = len(prompt) // TOKEN_BYTES
        if exact == length:
            self._retire(chain[-1])
            return None
        end = self._end(exact, length, most)
        pages = -(-end // self._page_size) + (exact % self._page_size > 0)  # the tail's donor is held meanwhile
        return np.frombuffer(prompt[: end * TOKEN_BYTES], np.int32) if pages <= num_available else None

    def _retire(self, node: Node) -> None:
        """Drop an approximate node whose tokens are all in an exact prefix as well, unless an entry or a pin has it."""
        self._tree.settle(node)
        if not any(map(self._is_kept, node.pages)):
            self._drop(list(node.pages))

    def _end(self, exact: int, length: int, most: int) -> int:
        """Where the next `most` tokens end: with a page, as pages are replaced as a whole, or with the content."""
        if exact + most >= length:
            return length
        whole_pages = (exact + most) // self._page_size
        return min(max(whole_pages, exact // self._page_size + 1) * self._page_size, length)
