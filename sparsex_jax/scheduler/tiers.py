"""The tiers below the device's store: host memory and, if there is one, a disk.

    a sequence ends      `keep`: its pages are cut into blocks, which go down to host memory while others compute
    a block comes down   it is written to the disk as well, on another thread
    host memory is full  the block that was used least recently goes; it is on the disk still
    a prompt comes       `ask`: what the device's store lacks of it is read from the disk, on another thread;
                         `restore`: it is loaded into pages and committed there, before the prompt is looked up

Loads are asynchronous on the device: what reads the pages waits for them there, and the host goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.cache.company import company_namespace
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.link import Arriving, HostBlock, Link
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError, StoreFullError
from sparsex_jax.model.digest import weights_digest
from sparsex_jax.reuse.methods import Method
from sparsex_jax.scheduler.blocks import blocks_of, maker_of
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.disk import DiskStore
from sparsex_jax.tiers.host import HostStore
from sparsex_jax.tiers.index import BlockIndex, Found

MOST_MOVING = 4  # blocks on their way down at once: each has a copy on the device until it has arrived

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TierCounts:
    """What moved, in bytes, and what prompts got, in tokens.

    Attributes:
      spilled_bytes, loaded_bytes: from the device to host memory, and back.
      read_bytes: from the disk.
      host_tokens, disk_tokens: tokens that prompts got from blocks that were in host memory, or on disk only.
      overtaken: pieces of blocks that were to be loaded, and were computed because they were late.
      evictions: blocks that host memory lost.
      lost: blocks that were to be read from the disk and were not there, or not whole.
    """

    spilled_bytes: int = 0
    loaded_bytes: int = 0
    read_bytes: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    overtaken: int = 0
    evictions: int = 0
    lost: int = 0


@dataclasses.dataclass(frozen=True)
class TierStats:
    """How full the tiers are, in bytes and blocks, and the `TierCounts`."""

    host_bytes: int
    host_limit: int
    host_blocks: int
    disk_bytes: int
    disk_blocks: int
    moving_blocks: int
    counts: TierCounts


class Tiers:
    """Blocks of one engine. All methods belong to the thread that steps the loop.

    Attributes:
      index: which blocks there are, in either tier.
      counts: what moved so far.
    """

    def __init__(self, runner: Runner, link: Link, host_limit: int, disk: DiskStore | None = None) -> None:
        """
        Args:
          host_limit: bytes of blocks in host memory.
          disk: what it has from before can be found at once.
        """
        self._runner, self._link, self._disk = runner, link, disk
        self.index = BlockIndex(runner.engine.page_size)
        self.counts = TierCounts()
        self._host: HostStore[HostBlock] = HostStore(host_limit)
        self._going: deque[tuple[Block, list[Node], list[int]]] = deque()
        self._moving: list[tuple[Block, HostBlock]] = []
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tiers") if disk is not None else None
        self._reading: dict[bytes, Future[HostBlock | None]] = {}
        self._to_write: deque[Block] = deque()
        self._writing: dict[bytes, Future[None]] = {}
        for block in disk.blocks() if disk is not None else ():
            self.index.add(block)

    @property
    def bytes_per_token(self) -> float:
        """Of KV in all layers."""
        return self._link.block_bytes(1) / self.index.page_size

    # Going down ---------------------------------------------------------------------------------------------

    def keep(self, cache: PageCache, pages: Several[int]) -> None:
        """Put the blocks of committed pages in line to go down: those of one sequence, from its beginning on."""
        line = {block.key for block, _, _ in self._going}
        for block, nodes, its_pages in blocks_of(cache, pages):
            if block.key in self._host:
                self._host.use(block.key)
            elif block.key not in line and not self.index.has_all_of(block):
                self._going.append((block, nodes, its_pages))

    def pump(self, cache: PageCache) -> None:
        """Take what has arrived, and send more on its way."""
        self._take_read()
        moving, self._moving = self._moving, []
        for block, kept in moving:
            self._look_at(block, kept)
        while self._going and len(self._moving) < MOST_MOVING:
            self._send(cache, *self._going.popleft())
        if self._disk is not None:
            self._write_more(self._disk)

    @property
    def busy(self) -> bool:
        """Whether `pump` has something to do, now or soon."""
        return bool(self._going or self._moving or self._reading or self._to_write or self._writing)

    def _look_at(self, block: Block, kept: HostBlock) -> None:
        """Take a block if it has arrived. One whose copy failed is lost, and the others go on."""
        try:
            ready = kept.ready()
        except LinkError:
            log.exception("a block could not be copied to host memory")
            return
        if ready:
            self._arrive(block, kept)
        else:
            self._moving.append((block, kept))

    def _send(self, cache: PageCache, block: Block, nodes: list[Node], pages: list[int]) -> None:
        """Send a block on its way if its pages still have what they had."""
        if any(cache.tree.node_of[page] is not node for page, node in zip(pages, nodes, strict=True)):
            return
        try:
            self._moving.append((block, self._link.spill(self._runner.store, pages)))
        except LinkError:
            log.exception("a block could not be sent to host memory")

    def _arrive(self, block: Block, kept: HostBlock) -> None:
        self.counts.spilled_bytes += kept.nbytes
        self._put(block, kept)
        if self._disk is not None:
            self._to_write.append(block)

    def _write_more(self, disk: DiskStore) -> None:
        """Send blocks to the disk, a few at a time: what waits for a slow disk takes no memory beside the host's tier.

        A block that is on neither any more is known no longer, so that it can be stored again.
        """
        assert self._threads is not None
        written = [key for key, each in self._writing.items() if each.done()]
        for key in written:
            del self._writing[key]
        for key in (*written, *disk.take_evicted()):
            if key not in self._host and not self._is_on_disk(key):
                self.index.remove(key)
        while self._to_write and len(self._writing) < MOST_MOVING:
            block = self._to_write.popleft()
            if block.key in self._host:
                kept = self._host.use(block.key)
                self._writing[block.key] = self._threads.submit(self._write, block, kept)

    def _write(self, block: Block, kept: HostBlock) -> None:
        assert self._disk is not None
        try:
            self._disk.put(block, self._link.to_numpy(kept))
        except Exception:
            log.exception("a block could not be written to the disk tier")

    def _put(self, block: Block, kept: HostBlock) -> None:
        self._drop(self.index.outgrown(block))
        self.index.add(block)
        for key in self._host.put(block, kept):
            self.counts.evictions += 1
            if not self._is_on_disk(key):
                self.index.remove(key)

    def _is_on_disk(self, key: bytes) -> bool:
        return self._disk is not None and (key in self._writing or key in self._disk)

    # Coming back --------------------------------------------------------------------------------------------

    def read(self, key: bytes) -> HostBlock | Future[HostBlock | None] | None:
        """A block that is in host memory, or that is read from the disk on another thread. None if it is in neither."""
        if key in self._host:
            return self._host.use(key)
        if key not in self._reading and self._threads is not None and self._is_on_disk(key):
            self._reading[key] = self._threads.submit(self._read, key)
        return self._reading.get(key)

    def is_reading(self, keys: Iterable[bytes]) -> bool:
        return not self._reading.keys().isdisjoint(keys)

    @property
    def has_blocks(self) -> bool:
        return bool(self.index.blocks)

    def wait(self, seconds: float) -> None:
        """Wait until something is read, but so long at most."""
        if self._reading:
            wait(self._reading.values(), seconds)
        else:
            time.sleep(seconds)

    def _read(self, key: bytes) -> HostBlock | None:
        assert self._disk is not None
        try:
            found = self._disk.get(key)
            return None if found is None else self._link.from_numpy(found[1])
        except Exception:
            log.exception("a block could not be read from the disk tier")
            return None

    def _take_read(self) -> None:
        for key, future in list(self._reading.items()):
            if future.done():
                del self._reading[key]
                self._take_block(key, future.result())

    def _take_block(self, key: bytes, kept: HostBlock | None) -> None:
        block = self.index.blocks.get(key)
        if block is None:  # forgotten meanwhile
            return
        if kept is None:
            self.counts.lost += 1
            self._drop([key])
            return
        self.counts.read_bytes += kept.nbytes
        self.counts.disk_tokens += block.num_tokens
        self._put(block, kept)

    def restore(self, cache: PageCache, tokens: Int32[np.ndarray, "tokens"], namespace: str, method: Method) -> int:
        """Load what host memory has of a prompt and the store lacks, and commit it there. Returns how many tokens.

        Nothing is loaded where there are no pages for it, or where the link fails: the prompt is computed then.
        """
        if not len(self._host):
            return 0
        match, loaded = self.look(cache, tokens, namespace, method), 0
        try:
            chain, others = self.lacking(tokens, namespace, method, match)
            chain = list(itertools.takewhile(self._is_here, chain))
            loaded += self._restore_prefix(cache, tokens, namespace, match, chain)
            for found in filter(self._is_here, others):
                loaded += self._restore_segment(cache, found)
        except StoreFullError:
            log.debug("there are no pages for what could be loaded")
        except LinkError:
            log.exception("stored KV could not be loaded; it is computed")
        finally:
            cache.unpin(match)
        self.counts.host_tokens += loaded
        return loaded

    def _is_here(self, found: Found) -> bool:
        return found.block.key in self._host

    def look(self, cache: PageCache, tokens: Int32[np.ndarray, "tokens"], namespace: str, method: Method) -> Match:
        """What the store has already."""
        return cache.lookup(
            tokens,
            namespace,
            prefix=method.uses_prefix,
            segments=method.uses_segments,
            min_segment=method.min_segment_tokens,
            accepts=functools.partial(method.accepts, num_layers=self._runner.model.num_layers),
            counted=False,
        )

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
            whole = self.index.prefix(tokens[:-1], namespace, lambda block: accepts(maker_of(block)))
            chain = [each for each in whole if each.block.start + each.num_tokens > match.num_prefix_tokens]
            lacking[: end_of(chain)] = False
        others: list[Found] = []
        if method.uses_segments:
            others = self.index.segments(tokens, namespace, lacking, method.min_segment_tokens)
        known = {each.block.key for each in chain}
        return chain, [each for each in others if each.block.key not in known]

    def _restore_prefix(
        self,
        cache: PageCache,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        match: Match,
        chain: list[Found],
    ) -> int:
        if not chain:
            return 0
        page_size, shared = self.index.page_size, match.prefix_pages
        end = end_of(chain)
        first, last = len(shared), -(-end // page_size)
        if last <= first:
            return 0
        new = cache.allocate(last - first)
        cache.share(shared)
        pages = [*shared, *new]
        with _released(cache, pages):
            self._load([_rows_of(found, first, pages, page_size) for found in chain])
            self._commit_prefix(cache, pages, tokens, namespace, chain)
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
            own = pages[: -(-end // self.index.page_size)]
            cache.commit(own, tokens[:end], namespace, exact_tokens=min(exact, end), made_by=made_by)

    def _restore_segment(self, cache: PageCache, found: Found) -> int:
        block = found.block
        pages = cache.allocate(-(-block.num_tokens // self.index.page_size))
        about: dict[str, Any] = {"exact_tokens": block.exact, "start": block.start, "made_by": maker_of(block)}
        with _released(cache, pages):
            self._load([(block, range(len(pages)), pages)])
            cache.commit(pages, np.frombuffer(block.tokens, np.int32), block.namespace, **about)
        return block.num_tokens

    def _load(self, wanted: Several[tuple[Block, range, list[int]]]) -> None:
        """Load rows of blocks into pages. Copies are asked for ahead of those that are waited for."""
        arriving: deque[Arriving] = deque()
        ahead = iter(wanted)
        for _, rows, pages in wanted:
            for block, _, _ in itertools.islice(ahead, MOST_MOVING - len(arriving)):
                arriving.append(self._link.fetch(self._host.use(block.key), range(len(self._link.layers))))
            arrived = arriving.popleft()
            self._runner.store = self._link.place(self._runner.store, arrived, rows, pages)
            self.counts.loaded_bytes += arrived.nbytes

    # Going ------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """The device's store is lost, and with it all that is on its way down."""
        self._going.clear()
        self._moving.clear()

    def clear(self) -> None:
        """Remove every block."""
        self.lose()
        self._drop(list(self.index.blocks))

    def warm_up(self) -> None:
        """Compile what moves blocks, and have host memory ready."""
        self._runner.store = self._link.warm_up(self._runner.store)
        self._link.reserve(self._runner.store, self._host.limit_bytes)

    def forget(self, text: Int32[np.ndarray, "text"], namespace: str) -> None:
        """Remove every block with a copy of a text, and those that are on their way."""
        names = namespace, company_namespace(namespace)
        stored = [key for name in names for key in self.index.copies(text, name)]
        self._drop(stored)
        self._delete_now(stored)
        on_the_way = BlockIndex(self.index.page_size)
        for block in [*(each[0] for each in self._going), *(each[0] for each in self._moving)]:
            on_the_way.add(block)
        gone = {key for name in names for key in on_the_way.copies(text, name)}
        self._going = deque(each for each in self._going if each[0].key not in gone)
        self._moving = [each for each in self._moving if each[0].key not in gone]

    def withdraw(self, cache: PageCache, pages: Several[int]) -> None:
        """Remove the blocks that were made of these pages, and of what stands before them in their sequences."""
        for page in pages:
            node = cache.tree.node_of[page]
            if node is not None:
                self.forget(np.frombuffer(node.key, np.int32), node.namespace)

    def _drop(self, keys: Iterable[bytes]) -> None:
        keys = list(keys)
        for key in keys:
            self.index.remove(key)
            self._host.remove(key)
            if key in self._writing:
                self._writing[key].cancel()
        if keys and self._disk is not None and self._threads is not None:
            self._threads.submit(self._delete, keys)  # behind what is being written

    def _delete_now(self, keys: list[bytes]) -> None:
        """Delete what is on disk already, so that no restart finds it; what is being written goes behind that."""
        if keys and self._disk is not None:
            self._delete(keys)

    def _delete(self, keys: list[bytes]) -> None:
        assert self._disk is not None
        try:
            self._disk.delete(keys)
        except Exception:
            log.exception("blocks could not be deleted from the disk tier; a restart may find them again")

    def stats(self) -> TierStats:
        disk = self._disk
        return TierStats(
            self._host.nbytes,
            self._host.limit_bytes,
            len(self._host),
            disk.nbytes if disk is not None else 0,
            len(disk) if disk is not None else 0,
            len(self._going) + len(self._moving),
            dataclasses.replace(self.counts),
        )

    def close(self) -> None:
        """Write what is still to be written, and let others have the disk."""
        if self._threads is not None and self._disk is not None:
            self._threads.shutdown()
            self._disk.close()

    def check(self) -> None:
        """Raise AssertionError unless the parts agree. For tests."""
        self._host.check()
        assert all(key in self._host or self._is_on_disk(key) for key in self.index.blocks)


@contextlib.contextmanager
def _released(cache: PageCache, pages: Several[int]) -> Iterator[None]:
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


def make_tiers(runner: Runner, link: Link) -> Tiers:
    """The tiers that an engine's configuration asks for.

    Raises:
      DiskStoreError: the directory cannot be used, or another process has it.
    """
    engine = runner.engine
    if engine.disk_store is None:
        return Tiers(runner, link, engine.host_store_bytes)
    disk = DiskStore(engine.disk_store, engine.disk_store_bytes, _fingerprint(runner, link))
    return Tiers(runner, link, engine.host_store_bytes, disk)


def _fingerprint(runner: Runner, link: Link) -> dict[str, str | int | float]:
    """All that blocks depend on besides tokens. Rotary factors and biases are among the fields of the model."""
    return {
        "model": json.dumps(dataclasses.asdict(runner.model), sort_keys=True),
        "weights": weights_digest(runner.params),
        "dtype": runner.engine.dtype,
        "page_size": runner.engine.page_size,
        "groups": str([len(layers) for layers in link.layers]),
    }
