"""Loads blocks from host memory into the store: segments and approximate prefixes, when a prompt is admitted.

They are committed as what they were, so that the lookup of the prompt finds them. Exact prefixes come before that
(`sparsex_jax.scheduler.restoring`), and here only if some of one was evicted again meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.link import Arriving, Link
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError, StoreFullError
from sparsex_jax.reuse.methods import Method
from sparsex_jax.scheduler.blocks import maker_of
from sparsex_jax.scheduler.choice import look_up
from sparsex_jax.scheduler.tiers import MOST_MOVING, Tiers
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.index import Found

log = logging.getLogger(__name__)


class Loading:
    """What the tiers have of prompts, and how it gets into the store."""

    def __init__(self, tiers: Tiers, runner: Runner, link: Link) -> None:
        self._tiers, self._runner, self._link = tiers, runner, link

    def load(
        self,
        cache: PageCache,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        method: Method,
        came_from: dict[Node, str],
    ) -> int:
        """Load what host memory has of a prompt and the store lacks, and commit it there. Returns how many tokens.

        Args:
          came_from: takes up which tier each page was loaded from.

        Nothing is loaded where there are no pages for it, or where the link fails: the prompt is computed then.
        """
        if not (method.uses_prefix or method.uses_segments) or not self._tiers.has_host_blocks:
            return 0
        match, loaded = self.look(cache, tokens, namespace, method), 0
        try:
            chain, others = self.lacking(tokens, namespace, method, match)
            chain = list(itertools.takewhile(self._is_here, chain))
            loaded += self._restore_prefix(cache, tokens, namespace, match, chain, came_from)
            for found in filter(self._is_here, others):
                loaded += self._restore_segment(cache, found, came_from)
        except StoreFullError:
            log.debug("there are no pages for what could be loaded")
        except LinkError:
            log.exception("stored KV could not be loaded; it is computed")
        finally:
            cache.unpin(match)
        return loaded

    def _came(
        self, cache: PageCache, found: Found, pages: Sequence[int], num_tokens: int, came_from: dict[Node, str]
    ) -> None:
        """Count tokens of a block as loaded, and note where the committed pages that they are in came from."""
        tier = self._tiers.got(found.block.key, num_tokens)
        nodes = (cache.tree.node_of[page] for page in pages)
        came_from |= {node: tier for node in nodes if node is not None}

    def _is_here(self, found: Found) -> bool:
        return self._tiers.is_here(found.block.key)

    def look(self, cache: PageCache, tokens: Int32[np.ndarray, "tokens"], namespace: str, method: Method) -> Match:
        """What the store has already."""
        return look_up(cache, tokens, namespace, method, self._runner.model.num_layers)

    def lacking(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, method: Method, match: Match
    ) -> tuple[list[Found], list[Found]]:
        """Blocks that go on where the prompt's prefix in the store ends, in order, and those with other segments."""
        lacking = np.ones(len(tokens), bool)
        for begin, end in _ranges(match):
            lacking[begin:end] = False
        chain: list[Found] = []
        if method.uses_prefix:
            accepts = functools.partial(method.accepts, num_layers=self._runner.model.num_layers)
            whole = self._tiers.index.prefix(tokens[:-1], namespace, lambda block: accepts(maker_of(block)))
            chain = [each for each in whole if each.block.start + each.num_tokens > match.num_prefix_tokens]
            lacking[: end_of(chain)] = False
        others: list[Found] = []
        if method.uses_segments:
            others = self._tiers.index.segments(tokens, namespace, lacking, method.min_segment_tokens)
        known = {each.block.key for each in chain}
        return chain, [each for each in others if each.block.key not in known]

    def _restore_prefix(
        self,
        cache: PageCache,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        match: Match,
        chain: list[Found],
        came_from: dict[Node, str],
    ) -> int:
        if not chain:
            return 0
        page_size, shared = self._tiers.index.page_size, match.prefix_pages
        end = end_of(chain)
        first, last = len(shared), -(-end // page_size)
        if last <= first:
            return 0
        new = cache.allocate(last - first)
        cache.share(shared)
        pages = [*shared, *new]
        with _released(cache, pages):
            rows = [_rows_of(found, first, pages, page_size) for found in chain]
            self._load(rows)
            self._commit_prefix(cache, pages, tokens, namespace, chain)
            for found, (block, _, own) in zip(chain, rows, strict=True):
                num_tokens = block.start + found.num_tokens - max(block.start, match.num_prefix_tokens)
                self._came(cache, found, own, num_tokens, came_from)
        return end - match.num_prefix_tokens

    def _commit_prefix(
        self,
        cache: PageCache,
        pages: list[int],
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        chain: list[Found],
    ) -> None:
        """Block by block, each with its own `made_by`. What is exact behind an approximate page of the store becomes
        approximate, made by what made that page.
        """
        behind = (cache.tree[page] for page in pages if cache.length(page))
        approximate = next((node for node in behind if node.exact < node.length), None)
        exact = approximate.start + approximate.exact if approximate else len(tokens)
        made_by = approximate.made_by if approximate else None
        for found in chain:
            block, end = found.block, found.block.start + found.num_tokens
            if block.exact < found.num_tokens:
                exact, made_by = min(exact, block.start + block.exact), maker_of(block)
            own = pages[: -(-end // self._tiers.index.page_size)]
            cache.commit(own, tokens[:end], namespace, exact_tokens=min(exact, end), made_by=made_by)

    def _restore_segment(self, cache: PageCache, found: Found, came_from: dict[Node, str]) -> int:
        block = found.block
        pages = cache.allocate(-(-block.num_tokens // self._tiers.index.page_size))
        about: dict[str, Any] = {"exact_tokens": block.exact, "start": block.start, "made_by": maker_of(block)}
        with _released(cache, pages):
            self._load([(block, range(len(pages)), pages)])
            cache.commit(pages, np.frombuffer(block.tokens, np.int32), block.namespace, **about)
            self._came(cache, found, pages, block.num_tokens, came_from)
        return block.num_tokens

    def _load(self, wanted: Sequence[tuple[Block, range, list[int]]]) -> None:
        """Load rows of blocks into pages. Copies are asked for ahead of those that are waited for."""
        arriving: deque[Arriving] = deque()
        ahead = iter(wanted)
        for _, rows, pages in wanted:
            for block, _, _ in itertools.islice(ahead, MOST_MOVING - len(arriving)):
                arriving.append(self._link.fetch(self._tiers.take(block.key), range(len(self._link.layers))))
            arrived = arriving.popleft()
            self._runner.store = self._link.place(self._runner.store, arrived, rows, pages)
            self._tiers.counts.loaded_bytes += arrived.nbytes


@contextlib.contextmanager
def _released(cache: PageCache, pages: Sequence[int]) -> Iterator[None]:
    """Give pages back at the end, whatever comes up."""
    try:
        yield
    finally:
        cache.release(pages)


def _rows_of(found: Found, first: int, pages: list[int], page_size: int) -> tuple[Block, range, list[int]]:
    """Which of a block's pages are wanted, from the prompt's page `first` on, and where they go."""
    begin = found.block.start // page_size
    rows = range(max(first - begin, 0), -(-found.num_tokens // page_size))
    return found.block, rows, pages[begin + rows.start : begin + rows.stop]


def end_of(chain: list[Found]) -> int:
    """Where the last block of a prefix ends in the prompt."""
    return chain[-1].block.start + chain[-1].num_tokens if chain else 0


def _ranges(match: Match) -> Iterator[tuple[int, int]]:
    yield 0, match.num_prefix_tokens
    for segment in match.segments:
        yield segment.start, segment.end
