"""The page cache: look up what a prompt can reuse, allocate pages for the rest, commit what was computed.

One request's life, seen from here (a page is 64 tokens, the prompt 300):

    match = cache.lookup(prompt, "docs")              # pins what it found
    fresh = cache.allocate(5 - len(match.prefix_pages))
    cache.share(match.prefix_pages)                   # the request holds its prefix itself
    ...                                               # copy from match.segments, compute the rest
    cache.unpin(match)                                # the copies are made
    cache.commit(match.prefix_pages + fresh, prompt, "docs", exact_tokens=match.num_prefix_tokens)
    cache.release(match.prefix_pages + fresh)         # still found by later lookups, until evicted

Nothing here is thread-safe: one engine, one cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache.entries import Entry, EntryBook
from sparsex_jax.cache.pages import PageTable
from sparsex_jax.cache.segments import Run, Segment, SegmentSearch
from sparsex_jax.cache.tree import TOKEN_BYTES, Node, PageTree
from sparsex_jax.cache.windows import WINDOW, WindowIndex
from sparsex_jax.errors import StoreFullError


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """What a prompt can reuse. Its pages stay where they are until `PageCache.unpin(match)`.

    Attributes:
      prefix_pages: full pages of the exact prefix, to be shared.
      prefix_tail: exact tokens right behind them, to be copied (a page filled in part cannot be shared).
      segments: runs outside the prefix, to be copied and aligned; disjoint, in order.
      num_prefix_tokens: tokens of the pages and the tail together; less than the prompt's, whose last token is
        always computed.
      pages: every page involved, each once.
    """

    prefix_pages: list[int]
    prefix_tail: Segment | None
    segments: list[Segment]
    num_prefix_tokens: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Pages by state, what is stored, and what happened so far.

    Attributes:
      pages, free, active, frozen, cached: pages in all and in each state.
      tokens: token slots with content that lookups can find.
      windows: windows in the index.
      lookups: calls so far; prefix_tokens and segment_tokens are what they found.
      evictions: pages dropped to make room; frozen_evictions: frozen entries dropped under pressure.
    """

    pages: int
    free: int
    active: int
    frozen: int
    cached: int
    tokens: int
    windows: int
    lookups: int
    prefix_tokens: int
    segment_tokens: int
    evictions: int
    frozen_evictions: int


def _require(ok: bool | np.bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class PageCache:
    """Pages of a KV store, by content.

    Attributes:
      page_size: token slots a page.
      tree: what is stored.
    """

    def __init__(
        self, num_pages: int, page_size: int, frozen_limit: float = 0.9, handles: Iterator[int] | None = None
    ) -> None:
        """
        Args:
          num_pages: pages of the store.
          page_size: token slots a page; a multiple of 8.
          frozen_limit: share of the store that active and frozen pages may fill before frozen entries go.
          handles: numbers for what is remembered, where a cache before this one had some. None: 1, 2, 3 ...
        """
        _require(page_size > 0 and page_size % WINDOW == 0, f"page_size={page_size} must be a multiple of {WINDOW}")
        _require(num_pages >= 1, f"num_pages={num_pages} must be at least 1")
        self.page_size = page_size
        self._limit = int(num_pages * frozen_limit)
        self._table = PageTable(num_pages)
        self.tree = PageTree(num_pages, page_size)
        self._windows = WindowIndex(num_pages * page_size // WINDOW)
        self._entries = EntryBook(handles or itertools.count(1))
        self._pins: set[Match] = set()
        self._lookups = self._prefix_tokens = self._segment_tokens = 0
        self._evictions = self._frozen_evictions = 0

    # Finding ------------------------------------------------------------------------------------------------

    def lookup(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        *,
        prefix: bool = True,
        segments: bool = True,
        min_segment: int = 16,
    ) -> Match:
        """Find what is stored of a prompt, and pin it.

        Any run of at least max(15, min_segment) tokens stored in a row is found. Token ids are not negative.
        """
        _require(not (tokens < 0).any(), "token ids must not be negative")
        chain, tail = self._find_prefix(tokens, namespace) if prefix else ([], None)
        covered = tail.start + tail.length if tail else len(chain) * self.page_size
        runs = self._find_runs(tokens, namespace, covered, min_segment) if segments else []
        match = self._match(chain, tail, runs, covered)
        self._pin(match)
        return match

    def _find_prefix(self, tokens: Int32[np.ndarray, "tokens"], namespace: str) -> tuple[list[Node], Run | None]:
        prompt = tokens[:-1].tobytes()  # the last token is always computed
        chain = self.tree.prefix(prompt, namespace)
        start = (len(chain) - 1) * self.page_size
        node, shared = self.tree.prefix_tail(chain[-1], prompt[start * TOKEN_BYTES :])
        return chain[1:], Run(start, shared, [node], 0) if node else None

    def _find_runs(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, begin: int, min_segment: int
    ) -> list[Run]:
        search = SegmentSearch(tokens, namespace, self._windows, self.page_size, self._recency)
        return search.run(begin, min_segment)

    def _recency(self, node: Node) -> int:
        return int(self._table.last_used[node.pages[0]])

    def _match(self, chain: list[Node], tail: Run | None, runs: list[Run], covered: int) -> Match:
        copied = [tail, *runs] if tail else runs
        nodes = chain + [node for run in copied for node in run.nodes]
        return Match(
            prefix_pages=[node.pages[0] for node in chain],
            prefix_tail=tail.segment(self.page_size) if tail else None,
            segments=[run.segment(self.page_size) for run in runs],
            num_prefix_tokens=covered,
            pages=tuple(dict.fromkeys(node.pages[0] for node in nodes)),
        )

    def _pin(self, match: Match) -> None:
        self._pins.add(match)
        self._table.hold(match.pages)
        self._entries.count_use(twin for page in match.pages for twin in self.tree[page].pages)
        self._lookups += 1
        self._prefix_tokens += match.num_prefix_tokens
        self._segment_tokens += sum(segment.length for segment in match.segments)

    def unpin(self, match: Match) -> None:
        """Let go of what a lookup pinned, once. Raises ValueError if it was let go before."""
        _require(match in self._pins, "this match is not pinned: it was unpinned before, or is another cache's")
        self._pins.remove(match)
        self._table.let_go(match.pages)

    # Holding ------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, held once each; evicts as needed.

        Raises:
          StoreFullError: they cannot be had. Nothing was evicted.
        """
        _require(count >= 0, f"count={count} must not be negative")
        if count > (available := self._available()):
            raise StoreFullError(f"{count} pages asked, but only {available} of {len(self._table)} can be had now")
        self._relieve(count)
        lacking = count - len(self._table.free)
        if lacking > 0:
            self._evictions += lacking
            self._drop(self._table.oldest_cached(lacking))
        return self._table.take(count)

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages once more. They must be in use: held already, or committed."""
        self._require_distinct(pages)
        for page in pages:
            _require(self._table.refs[page] > 0 or self._table.committed[page], f"page {page} is free")
        self._table.hold(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages once. Committed ones stay until evicted, the others are free at once.

        Raises ValueError, and changes nothing, if one of them is not held.
        """
        self._require_distinct(pages)
        self._require_held(pages)
        self._table.let_go(pages)

    def _require_distinct(self, pages: Sequence[int]) -> None:
        _require(len(set(pages)) == len(pages), "a page is named twice")
        _require(all(0 <= page < len(self._table) for page in pages), "a page is outside the store")

    def _require_held(self, pages: Sequence[int]) -> None:
        for page in pages:
            _require(self._table.refs[page] > 0, f"page {page} is not held: released before, or never allocated")

    # Storing ------------------------------------------------------------------------------------------------

    def commit(
        self,
        pages: Sequence[int],
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        *,
        exact_tokens: int,
        start: int = 0,
    ) -> None:
        """Make a sequence findable: `tokens[i]` is in slot `i` of the pages laid end to end.

        Pages at the beginning that are committed already (the shared prefix) stay as they are. A page that was
        committed in part and has more tokens now is taken in anew, so a sequence may be committed as it grows.

        Args:
          pages: held by the caller; those behind the last token are ignored.
          tokens: not negative.
          namespace: who may see it.
          exact_tokens: the first so many have exact KV. What follows an approximate page is never exact.
          start: position that tokens[0] was computed at. Only at 0 can it become a prefix.

        Raises ValueError, and changes nothing, if a committed page holds other tokens than these.
        """
        rows = self._rows(tokens)
        pages = list(pages)[: len(rows)]
        keys = [row[row >= 0].tobytes() for row in rows]
        self._require_commitable(pages, tokens, keys, namespace, exact_tokens, start)
        parent: Node | None = None
        new, exact_end = [], exact_tokens
        for i, (page, key) in enumerate(zip(pages, keys, strict=True)):
            if self._table.committed[page] and self.tree[page].length >= len(key) // TOKEN_BYTES:
                parent = self.tree[page]
            else:
                self._unindex([page] if self._table.committed[page] else [])
                exact = min(max(exact_end - i * self.page_size, 0), len(key) // TOKEN_BYTES)
                parent = self.tree.attach(page, parent, namespace, key, start + i * self.page_size, exact)
                self._table.committed[page] = True
                new.append((i, parent))
            if parent.exact < self.page_size:
                exact_end = 0
        fresh = [(i, node) for i, node in new if node.pages[0] == pages[i]]  # twins are indexed already
        self._windows.add([node for _, node in fresh], rows[[i for i, _ in fresh]])

    def _rows(self, tokens: Int32[np.ndarray, "tokens"]) -> Int32[np.ndarray, "pages page_size"]:
        """The tokens page by page, -1 behind the end."""
        rows = np.full((-(-len(tokens) // self.page_size), self.page_size), -1, np.int32)
        rows.ravel()[: len(tokens)] = tokens
        return rows

    def _require_commitable(
        self,
        pages: list[int],
        tokens: Int32[np.ndarray, "tokens"],
        keys: list[bytes],
        namespace: str,
        exact_tokens: int,
        start: int,
    ) -> None:
        _require(len(tokens) > 0 and not (tokens < 0).any(), "tokens must not be empty, and none negative")
        _require(0 <= exact_tokens <= len(tokens), f"exact_tokens={exact_tokens} must be in 0..{len(tokens)}")
        _require(len(pages) == len(keys), f"{len(tokens)} tokens do not fit into {len(pages)} pages")
        self._require_distinct(pages)
        self._require_held(pages)
        for i, (page, key) in enumerate(zip(pages, keys, strict=True)):
            if self._table.committed[page]:
                node = self.tree[page]
                shared = min(len(key), len(node.key))
                same = node.key[:shared] == key[:shared] and node.start == start + i * self.page_size
                _require(same and node.namespace == namespace, f"page {page} was committed with other content")

    # Remembering --------------------------------------------------------------------------------------------

    def register(self, pages: Sequence[int], num_tokens: int, namespace: str, frozen: bool) -> int:
        """Give committed pages a handle. Frozen ones stay until forgotten or, least used first, under pressure.

        The handle of an entry that is not frozen dies with the first of its pages that is evicted.
        """
        self._require_distinct(pages)
        for page in pages:
            _require(self.tree[page].namespace == namespace, f"page {page} is not in namespace {namespace!r}")
        stored = sum(self.tree[page].length for page in pages)
        _require(0 < num_tokens <= stored, f"num_tokens={num_tokens} must be in 1..{stored}")
        entry = self._entries.add(namespace, num_tokens, tuple(pages), frozen)
        if frozen:
            self._table.frozen[list(pages)] += 1
            self._relieve(0, spare=entry.handle)
        return entry.handle

    def forget(self, handle: int) -> list[int]:
        """Stop serving what a handle stands for, except what other entries hold too.

        Its pages leave the index at once; those still held become free when they are let go.

        Returns:
          The pages that left the index. Whoever still holds one must not commit it again.

        Raises UnknownHandleError if there is no such entry.
        """
        entry = self._entries.remove(handle)
        if entry.frozen:
            self._table.frozen[list(entry.pages)] -= 1
        pages = [page for page in entry.pages if not self._entries.holds(page)]
        self._drop(pages)
        return pages

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """What is remembered, oldest first, of one namespace or of all."""
        return [dataclasses.replace(entry) for entry in self._entries if namespace in (None, entry.namespace)]

    def withdraw(self, pages: Sequence[int]) -> None:
        """Stop serving what is in these pages, if they were committed, and entries with them.

        Those still held become free when they are let go.
        """
        self._require_distinct(pages)
        self._drop([page for page in pages if self._table.committed[page]])

    def clear(self) -> None:
        """Forget every entry, and drop every page that no request or match holds."""
        for entry in self.entries():
            self._entries.remove(entry.handle)
        self._table.frozen[:] = 0
        self._drop(np.flatnonzero(self._table.cached()).tolist())

    # Evicting -----------------------------------------------------------------------------------------------

    def _available(self) -> int:
        """Pages that could be had by evicting everything that may go."""
        stuck = self._table.refs > 0
        for entry in self._entries:
            if entry.frozen and not self._may_go(entry):
                stuck[list(entry.pages)] = True
        return len(self._table) - int(stuck.sum())

    def _may_go(self, entry: Entry) -> bool:
        return not self._table.refs[list(entry.pages)].any()

    def _relieve(self, asked: int, spare: int | None = None) -> None:
        """Evict frozen entries until active, frozen and asked pages are within the limit, or none may go."""
        if self._table.occupied() + asked <= self._limit:
            return
        victims = [e for e in self._entries if e.frozen and e.handle != spare and self._may_go(e)]
        for victim in sorted(victims, key=self._worth):
            self.forget(victim.handle)
            self._frozen_evictions += 1
            if self._table.occupied() + asked <= self._limit:
                return

    def _worth(self, entry: Entry) -> tuple[int, int]:
        return entry.uses, int(self._table.last_used[list(entry.pages)].max())

    def _drop(self, pages: Sequence[int]) -> None:
        """Take pages out of everything; those that nobody holds are free."""
        for handle in self._entries.holding(pages):
            self._entries.remove(handle)
        self._unindex(pages)
        self._table.give_back([page for page in pages if self._table.refs[page] == 0])

    def _unindex(self, pages: Sequence[int]) -> None:
        dead = [node for node in map(self.tree.detach, pages) if node is not None]
        self._windows.remove(dead)
        self._table.committed[list(pages)] = False

    # Looking at it ------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        counts = self._table.counts()
        return CacheStats(
            pages=len(self._table),
            **dataclasses.asdict(counts),
            tokens=sum(node.length for node in self.tree.node_of if node is not None),
            windows=self._windows.num_windows,
            lookups=self._lookups,
            prefix_tokens=self._prefix_tokens,
            segment_tokens=self._segment_tokens,
            evictions=self._evictions,
            frozen_evictions=self._frozen_evictions,
        )

    def check(self, held: Sequence[int] | None = None) -> None:
        """Raise AssertionError unless all parts agree with each other. For tests: it walks the whole store.

        Args:
          held: the pages that requests hold, each as often as it is held; None: that is not checked.
        """
        table = self._table
        table.check()
        self.tree.check()
        self._windows.check(self.tree.live_nodes())
        assert np.array_equal(table.committed, [node is not None for node in self.tree.node_of])
        pins, frozen = np.zeros_like(table.refs), np.zeros_like(table.frozen)
        for match in self._pins:
            pins[list(match.pages)] += 1
        for entry in self._entries:
            frozen[list(entry.pages)] += entry.frozen
            assert table.committed[list(entry.pages)].all()
        if held is None:
            assert (pins <= table.refs).all()
        else:
            assert np.array_equal(pins + np.bincount(np.array(held, int), minlength=len(table)), table.refs)
        assert np.array_equal(frozen, table.frozen)
