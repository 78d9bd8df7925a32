"""Loads blocks from host memory into the store: segments and approximate prefixes, when a prompt is admitted.

They are committed as what they were, so that the lookup of the prompt finds them. Exact prefixes come before that
(`sparsex_jax.scheduler.restoring`), and here only if some of one was evicted again meanwhile.

Segments are committed when they are sent for. The prefill that they are for begins at once, and waits for them where it
reads them (`Late`); whatever else finds them waits until they are there (`settle`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.arrivals import Arrivals, Incoming, Load
from sparsex_jax.device.link import Link
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError, StoreFullError
from sparsex_jax.reuse.methods import Method
from sparsex_jax.scheduler.blocks import maker_of
from sparsex_jax.scheduler.choice import look_up
from sparsex_jax.scheduler.tiers import Tiers
from sparsex_jax.tiers.index import BlockIndex, Found

log = logging.getLogger(__name__)


class Loading:
    """What the tiers have of prompts, and how it gets into the store.

    Attributes:
      num_ended: how often pages were given back so far.
    """

    def __init__(self, tiers: Tiers, runner: Runner, link: Link) -> None:
        self._tiers, self._runner = tiers, runner
        self._arrivals = runner.arrivals = Arrivals(link)
        self._coming: dict[Incoming, PageCache] = {}
        self._last: tuple[Any, tuple[list[Found], list[Found]]] | None = None
        self.num_ended = 0

    @property
    def pages(self) -> list[int]:
        """That hold what is coming."""
        return [page for incoming in self._coming for page in incoming.pages]

    def load(
        self,
        cache: PageCache,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        method: Method,
        came_from: dict[Node, str],
    ) -> int:
        """Load what host memory has of a prompt and the store lacks, and commit it there. Returns how many tokens.

        Segments may be on their way still. Nothing is loaded where there are no pages for it, or where the link fails:
        the prompt is computed then.

        Args:
          came_from: takes up which tier each page was loaded from.
        """
        if not (method.uses_prefix or method.uses_segments) or not self._tiers.has_host_blocks:
            return 0
        match, loaded = self.look(cache, tokens, namespace, method), 0
        try:
            chain, others = self.lacking(tokens, namespace, method, match)
            chain = list(itertools.takewhile(self._is_here, chain))
            loaded += self._restore_prefix(cache, tokens, namespace, match, chain, came_from)
            loaded += self._send_for(cache, [found for found in others if self._is_here(found)], came_from)
        except StoreFullError:
            log.debug("there are no pages for what could be loaded")
        except LinkError:
            log.exception("stored KV could not be loaded; it is computed")
        finally:
            cache.let_go(match)
        return loaded

    def came(
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
        about = (tokens.tobytes(), namespace, method, tuple(_ranges(match)), self._tiers.index.changes)
        if self._last is None or self._last[0] != about:  # a prompt asks twice: when it comes, and when it is admitted
            self._last = about, self._find_lacking(tokens, namespace, method, match)
        return self._last[1]

    def _find_lacking(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, method: Method, match: Match
    ) -> tuple[list[Found], list[Found]]:
        index, lacking = self._tiers.index, lacking_of(len(tokens), match)
        layers = self._runner.model.num_layers
        chain = chain_of(index, tokens, namespace, method, match.num_prefix_tokens, layers)
        lacking[: end_of(chain)] = False
        others: list[Found] = []
        if method.uses_segments:
            others = index.segments(tokens, namespace, lacking, method.min_segment_tokens)
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
            loads = [self._load_of(found, first, pages) for found in chain]
            self._load(loads)
            self._commit_prefix(cache, pages, tokens, namespace, chain)
            for found, load in zip(chain, loads, strict=True):
                start = found.block.start
                num_tokens = start + found.num_tokens - max(start, match.num_prefix_tokens)
                self.came(cache, found, load.pages, num_tokens, came_from)
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

    def _load_of(self, found: Found, first: int, pages: list[int]) -> Load:
        """The pages of a block that are wanted, from the prompt's page `first` on, and where they go."""
        page_size = self._tiers.index.page_size
        begin = found.block.start // page_size
        rows = range(max(first - begin, 0), -(-found.num_tokens // page_size))
        return Load(self._tiers.take(found.block.key), rows, pages[begin + rows.start : begin + rows.stop])

    def _load(self, loads: list[Load]) -> None:
        """Wait until they are in the store. Raises LinkError."""
        incoming = self._arrivals.begin(loads)
        self._runner.store = self._arrivals.bring(self._runner.store, incoming)
        if incoming.error is not None:
            raise incoming.error
        self._count(incoming)

    def _send_for(self, cache: PageCache, wanted: list[Found], came_from: dict[Node, str]) -> int:
        """Send for segments, as many as there are pages for, and commit them. Returns how many tokens."""
        loads: list[Load] = []
        with contextlib.suppress(StoreFullError):
            for found in wanted:
                pages = cache.allocate(-(-found.block.num_tokens // self._tiers.index.page_size))
                loads.append(Load(self._tiers.take(found.block.key), range(len(pages)), pages))
        if not loads:
            return 0
        try:
            self._coming[self._arrivals.begin(loads)] = cache
        except BaseException:
            for load in loads:
                cache.release(load.pages)
            raise
        sent = wanted[: len(loads)]
        for found, load in zip(sent, loads, strict=True):  # while they move
            block = found.block
            about: dict[str, Any] = {"exact_tokens": block.exact, "start": block.start, "made_by": maker_of(block)}
            cache.commit(load.pages, np.frombuffer(block.tokens, np.int32), block.namespace, **about)
            self.came(cache, found, load.pages, block.num_tokens, came_from)
        return sum(found.block.num_tokens for found in sent)

    # While it comes -----------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether something is coming."""
        return bool(self._coming)

    def pump(self) -> None:
        """Place what has come, and let go of what is done."""
        self._runner.store = self._arrivals.pump(self._runner.store)
        self._take_ended()

    def coming_into(self, pages: Iterable[int]) -> tuple[Incoming, ...]:
        """What is still coming into some of these pages."""
        asked = frozenset(pages)
        return tuple(each for each in self._coming if not each.done and not asked.isdisjoint(each.pages))

    def settle(self, pages: Iterable[int]) -> bool:
        """Wait for what comes into these pages. False if some of it failed: it is withdrawn then."""
        wanted = self.coming_into(pages)
        for incoming in wanted:
            self._runner.store = self._arrivals.bring(self._runner.store, incoming)
        self._take_ended()
        return all(incoming.error is None for incoming in wanted)

    def lose(self) -> None:
        """The store is lost, and with it the pages of what is coming."""
        self._arrivals.drop_all()
        self._coming.clear()

    def _take_ended(self) -> None:
        """Nothing finds what has failed. Its pages go when all who pasted it let go of them."""
        for incoming in [each for each in self._coming if each.done or each.error is not None]:
            cache = self._coming.pop(incoming)
            if incoming.error is not None:
                log.error("stored segments could not be loaded; they are computed", exc_info=incoming.error)
                cache.withdraw(sorted(incoming.pages))
            else:
                self._count(incoming)
            cache.release(sorted(incoming.pages))
            self.num_ended += 1

    def _count(self, incoming: Incoming) -> None:
        self._tiers.counts.loaded_bytes += incoming.nbytes


@contextlib.contextmanager
def _released(cache: PageCache, pages: Sequence[int]) -> Iterator[None]:
    """Give pages back at the end, whatever comes up."""
    try:
        yield
    finally:
        cache.release(pages)


def lacking_of(num_tokens: int, match: Match) -> Bool[np.ndarray, "tokens"]:
    """Which tokens of a prompt the store has not."""
    lacking = np.ones(num_tokens, bool)
    for begin, end in _ranges(match):
        lacking[begin:end] = False
    return lacking


def chain_of(
    index: BlockIndex,
    tokens: Int32[np.ndarray, "tokens"],
    namespace: str,
    method: Method,
    num_prefix: int,
    num_layers: int,
) -> list[Found]:
    """Blocks that go on where a prompt's prefix of `num_prefix` tokens ends, in order."""
    if not method.uses_prefix:
        return []
    whole = index.prefix(tokens[:-1], namespace, lambda block: method.accepts(maker_of(block), num_layers=num_layers))
    return [each for each in whole if each.block.start + each.num_tokens > num_prefix]


def end_of(chain: list[Found]) -> int:
    """Where the last block of a prefix ends in the prompt."""
    return chain[-1].block.start + chain[-1].num_tokens if chain else 0


def _ranges(match: Match) -> Iterator[tuple[int, int]]:
    yield 0, match.num_prefix_tokens
    for segment in match.segments:
        yield segment.start, segment.end
