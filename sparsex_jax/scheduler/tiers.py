"""The tiers below the device's store: host memory and, if there is one, a disk.

    a sequence ends      `keep`: its pages are cut into blocks, which go down to host memory while others compute
    a block comes down   it is written to the disk as well, on another thread
    host memory is full  the block that was used least recently goes; it is on the disk still
    a prompt comes       `read`: what is on the disk only comes to host memory, on another thread

`sparsex_jax.scheduler.restoring` and `loading` bring blocks from host memory back into the store.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.company import company_namespace
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.link import HostBlock, Link
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError
from sparsex_jax.model.digest import weights_digest
from sparsex_jax.scheduler.blocks import blocks_of
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.disk import DiskStore
from sparsex_jax.tiers.host import HostStore
from sparsex_jax.tiers.index import BlockIndex

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

    def is_here(self, key: bytes) -> bool:
        """Whether a block is in host memory."""
        return key in self._host

    def take(self, key: bytes) -> HostBlock:
        """A block that is in host memory, for one who loads it now."""
        return self._host.use(key)

    def is_reading(self, keys: Iterable[bytes]) -> bool:
        return not self._reading.keys().isdisjoint(keys)

    @property
    def has_blocks(self) -> bool:
        """Whether there are any, in either tier."""
        return bool(self.index.blocks)

    @property
    def has_host_blocks(self) -> bool:
        return len(self._host) > 0

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

    # Going ------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """The device's store is lost, and with it all that is on its way down."""
        self._going.clear()
        self._moving.clear()

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
