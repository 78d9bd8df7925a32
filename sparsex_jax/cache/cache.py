"""The page cache: look up what a prompt can reuse, allocate pages for the rest, commit what was computed.

What one sequence calls, with pages of 64 tokens and a prompt of 300 (5 pages):

    match = cache.lookup(prompt, "docs")              # holds the pages it found, so that none is evicted
    fresh = cache.allocate(5 - len(match.prefix_pages))
    cache.share(match.prefix_pages)                   # the sequence holds the pages of its prefix itself
    ...                                               # copy the KV of match.segments, compute the rest
    cache.let_go(match)                               # the copies are made, so the donors may be evicted
    cache.commit(match.prefix_pages + fresh, prompt, "docs", exact_tokens=match.num_prefix_tokens)
    cache.release(match.prefix_pages + fresh)         # later lookups find the pages until they are evicted

Where adapters act on a sequence, its tokens here are keys that say which one does (`sparsex_jax.reuse.adapters`).

Nothing here is thread-safe. Each engine has one cache and calls it from one thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from sparsex_jax.cache.children import TOKEN_BYTES
from sparsex_jax.cache.company import company_namespace, having_seen
from sparsex_jax.cache.counts import CacheCounts, CacheStats
from sparsex_jax.cache.entries import Entry, EntryBook, EvictedTexts, Origin
from sparsex_jax.cache.healer import Healer
from sparsex_jax.cache.kept import KeptLimits
from sparsex_jax.cache.match import Match
from sparsex_jax.cache.mirrors import ENOUGH, Mirrors
from sparsex_jax.cache.pages import PagePool
from sparsex_jax.cache.pins import Held, PinBook, PinState
from sparsex_jax.cache.remembered import RememberedTexts, text_around
from sparsex_jax.cache.segments import Run, SegmentSearch
from sparsex_jax.cache.tree import Accepts, Node, PageTree, Prefix
from sparsex_jax.cache.windows import WINDOW, Observer, WindowIndex
from sparsex_jax.errors import PinLimitError, StoreFullError

# Numbers of derived pages, for each page of the store: even mirrors of a twentieth of their size fill it before.
DERIVED_A_PAGE = 16


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What became of an entry that was forgotten.

    Attributes:
      num_tokens: of the entry's text.
      pages: which lookups no longer find: the entry's own, and those of other prompts that had a copy of the text.
      num_remaining: how many of its tokens can still be found, because another entry has them.
      num_stale: entries that were made in its company. They are served, and are `stale` until they are made again.
    """

    num_tokens: int
    pages: frozenset[int]
    num_remaining: int
    num_stale: int = 0


def _asked_once(accepts: Accepts) -> Accepts:
    """The same function, which keeps its last answer: all pages of a sequence have the same `made_by`."""
    last: tuple[object, bool] | None = None

    def accepts_once(made_by: object) -> bool:
        nonlocal last
        if last is None or made_by is not last[0]:
            last = made_by, accepts(made_by)
        return last[1]

    return accepts_once


def _require(ok: bool | np.bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class PageCache:
    """Finds the pages of a KV store by the tokens in them, hands pages out and evicts them.

    Attributes:
      page_size: token slots in a page.
      tree: the tokens in every committed page.
      mirrors: what is stored as rows of others.
      pins: what stays for a time, and until when.
      counts: what happened so far.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        frozen_limit: float = 0.5,
        handles: Iterator[int] | None = None,
        counts: CacheCounts | None = None,
        keep_texts: int = 0,
        max_pinned: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        num_layers: int = 0,
    ) -> None:
        """
        Args:
          num_pages: pages of the store, at least 1.
          page_size: token slots in a page, a multiple of 8.
          frozen_limit: share of the store, from 0 to 1, that frozen entries may fill.
          handles: the numbers to give to entries. Pass the previous cache's iterator to a cache that replaces it, so
            that no handle stands for two entries. None: 1, 2, 3 ...
          counts: where to count. Pass the previous cache's to a cache that replaces it. None: from 0.
          keep_texts: how many entries stay known after their pages were evicted. A lower tier may still have their
            texts, so `remembered` finds those in prompts, and `forget` takes their handles.
          max_pinned: share, from 0 to 1, of what frozen entries leave of the store that pins may have.
          clock: gives the time, in seconds, by which pins end.
          num_layers: of the model, where pages may be derived (`mirrors`). 0: none is.

        Raises:
          ValueError: one of the sizes is out of range.
        """
        _require(page_size > 0 and page_size % WINDOW == 0, f"page_size={page_size} must be a multiple of {WINDOW}")
        _require(num_pages >= 1, f"num_pages={num_pages} must be at least 1")
        self.page_size = page_size
        self._pool = PagePool(num_pages, DERIVED_A_PAGE * num_pages if num_layers else 0)
        self.tree = PageTree(self._pool.num_numbers, page_size)
        self._windows = WindowIndex(num_pages * page_size // WINDOW)
        self._entries = EntryBook(handles or itertools.count(1))
        self._evicted = EvictedTexts(keep_texts)
        self._remembered = RememberedTexts()
        self._matches: set[Match] = set()
        self._healer = Healer(self.tree, page_size, self._is_kept, self._drop)
        self._kept = KeptLimits(self._pool, page_size, frozen_limit, max_pinned)
        self.pins = PinBook(self._pool, clock)
        self.counts = counts or CacheCounts()
        self.mirrors = Mirrors(self._pool, self.tree, page_size, num_layers, self.allocate, self.counts)

    # Finding ------------------------------------------------------------------------------------------------

    def lookup(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        *,
        prefix: bool = True,
        exact: bool = True,
        segments: bool | Callable[[int], bool] = True,
        min_segment: int = 16,
        accepts: Accepts | None = None,
        counted: bool = True,
        last_used: Int64[np.ndarray, "pages"] | None = None,
    ) -> Match:
        """Find the stored parts of a prompt and hold their pages.

        Every run of at least max(15, min_segment) tokens that the namespace stores in a row is found.

        Args:
          tokens: the prompt's ids, none negative.
          namespace: only content that was committed under it is found.
          prefix: look for a prefix.
          exact: whether a prefix that was committed as exact is exact for this caller; else all of it is approximate.
          segments: whether to look for segments behind the prefix; a function says so by the prefix's length in tokens.
          min_segment: the least length of a segment, in tokens.
          accepts: whether approximate KV may be in the prefix, asked by the `made_by` of its commit. None: never.
          counted: count it as a use, and in `counts`. A caller that may look the same prompt up again does both itself.
          last_used: when each page was last used, as the method of that name gave it. Of donors that are equal
            otherwise, the one that was used last is taken. None: as it is now.

        Raises:
          ValueError: a token id is negative.
        """
        _require(not (tokens < 0).any(), "token ids must not be negative")
        prompt = tokens[:-1].tobytes() if prefix else b""  # the last token is always computed
        found = self.tree.prefix(prompt, namespace, accepts and _asked_once(accepts))
        wanted = segments(found.num_tokens) if callable(segments) else segments
        runs = self._find_runs(tokens, namespace, found.num_tokens, min_segment, last_used) if wanted else []
        match = self._match(found, runs, found.exact_tokens if exact else 0)
        self._matches.add(match)
        self._pool.hold(match.pages)
        if counted:
            self.count_use(match)
            self.counts.found(match.hits)
        return match

    def _find_runs(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        begin: int,
        min_segment: int,
        last_used: Int64[np.ndarray, "pages"] | None = None,
    ) -> list[Run]:
        used = self._pool.last_used if last_used is None else last_used
        enough = (ENOUGH,) if self.mirrors.num_layers else ()
        search = SegmentSearch(tokens, namespace, self._windows, self.page_size, used, *enough)
        return search.run(begin, min_segment)

    def last_used(self) -> Int64[np.ndarray, "pages"]:
        """When each page was last used, for a later `lookup`, by a clock that counts uses."""
        return self._pool.last_used.copy()

    def _match(self, prefix: Prefix, runs: list[Run], exact_tokens: int) -> Match:
        start = len(prefix.nodes) * self.page_size
        tail = Run(start, prefix.tail_tokens, [prefix.tail], 0) if prefix.tail else None
        copied = [tail, *runs] if tail else runs
        pages = [node.pages[0] for node in prefix.nodes] + [node.donor for run in copied for node in run.nodes]
        return Match(
            prefix_pages=[node.pages[0] for node in prefix.nodes],
            prefix_tail=tail.segment(self.page_size) if tail else None,
            segments=[run.segment(self.page_size) for run in runs],
            num_prefix_tokens=prefix.num_tokens,
            num_exact_tokens=exact_tokens,
            pages=tuple(dict.fromkeys(pages)),
        )

    def remembered(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, turns: Collection[bytes] = ()
    ) -> Int64[np.ndarray, "tokens"]:
        """The number of the remembered text that each token of a prompt is of, as far as text and prompt agree around
        its middle; -1 for those of none. Numbers rise along the prompt, and texts that overlap there have the same.

        Texts of which the prompt has less than half do not count, nor do texts of fewer than 8 tokens.

        Args:
          turns: entries that are said to be one of these do not count either.
        """
        text, places = functools.cache(self.text), self._remembered.places(tokens, namespace)
        found_at = [(place, handle) for place, handle in places if self.entry(handle).said not in turns]
        runs = sorted(text_around(tokens, place, text(handle)) for place, handle in found_at)
        found, number, reached = np.full(len(tokens), -1), -1, 0
        for begin, end in (run for run in runs if run[0] < run[1]):
            number += begin >= reached
            found[begin:end], reached = number, max(reached, end)
        return found

    def count_use(self, match: Match) -> None:
        """Count that a held match is of use to a prompt: what is used least is evicted first, and healed last."""
        nodes = [self.tree[page] for page in match.pages]
        for node in nodes:
            node.uses += 1
        self._entries.count_use(twin for node in nodes for twin in node.pages)

    def let_go(self, match: Match) -> None:
        """Release the pages that a lookup holds. Raises ValueError if they were released before."""
        _require(match in self._matches, "this match is not held: it was let go before, or is another cache's")
        self._matches.remove(match)
        self._pool.release(match.pages)

    # Holding ------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` pages with one reference each. Evicts cached pages if too few are free.

        Raises:
          StoreFullError: even evicting all cached pages would not free enough. Nothing was evicted.
        """
        _require(count >= 0, f"count={count} must not be negative")
        if count > self.num_available:
            raise StoreFullError(
                f"{count} pages asked, but only {self.num_available} of {len(self._pool)} can be had now"
            )
        while (lacking := count - len(self._pool.free)) > 0:  # a derived page may free none, or several
            pages = self._pool.oldest_evictable(lacking)
            self.counts.evictions += len(pages) - int(self._pool.spare[pages].sum())
            self._evict(pages)
        return self._pool.take(count)

    def _evict(self, pages: Sequence[int]) -> None:
        """Evict pages that nobody holds. An entry that loses a page ends, and stays known if `keep_texts` allows it."""
        ended = [(self._entries[handle], self.text(handle)) for handle in sorted(self._entries.holding(pages))]
        self._drop(pages)
        for entry, text in ended:
            self._know_evicted(entry, text)

    def _know_evicted(self, entry: Entry, text: Int32[np.ndarray, "text"]) -> None:
        self._remembered.add(entry.handle, entry.namespace, text)
        for handle in self._evicted.add(entry, text):
            self._remembered.remove(handle)

    def know_texts_of(self, lost: PageCache) -> None:
        """Take over what another cache, whose KV is lost, knows of texts: all its entries are evicted."""
        for entry in (*lost._evicted, *lost._entries):
            self._know_evicted(entry, lost.text(entry.handle))

    def share(self, pages: Sequence[int]) -> None:
        """Add one reference to each page.

        Raises:
          ValueError: one of them is free. Only pages that are held or committed can be shared.
        """
        self._require_distinct(pages)
        index = np.array(pages, np.int64)
        free = index[(self._pool.refs[index] == 0) & ~self._pool.committed[index]]
        _require(not len(free), f"pages {free.tolist()} are free")
        self._pool.hold(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page. Committed pages then stay until evicted; the others become free at once.

        Raises:
          ValueError: one of them is not held. No reference was dropped.
        """
        self._require_distinct(pages)
        self._require_held(pages)
        self._pool.release(pages)

    def _require_distinct(self, pages: Sequence[int]) -> None:
        _require(len(set(pages)) == len(pages), "a page is named twice")
        inside = not pages or (min(pages) >= 0 and max(pages) < self._pool.num_numbers)
        _require(inside, "a page is outside the store")

    def _require_held(self, pages: Sequence[int]) -> None:
        index = np.array(pages, np.int64)
        others = index[self._pool.refs[index] == 0].tolist()
        _require(not others, f"pages {others} are not held: released before, or never allocated")

    # Storing ------------------------------------------------------------------------------------------------

    def commit(
        self,
        pages: Sequence[int],
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        *,
        exact_tokens: int,
        start: int = 0,
        made_by: object = None,
        twins: bool = True,
    ) -> None:
        """Let later lookups find a sequence whose token `i` is in slot `i` of its pages laid end to end.

        Committed pages at the beginning, the shared prefix, stay as they are. A page that was committed with fewer
        tokens is indexed again with all it has now, so a sequence may be committed several times as it grows.

            pages of 8, 20 tokens, exact_tokens=13, start=0:
              tokens     0..7   8..15   16..19
              Node.start    0       8       16
              Node.exact    8       5        0      only the first page can be shared as an exact prefix

            the same with exact_tokens=20, where the first page was committed with exact=0 before:
              Node.exact    0       0        0      KV computed from approximate KV is approximate too

        Exact pages replace approximate ones with the same tokens in the same place: what follows those follows the
        exact ones from now on. So an approximate page is not indexed where there is an exact one already.

        Args:
          pages: pages that the caller holds, in order. Pages behind the last token are ignored.
          tokens: ids, none negative, at least one.
          namespace: lookups under it find the sequence.
          exact_tokens: how many leading tokens have the KV that full recompute gives.
          start: the position that tokens[0] was computed at. Only a sequence from 0 can become a prefix.
          made_by: what computed the tokens that are not exact; lookups ask their `accepts` about it.
          twins: index also those exact pages whose tokens another one has in the same place. False: that one stands for
            them, and what follows them follows it.

        Raises:
          ValueError: a page is not held, or was committed with other tokens, another position or another namespace.
            Nothing was committed.
        """
        rows = self._rows(tokens)
        pages = list(pages)[: len(rows)]
        keys = [row[row >= 0].tobytes() for row in rows]
        self._require_commitable(pages, tokens, keys, namespace, exact_tokens, start)
        new = self._attach(pages, keys, namespace, exact_tokens, start, made_by, twins)
        first_pages = [(i, node) for i, node in new if node.pages[0] == pages[i]]  # a twin's node is indexed already
        self._windows.add([node for _, node in first_pages], rows[[i for i, _ in first_pages]])
        for _, node in first_pages:
            if node.sharable:
                worse = self.tree.supersede(node, self._entries.holds)
                self.pins.move(worse, node.pages[0])
                self._drop(worse)

    def _attach(
        self,
        pages: list[int],
        keys: list[bytes],
        namespace: str,
        exact_end: int,
        start: int,
        made_by: object,
        twins: bool = True,
    ) -> list[tuple[int, Node]]:
        """Put pages into the tree. Returns those that were not there, as numbers in the sequence, with their nodes."""
        parent: Node | None = None
        new: list[tuple[int, Node]] = []
        for i, (page, key) in enumerate(zip(pages, keys, strict=True)):
            position = start + i * self.page_size
            if self._pool.committed[page] and self.tree[page].length >= len(key) // TOKEN_BYTES:
                parent = self.tree[page]
            else:
                if self._pool.committed[page]:
                    self._unindex([page])
                exact = min(max(exact_end - i * self.page_size, 0), len(key) // TOKEN_BYTES)
                looks = exact < self.page_size or not twins
                better = self.tree.exact_node(parent, namespace, key, position) if looks else None
                if better is None:
                    parent = self.tree.attach(page, parent, namespace, key, position, exact, made_by)
                    self._pool.committed[page] = True
                    new.append((i, parent))
                else:
                    self.pins.move([page], better.pages[0])
                    # What follows was computed behind this page, not behind that one.
                    parent, exact_end = better, exact_end if not twins else 0
            if parent.exact < self.page_size:
                exact_end = 0
        return new

    def _rows(self, tokens: Int32[np.ndarray, "tokens"]) -> Int32[np.ndarray, "pages page_size"]:
        """The tokens page by page, with -1 in the slots behind the last token."""
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
            if self._pool.committed[page]:
                node = self.tree[page]
                shared = min(len(key), len(node.key))
                same = node.key[:shared] == key[:shared] and node.start == start + i * self.page_size
                _require(same and node.namespace == namespace, f"page {page} was committed with other content")

    # Remembering --------------------------------------------------------------------------------------------

    def register(
        self,
        pages: Sequence[int],
        num_tokens: int,
        namespace: str,
        frozen: bool,
        content: bytes | None = None,
        origin: Origin | None = None,
        said: bytes | None = None,
    ) -> int:
        """Make an entry of committed pages and return its handle.

        The pages of a frozen entry stay until `forget`. An entry that is not frozen ends when the first of its pages is
        evicted.

        Args:
          pages: where the tokens are, in order. All are committed in the namespace.
          num_tokens: how many of the pages' tokens belong to the entry.
          content: a digest of what it was computed of; see `entry_of`. No entry of the namespace has it yet; one that
            was evicted and has it gives its handle.
          origin: how its KV was made. None: alone.
          said: see `remembered`.

        Raises:
          ValueError: a page is not committed in the namespace, or num_tokens is out of range.
          FrozenLimitError: frozen entries would fill more of the store than they may. Nothing was registered.
        """
        self._require_holds(pages, num_tokens, namespace)
        if frozen:
            self.require_frozen_room(pages)
            self._pool.freeze(pages)
        handle = self._evicted.of_content(namespace, content)
        if handle is not None:
            self._forget_evicted(handle)
        about = (frozen, content, said, origin or Origin(), handle)
        entry = self._entries.add(namespace, num_tokens, tuple(pages), *about)
        self._remembered.add(entry.handle, namespace, self.text(entry.handle))
        return entry.handle

    def _require_holds(self, pages: Sequence[int], num_tokens: int, namespace: str) -> None:
        """Raise ValueError unless these pages are committed in the namespace and hold that many tokens."""
        self._require_distinct(pages)
        for page in pages:
            _require(self.tree[page].namespace == namespace, f"page {page} is not in namespace {namespace!r}")
        stored = sum(self.tree[page].length for page in pages)
        _require(0 < num_tokens <= stored, f"num_tokens={num_tokens} must be in 1..{stored}")

    def replace(self, handle: int, pages: Sequence[int], origin: Origin) -> None:
        """Give an entry other pages with the same text. It keeps its handle, and its old pages go unless another entry
        has them.

        Raises:
          UnknownHandleError: there is no such entry.
          ValueError: as `register`, or `may_replace` forbids it. Nothing was changed.
        """
        entry = self._entries[handle]
        self._require_holds(pages, entry.num_tokens, entry.namespace)
        _require(self.may_replace(handle), "frozen entries would fill more of the store than they may")
        old = entry.pages
        if entry.frozen:
            self._pool.thaw(old)
            self._pool.freeze(pages)
        self._entries.move(handle, tuple(pages))
        entry.origin, entry.stale = origin, False
        self._drop([page for page in old if not self._entries.holds(page)])

    def may_replace(self, handle: int) -> bool:
        """Whether frozen entries may have pages for this entry's text that no other entry shares."""
        entry = self._entries[handle]
        return not entry.frozen or self._kept.allows_frozen(entry.pages, len(entry.pages))

    def begins_prompts(self, handle: int) -> bool:
        """Whether something that is stored goes on behind pages of this entry, as prompts that begin with its text."""
        entry = self._entries[handle]
        behind = (child for page in entry.pages for child in self.tree[page].children)
        return any(entry.handle not in self._entries.holding(child.pages) for child in behind)

    def entry_of(self, namespace: str, content: bytes) -> Entry | None:
        """The entry that was registered with this content. None if there is none, or if it is gone."""
        return self._entries.of_content(namespace, content)

    def has_entry(self, handle: int) -> bool:
        """Whether what this handle stands for is there."""
        return handle in self._entries

    def knows(self, handle: int) -> bool:
        """The same, or whether it was evicted and can still be forgotten."""
        return handle in self._entries or handle in self._evicted

    def entry(self, handle: int) -> Entry:
        """Raises UnknownHandleError if there is no such entry. One that was evicted has no pages."""
        return self._evicted[handle] if handle in self._evicted else self._entries[handle]

    def freeze(self, handle: int) -> None:
        """Make an entry frozen. Idempotent. Raises UnknownHandleError, and FrozenLimitError as `register`."""
        entry = self._entries[handle]
        if not entry.frozen:
            self.require_frozen_room(entry.pages)
            self._pool.freeze(entry.pages)
            entry.frozen = True

    def require_frozen_room(self, pages: Sequence[int], more: int = 0) -> None:
        """Raise FrozenLimitError unless frozen entries may have these pages too, and `more` new ones."""
        self._kept.require_frozen(pages, more)

    def forget(self, handle: int, alike: Sequence[Int32[np.ndarray, "tokens"]] = ()) -> Forgotten:
        """Remove an entry, and every copy of its text that other prompts of the namespace brought into the store.

        Pages that other entries have stay. What stood behind a copy in its prompt stays as well, as donor of segments.
        A page that a sequence still holds becomes free when its last reference is dropped; the sequence must not commit
        it again.

        Args:
          alike: other tokens, as many, that stand for the same text. Copies of them go too.

        Raises:
          UnknownHandleError: there is no such entry.
        """
        text = self.text(handle)
        texts = list({each.tobytes(): each for each in (text, *alike)}.values())
        entry = self._forget_evicted(handle) if handle in self._evicted else self._remove_entry(handle)
        names = entry.namespace, company_namespace(entry.namespace)
        runs = [run for each in texts for name in names for run in self._copies(each, name)]
        found = dict.fromkeys([*entry.pages, *(page for run in runs for node in run.nodes for page in node.pages)])
        gone = [page for page in found if not self._entries.holds(page)]
        remaining = np.zeros(len(text), bool)
        for run in runs:
            for node, start in run.places():
                if any(map(self._entries.holds, node.pages)):
                    remaining[max(start, run.start) : min(start + node.length, run.start + run.length)] = True
        self._drop(gone)
        return Forgotten(len(text), frozenset(gone), int(remaining.sum()), self._mark_stale(entry.namespace, texts))

    def _copies(self, text: Int32[np.ndarray, "tokens"], namespace: str) -> list[Run]:
        return SegmentSearch(text, namespace, self._windows, self.page_size, self._pool.last_used).copies()

    def _mark_stale(self, namespace: str, texts: Sequence[Int32[np.ndarray, "tokens"]]) -> int:
        """Mark the entries whose company has one of these texts. Returns how many."""
        tests, entries = list(map(having_seen, texts)), [one for one in self._entries if one.namespace == namespace]
        made = [(entry, entry.origin.company) for entry in entries if entry.origin.company]
        stale = [entry for entry, company in made if any(has_seen(company) for has_seen in tests)]
        for entry in stale:
            entry.stale = True
        return len(stale)

    def text(self, handle: int) -> Int32[np.ndarray, "tokens"]:
        """The tokens of an entry. Raises UnknownHandleError if there is no such entry."""
        if handle in self._evicted:
            return self._evicted.text(handle)
        entry = self._entries[handle]
        keys = b"".join(self.tree[page].key for page in entry.pages)
        return np.frombuffer(keys, np.int32)[: entry.num_tokens]

    def beginnings(self, namespace: str, most: int) -> Iterator[bytes]:
        """The first `most` tokens of each prompt that is stored, as int32 bytes. Remembered texts are none."""
        return self.tree.beginnings(namespace, most, self._entries.holds)

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """Copies of the entries of one namespace, or of all, oldest first."""
        return [dataclasses.replace(entry) for entry in self._entries if namespace in (None, entry.namespace)]

    def evicted_entries(self, namespace: str | None = None) -> list[Entry]:
        """Copies of those that are known, but have no pages any more."""
        return [dataclasses.replace(entry) for entry in self._evicted if namespace in (None, entry.namespace)]

    def withdraw(self, pages: Sequence[int]) -> None:
        """Remove committed pages from the index, with every entry that has one of them. Other pages stay as they are.

        A page that a sequence still holds becomes free when its last reference is dropped.
        """
        self._require_distinct(pages)
        self._drop([page for page in pages if self._pool.committed[page]])

    def withdraw_all(self, is_gone: Callable[[Int32[np.ndarray, "tokens"]], bool]) -> None:
        """Remove all pages of whose tokens this says so from the index, with the entries and pins that have one, and
        what is known of evicted texts. As `withdraw`."""
        nodes = [node for node in self.tree.live_nodes() if is_gone(np.frombuffer(node.key, np.int32))]
        self._drop([page for node in nodes for page in node.pages])
        for handle in [entry.handle for entry in self._evicted if is_gone(self._evicted.text(entry.handle))]:
            self._forget_evicted(handle)

    def length(self, page: int) -> int:
        """How many tokens lookups can find in a page; 0 if it is not committed."""
        node = self.tree.node_of[page]
        return node.length if node else 0

    def clear(self) -> None:
        """Remove every entry and every pin, and evict every page that no sequence and no match holds."""
        for entry in self.entries():
            self._remove_entry(entry.handle)
        for name, _ in self.pins:
            self.pins.remove(*name)
        self._drop(np.flatnonzero(self._pool.evictable()).tolist())

    # Pinning ------------------------------------------------------------------------------------------------

    def pin(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        key: str,
        ttl_s: float,
        *,
        owner: object = None,
        fits: Callable[[], bool] = lambda: True,
    ) -> PinState:
        """Keep what is stored of a sequence for `ttl_s` seconds, however full the store gets.

        What the key's pin had before is let go, unless the same owner made it: then it has both.

        Args:
          owner: an object that stands for one request. None: the pin is nobody's.
          fits: whether the pin may have its pages. It is asked while the pin has them.

        Raises:
          PinLimitError: nothing of it is stored, pins would have more of the store than they may, or `fits` denies it.
            The key's pin stays as it was.
        """
        found = self.tree.prefix(tokens.tobytes(), namespace, lambda _: True)
        stored = [*found.nodes, *([found.tail] if found.tail else [])]
        nodes = list(itertools.takewhile(lambda node: not self.mirrors.is_derived(node.pages[0]), stored))
        if not nodes:
            raise PinLimitError("nothing of the prompt is stored")
        before = self.pins.get(namespace, key)
        both = before.pages if before and owner is not None and before.owner is owner else ()
        held = self.pins.make([*both, *(node.pages[0] for node in nodes)], ttl_s, owner)
        self.pins.put(namespace, key, held)
        why = self._kept.why_not_pinned(len(held.pages))
        if why is None and not fits():
            why = f"{self._kept.pin_needs(len(held.pages))}, which would leave too few for requests that run now"
        if why is not None:
            self.pins.put(namespace, key, before)
            raise PinLimitError(why)
        return self._state(namespace, key, held)

    @property
    def pin_limit(self) -> int:
        """Pages that all pins together may have now."""
        return self._kept.most_pinned

    def unpin(self, namespace: str, key: str) -> PinState:
        """End a pin, and return what it was. Raises UnknownPinError if the namespace has none of this key."""
        return self._state(namespace, key, self.pins.remove(namespace, key))

    def pin_states(self, namespace: str | None = None) -> list[PinState]:
        """The pins of one namespace, or of all, oldest first."""
        return [self._state(*name, held) for name, held in self.pins if namespace in (None, name[0])]

    def _state(self, namespace: str, key: str, held: Held) -> PinState:
        num_tokens = sum(self.length(page) for page in held.pages)
        return PinState(namespace, key, num_tokens, len(held.pages), self.pins.seconds_left(held))

    def to_heal(self, most: int) -> tuple[Int32[np.ndarray, "tokens"], str] | None:
        """A prompt and its namespace whose exact prefill replaces approximate content: of that which was used most.

        All but about `most` of its tokens have an exact prefix already. None if nothing is approximate, or if there
        are no pages for what was used most. Mirrors stay as they are.
        """
        return self._healer.next(most, self.num_available)

    # Evicting -----------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """How many pages `allocate` could hand out by evicting everything evictable."""
        return len(self._pool) - self._pool.sums.occupied

    @property
    def num_beside_kept(self) -> int:
        """How many pages frozen entries and pins leave to everything else."""
        return self._kept.num_left

    def _is_kept(self, page: int) -> bool:
        """Whether an entry or a pin has it."""
        return self._entries.holds(page) or self.pins.holds(page)

    def num_kept_of(self, pages: Sequence[int]) -> int:
        """How many of these pages frozen entries or pins have."""
        index = list(pages)
        return int(np.count_nonzero((self._pool.frozen[index] > 0) | (self._pool.pinned[index] > 0)))

    def _drop(self, pages: Sequence[int]) -> None:
        """Remove committed pages from the index, the entries and the pins. Those without a reference become free."""
        if not pages:  # as for most pages that are committed
            return
        for handle in self._entries.holding(pages):
            self._remove_entry(handle)
        self.pins.drop(pages)
        self._unindex(pages)
        self._pool.settle(pages)

    def _remove_entry(self, handle: int) -> Entry:
        entry = self._entries.remove(handle)
        self._remembered.remove(handle)
        if entry.frozen:
            self._pool.thaw(entry.pages)
        return entry

    def _forget_evicted(self, handle: int) -> Entry:
        entry = self._evicted[handle]
        self._evicted.pop(handle)
        self._remembered.remove(handle)
        return entry

    def _unindex(self, pages: Sequence[int]) -> None:
        self._windows.remove(self.mirrors.detach(pages))
        self._pool.committed[list(pages)] = False

    # Inspecting ---------------------------------------------------------------------------------------------

    def watch(self, observer: Observer | None) -> None:
        """Tell this observer what can be found, and from now on what changes. None: nobody."""
        self._windows.observer = observer
        nodes = self.tree.live_nodes()
        if observer is not None and nodes:
            observer.stored(nodes)

    def stats(self) -> CacheStats:
        """Counts of pages, tokens and events. It walks over no content: the loop asks each round."""
        counts = self._pool.counts()
        return CacheStats(
            pages=len(self._pool),
            derived=len(self._pool.derived),
            saved=self.mirrors.saved(counts.base),
            patch_rows=self._pool.patch_rows,
            **dataclasses.asdict(counts),
            pins=len(self.pins),
            tokens=self.tree.num_tokens,
            approximate_tokens=self.tree.num_approximate,
            windows=self._windows.num_windows,
            **dataclasses.asdict(self.counts),
        )

    def check(self, held: Sequence[int] | None = None) -> None:
        """Raise AssertionError unless all parts agree with each other. For tests, since it walks the whole store.

        Args:
          held: the pages that sequences hold, each as often as it is held. None: references are only bounded.
        """
        pool = self._pool
        pool.check()
        self.pins.check()
        self.tree.check()
        self._windows.check(self.tree.live_nodes())
        known = (*self._entries, *self._evicted)
        self._remembered.check({entry.handle: (entry.namespace, self.text(entry.handle)) for entry in known})
        assert np.array_equal(pool.committed, [node is not None for node in self.tree.node_of])
        matched, frozen = np.zeros_like(pool.refs), np.zeros_like(pool.frozen)
        for match in self._matches:
            matched[list(match.pages)] += 1
        for entry in self._entries:
            frozen[list(entry.pages)] += entry.frozen
            assert pool.committed[list(entry.pages)].all()
        if held is None:
            assert (matched <= pool.refs).all()
        else:
            assert np.array_equal(matched + np.bincount(np.array(held, int), minlength=len(pool.refs)), pool.refs)
        assert np.array_equal(frozen, pool.frozen)
