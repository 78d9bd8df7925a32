"""What the contexts of agents take of a store: each of them, and all together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.derived import Derived
from sparsex_jax.cache.tree import Node


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What some contexts take.

    Attributes:
      found: the share of their tokens that is stored in place.
      dense: bytes of the pages of what is found, if each context had its own.
      together: bytes of all that they cannot do without: pages of the store, each counted once and as a whole, and the
        tables of derived pages.
      mirrors: of each context that has derived pages, what it adds to the others, as a share of its dense bytes: patch
        rows, tables, and pages that are stored as they are and that no other context needs.
    """

    found: float
    dense: int
    together: int
    mirrors: tuple[float, ...]

    @property
    def times_smaller(self) -> float:
        return self.dense / self.together if self.together else 1.0


def store_bytes(cache: PageCache, page_bytes: float) -> float:
    """Bytes that a store cannot give up without losing something: pages that are neither free nor spare, and tables."""
    stats = cache.stats()
    tables = sum(rows.table_bytes for rows in cache.mirrors.derived.values())
    return (stats.pages - stats.free - stats.spare) * page_bytes + tables


def footprint(
    cache: PageCache, contexts: Sequence[Int32[np.ndarray, "tokens"]], namespace: str, page_bytes: float
) -> Footprint:
    """The footprint of contexts, of which a prefix may be stored.

    Args:
      page_bytes: of a page of the store.
    """
    prefixes = [cache.tree.prefix(context.tobytes(), namespace, lambda _: True) for context in contexts]
    stored = [[*prefix.nodes, *([prefix.tail] if prefix.tail else [])] for prefix in prefixes]
    found = sum(prefix.num_tokens for prefix in prefixes) / sum(map(len, contexts))
    needs = Counter(page for nodes in stored for page in {page for node in nodes for page in _pages_of(cache, node)})
    tables = sum(rows.table_bytes for rows in {rows for nodes in stored for rows in _derived(cache, nodes)})
    mirrored = [nodes for nodes in stored if _derived(cache, nodes)]
    mirrors = tuple(_own_bytes(cache, nodes, needs, page_bytes) / (len(nodes) * page_bytes) for nodes in mirrored)
    dense = sum(map(len, stored)) * page_bytes
    return Footprint(found, int(dense), int(len(needs) * page_bytes + tables), mirrors)


def _derived(cache: PageCache, nodes: Sequence[Node]) -> list[Derived]:
    return [cache.mirrors.derived[node.donor] for node in nodes if node.derived is not None]


def _pages_of(cache: PageCache, node: Node) -> tuple[int, ...]:
    """The pages of the store that a node needs."""
    return (node.donor,) if node.derived is None else cache.mirrors.derived[node.donor].bases


def _own_bytes(cache: PageCache, nodes: Sequence[Node], needs: Mapping[int, int], page_bytes: float) -> float:
    """What the nodes of a context add to what others need.

    Args:
      needs: how many contexts need each page.
    """
    rows = _derived(cache, nodes)
    slots = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.patch[each.depth > 0] for each in rows)]))
    dense = sum(node.derived is None and needs[node.donor] == 1 for node in nodes)
    return (dense + len(slots) / cache.page_size) * page_bytes + sum(each.table_bytes for each in rows)
