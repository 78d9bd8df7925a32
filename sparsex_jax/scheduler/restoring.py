"""Brings exact prefixes back from the tiers while others decode: some of it is loaded, some computed.

A waiting sequence whose prefix is in a lower tier gets pages for it, and `Restorer` fills them: it computes from the
front and loads from the back. Then they are committed, and the sequence is admitted as if they had never been evicted.
What is not an exact prefix is loaded when the sequence is admitted (`sparsex_jax.scheduler.loading`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.restoration import Chunk, Restoration
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.errors import StoreFullError
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.scheduler.loading import Loading, end_of
from sparsex_jax.scheduler.sequence import Sequence
from sparsex_jax.scheduler.tiers import Tiers
from sparsex_jax.tiers.index import Found

MOST_RESTORED = 8  # prefixes at once; they share the link
DISK_BYTES_PER_S = 1e9  # as expected before anything was read

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Prefix:
    """A prefix under way.

    Attributes:
      cache: whose pages it has.
      start: where it goes on behind what the store had.
      behind: the nodes of what the store had.
      chain: the blocks that it is restored from.
      began: `time.perf_counter()` then.
    """

    restoration: Restoration
    cache: PageCache
    namespace: str
    start: int
    behind: list[Node | None]
    chain: list[Found]
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def stands(self) -> bool:
        """Whether nothing of what it goes on behind was withdrawn or forgotten meanwhile."""
        now = self.cache.tree.node_of
        return all(now[page] is node for page, node in zip(self.restoration.pages, self.behind, strict=False))


class Restoring:
    """What comes back for waiting sequences.

    Attributes:
      num_ended: prefixes so far whose pages were given back.
    """

    def __init__(self, tiers: Tiers, loading: Loading, make_restorer: Callable[[], Restorer], page_size: int) -> None:
        """
        Args:
          loading: of what is no exact prefix.
          make_restorer: called when the first prefix comes, since it may measure the devices.
        """
        self._tiers, self._loading, self._make_restorer, self._page_size = tiers, loading, make_restorer, page_size
        self._prefixes: dict[Sequence, _Prefix] = {}
        self.num_ended = 0

    @functools.cached_property
    def _restorer(self) -> Restorer:
        return self._make_restorer()

    @property
    def pages(self) -> list[int]:
        """That prefixes under way hold."""
        return [page for prefix in self._prefixes.values() for page in prefix.restoration.pages]

    @property
    def active(self) -> bool:
        return bool(self._prefixes)

    def is_coming(self, cache: PageCache, sequence: Sequence) -> bool:
        """Whether a waiting sequence should wait on. The first question makes what it lacks come."""
        if sequence.coming is None:
            if len(self._prefixes) >= MOST_RESTORED:
                return True
            sequence.coming = self._begin(cache, sequence)
        if sequence.coming is None:
            return True
        prefix = self._prefixes.get(sequence)
        if prefix is not None and prefix.restoration.ended:
            self._end(cache, sequence)
        return sequence in self._prefixes or self._tiers.is_reading(sequence.coming)

    def pump(self, wait: float) -> None:
        """A turn of loading and computing."""
        self._restorer.pump(wait)

    def cancel(self, cache: PageCache, sequence: Sequence) -> None:
        """Nothing comes any more for a sequence."""
        if sequence in self._prefixes:
            self._restorer.cancel(self._prefixes[sequence].restoration)
            self._end(cache, sequence)

    def cancel_all(self, cache: PageCache, *, again: bool) -> None:
        """Nothing comes any more. What waits may ask again, or is admitted without."""
        for sequence in list(self._prefixes):
            self.cancel(cache, sequence)
            sequence.coming = None if again else set()

    def _begin(self, cache: PageCache, sequence: Sequence) -> set[bytes] | None:
        """Make a prefix come, and read what else is on disk.

        Returns:
          The keys of what is being read. None if the prefix goes on behind what is coming itself, which would be read
          before it is there: ask again.
        """
        tokens, reuse = sequence.to_prefill()
        tokens = sequence.to_find(tokens)
        method = method_of(reuse)
        if not self._tiers.has_blocks or not (method.uses_prefix or method.uses_segments):
            return set()
        match = self._loading.look(cache, tokens, sequence.namespace, method)
        try:
            chain, others = self._loading.lacking(tokens, sequence.namespace, method, match)
            exact = self._exact(chain, match)
            if exact and self._loading.coming_into(match.prefix_pages):
                return None
            if exact:
                self._begin_prefix(cache, sequence, match, exact)
        except StoreFullError:
            log.debug("there are no pages for a prefix that could be loaded")
            return set()
        except Exception:
            log.exception("a stored prefix could not be restored; it is computed")
            return set()
        finally:
            cache.let_go(match)
        rest = [found.block.key for found in (*chain[len(exact) :], *others)]
        for key in rest:
            self._tiers.read(key)
        return set(rest)

    def _exact(self, chain: list[Found], match: Match) -> list[Found]:
        """The leading blocks that are exact, if all before them is."""
        if match.num_exact_tokens < match.num_prefix_tokens:
            return []
        number = next((i for i, each in enumerate(chain) if each.block.exact < each.num_tokens), len(chain))
        return chain[:number]

    def _begin_prefix(self, cache: PageCache, sequence: Sequence, match: Match, chain: list[Found]) -> None:
        size, shared = self._page_size, match.prefix_pages
        end, start = end_of(chain), len(shared) * size
        if end - start < size:
            return
        new = cache.allocate(-(-end // size) - len(shared))
        cache.share(shared)
        pages, behind = [*shared, *new], [cache.tree.node_of[page] for page in shared]
        tokens, _ = sequence.to_prefill()
        try:
            chunks = [self._chunk(found, start) for found in chain]
            restoration = self._restorer.begin(tokens[:end], pages, chunks)
        except BaseException:
            cache.release(pages)
            raise
        self._prefixes[sequence] = _Prefix(restoration, cache, sequence.namespace, start, behind, chain)

    def _chunk(self, found: Found, start: int) -> Chunk:
        block = found.block
        begin = max(block.start, start)
        kept = self._tiers.read(block.key)
        seconds = block.num_tokens * self._tiers.bytes_per_token / DISK_BYTES_PER_S
        return Chunk(begin, block.start + found.num_tokens, kept, (begin - block.start) // self._page_size, seconds)

    def _end(self, cache: PageCache, sequence: Sequence) -> None:
        """Commit what has come, and let go of its pages. A cache that replaced the prefix's own never had them."""
        prefix = self._prefixes.pop(sequence)
        restoration = prefix.restoration
        self.num_ended += 1
        if prefix.cache is not cache:
            return
        if restoration.error is not None:
            log.warning("a stored prefix could not be restored; it is computed", exc_info=restoration.error)
        elif restoration.done and prefix.stands:
            length = len(restoration.tokens)
            cache.commit(restoration.pages, restoration.tokens, prefix.namespace, exact_tokens=length)
            counts = restoration.counts
            loaded = round((length - prefix.start) * counts.loaded / max(counts.loaded + counts.computed, 1))
            sequence.restored_tokens += loaded
            sequence.computed_on_the_way += length - prefix.start - loaded
            self._tiers.counts.loaded_bytes += counts.loaded_bytes
            if loaded:
                sequence.timeline.add("load", prefix.began, loaded)
                self._note_tiers(sequence, prefix, loaded / (length - prefix.start))
            self._tiers.counts.overtaken += counts.overtaken
        cache.release(restoration.pages)

    def _note_tiers(self, sequence: Sequence, prefix: _Prefix, share: float) -> None:
        """Note which tiers a committed prefix came from, of whose tokens this share was loaded."""
        pages, size = prefix.restoration.pages, self._page_size
        for found in prefix.chain:
            begin, end = max(found.block.start, prefix.start), found.block.start + found.num_tokens
            own = pages[begin // size : -(-end // size)]
            self._loading.came(prefix.cache, found, own, round((end - begin) * share), sequence.came_from)
