"""The tiers below the device's store: host memory and, if there is one, a disk.

    a sequence ends      `keep`: its pages are cut into blocks, which go down to host memory while others compute
    a block comes down   it is written to the disk as well, on another thread
    host memory is full  the block that was used least recently goes, if the new one returns sooner
                         (`sparsex_jax.tiers.demand`); it is on the disk still
    a prompt comes       `read`: what is on the disk only comes to host memory, on another thread
    another engine       what it has of a prompt may come into host memory as well (`sparsex_jax.scheduler.peering`)

`sparsex_jax.scheduler.restoring` and `loading` bring blocks from host memory back into the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.company import company_namespace
from sparsex_jax.cache.tree import Node
from sparsex_jax.device.link import HostBlock, Link
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import InvalidRequestError, LinkError, StoreFullError
from sparsex_jax.model.digest import weights_digest
from sparsex_jax.model.kv_copies import without_kv_copies
from sparsex_jax.scheduler.blocks import blocks_of
from sparsex_jax.scheduler.mirroring import Mirroring
from sparsex_jax.scheduler.tier_stats import TierCounts, TierStats
from sparsex_jax.tiers import block_file
from sparsex_jax.tiers.block_file import BlockFile
from sparsex_jax.tiers.blocks import BLOCK_PAGES, Block
from sparsex_jax.tiers.demand import New
from sparsex_jax.tiers.disk import DiskStore
from sparsex_jax.tiers.fingerprint import digest
from sparsex_jax.tiers.host import HostStore
from sparsex_jax.tiers.index import BlockIndex

PASSING = 8  # a part of host memory is for blocks that it has no room for, on their way from the disk or to it
MOST_MOVING = 4  # blocks on their way down at once: each has a copy on the device until it has arrived

# How many leading ones of these blocks a tier takes, of a sequence of so many bytes; the last is what it was promised.
Visit = Callable[[Several[New], int, int], int]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Going:
    """A block that goes down, the nodes and pages that it is made of, and where it goes."""

    block: Block
    nodes: list[Node]
    pages: list[int]
    nbytes: int
    remembered: bool
    to_host: bool = True
    to_disk: bool = True


class Tiers:
    """Blocks of one engine. All methods belong to the thread that steps the loop.

    Attributes:
      index: which blocks there are, in either tier.
      counts: what moved so far.
    """

    def __init__(
        self,
        runner: Runner,
        link: Link,
        host_limit: int,
        disk: DiskStore | None = None,
        mirroring: Mirroring | None = None,
    ) -> None:
        """
        Args:
          host_limit: bytes of blocks in host memory.
          disk: what it has from before can be found at once.
          mirroring: restores what is stored as a mirror, on its way down. None: nothing is.

        Raises:
          InvalidRequestError: host memory has no room for one block, and another that passes where there is a disk.
        """
        self._runner, self._link, self._disk = runner, link, disk
        self.index = BlockIndex(runner.engine.page_size)
        self.counts, self.mirroring = TierCounts(), mirroring
        passing = max(host_limit // PASSING, link.block_bytes(BLOCK_PAGES)) if disk is not None else 0
        least = passing + link.block_bytes(BLOCK_PAGES)
        if host_limit < least:
            raise InvalidRequestError(f"host_store_bytes={host_limit} must be at least {least} for this model")
        self._host: HostStore[HostBlock] = HostStore(host_limit - passing)
        self._passing: HostStore[HostBlock] = HostStore(passing)
        self._going: deque[_Going] = deque()
        self._moving: list[tuple[_Going, HostBlock]] = []
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tiers") if disk is not None else None
        self._reading: dict[bytes, Future[HostBlock | None]] = {}
        self._origins: dict[bytes, str] = {}  # of what was brought here, or is being, and no prompt had yet
        self._fetching: dict[bytes, Block] = {}  # from other engines
        self._to_write: deque[_Going] = deque()
        self._writing: dict[bytes, Future[None]] = {}
        self._deleting: dict[bytes, Future[None]] = {}
        for block in disk.blocks() if disk is not None else ():
            self.index.add(block)

    @property
    def bytes_per_token(self) -> float:
        """Of KV in all layers."""
        return self._link.block_bytes(1) / self.index.page_size

    # Going down ---------------------------------------------------------------------------------------------

    def keep(self, cache: PageCache, pages: Several[int], *, remembered: bool = False) -> None:
        """A sequence of committed pages, from its beginning on, was computed or found: put those of its blocks in line
        to go down that no tier has, and for which one has room.

        Args:
          remembered: it is a remembered text, which stays longer than a chat.
        """
        sequence = [self._to_go(*each, remembered) for each in blocks_of(cache, pages)]
        holders = [self.index.holder(each.block) for each in sequence]
        self._visited([holder for holder in holders if holder is not None], remembered)
        line = {each.block.key for each in self._under_way()}
        new = [each for each, holder in zip(sequence, holders, strict=True) if self._lacks(each.block, holder)]
        new = [each for each in new if each.block.key not in line]
        self._going += self._placed(new, sum(each.nbytes for each in sequence))

    def _to_go(self, block: Block, nodes: list[Node], pages: list[int], remembered: bool) -> _Going:
        return _Going(block, nodes, pages, self._link.block_bytes(len(pages)), remembered)

    def _under_way(self) -> list[_Going]:
        return [*self._going, *(each for each, _ in self._moving)]

    def _lacks(self, block: Block, holder: Block | None) -> bool:
        """Whether some tier could take a block. What is on disk may come to host memory, but not if that has more."""
        return holder is None or (holder.key == block.key and not self.is_here(block.key))

    def _placed(self, new: list[_Going], nbytes: int) -> Iterator[_Going]:
        """Those blocks of a sequence, of so many bytes in all, that some tier has room for, with their places."""
        to_host = self._room_for(
            new, self._host.demand.visit, nbytes, [each for each in self._under_way() if each.to_host]
        )
        to_disk: set[bytes] = set()
        if self._disk is not None:
            lacking = [each for each in new if not self._is_on_disk(each.block.key)]
            promised = [each for each in (*self._under_way(), *self._to_write) if each.to_disk]
            to_disk = self._room_for(lacking, self._disk.visit, nbytes, promised)
        self.counts.refused += len(new) - len(to_host)
        for each in new:
            if each.block.key in to_host | to_disk:
                yield dataclasses.replace(each, to_host=each.block.key in to_host, to_disk=each.block.key in to_disk)

    def _room_for(self, new: list[_Going], visit: Visit, nbytes: int, promised: list[_Going]) -> set[bytes]:
        """The keys of those that a tier takes."""
        asked = [New(each.nbytes, self.index.marks(each.block), each.remembered) for each in new]
        number = visit(asked, nbytes, sum(each.nbytes for each in promised))
        return {each.block.key for each in new[:number]}

    def _visited(self, blocks: list[Block], remembered: bool) -> None:
        """These are stored, and were of use just now, wherever they were found."""
        for block in blocks:
            if block.key in self._host:
                self._host.use(block.key)
                if remembered:
                    self._host.remember(block.key)
        on_disk = [block.key for block in blocks if self._is_on_disk(block.key)]
        if on_disk and self._disk is not None and self._threads is not None:
            self._threads.submit(self._disk.touch, on_disk, remembered=remembered)  # it writes the files' times

    def pump(self, cache: PageCache) -> None:
        """Take what has arrived, and send more on its way."""
        self._take_read()
        moving, self._moving = self._moving, []
        for going, kept in moving:
            self._look_at(going, kept)
        while self._going and len(self._moving) < MOST_MOVING:
            self._send(cache, self._going.popleft())
        if self._disk is not None:
            self._write_more(self._disk)

    @property
    def busy(self) -> bool:
        """Whether `pump` has something to do, now or soon."""
        return bool(self._going or self._moving or self._reading or self._to_write or self._writing)

    def _look_at(self, going: _Going, kept: HostBlock) -> None:
        """Take a block if it has arrived. One whose copy failed is lost, and the others go on."""
        try:
            ready = kept.ready()
        except LinkError:
            log.exception("a block could not be copied to host memory")
            return
        if ready:
            self._arrive(going, kept)
        else:
            self._moving.append((going, kept))

    def _send(self, cache: PageCache, going: _Going) -> None:
        """Send a block on its way if the store still has what it is made of. What is derived is restored for that."""
        if not all(node.pages for node in going.nodes):
            return
        pages = [node.pages[0] for node in going.nodes]
        try:
            with self._restored(cache, pages) as stored:
                self._moving.append((going, self._link.spill(self._runner.store, stored)))
        except StoreFullError:
            log.debug("there are no pages for a mirror that was to go to host memory")
        except LinkError:
            log.exception("a block could not be sent to host memory")

    @contextlib.contextmanager
    def _restored(self, cache: PageCache, pages: list[int]) -> Iterator[list[int]]:
        """Pages of the store with the content of these, which nobody need hold, while it is read."""
        number = sum(map(cache.mirrors.is_derived, pages))
        if not number or self.mirroring is None:
            yield pages
            return
        cache.share(pages)
        try:
            new = cache.allocate(number)
            try:
                yield self.mirroring.restored(cache, pages, new)
            finally:
                cache.release(new)
        finally:
            cache.release(pages)

    def _arrive(self, going: _Going, kept: HostBlock) -> None:
        self.counts.spilled_bytes += kept.nbytes
        if self._disk is not None and going.to_disk:
            self._to_write.append(going)
        self._put(going.block, kept, to_host=going.to_host, remembered=going.remembered)

    def _write_more(self, disk: DiskStore) -> None:
        """Send blocks to the disk, a few at a time: what waits for a slow disk takes no memory beside the host's tier.

        A block that is on neither any more is known no longer, so that it can be stored again.
        """
        assert self._threads is not None
        written = [key for key, each in self._writing.items() if each.done()]
        for key in written:
            del self._writing[key]
            self._let_go(key)
        self._take_evicted(disk)
        while self._to_write and len(self._writing) < MOST_MOVING:
            going = self._to_write.popleft()
            kept = self._kept(going.block.key)
            if kept is not None:
                self._writing[going.block.key] = self._threads.submit(self._write, going, kept)

    def _take_evicted(self, disk: DiskStore) -> None:
        for key, used in disk.take_evicted():
            if key in self.index.blocks:
                disk.left(self.index.marks(self.index.blocks[key])[-1], used)
            self._let_go(key)

    def _write(self, going: _Going, kept: HostBlock) -> None:
        assert self._disk is not None
        try:
            self._disk.put(going.block, self._link.to_numpy(kept), remembered=going.remembered)
        except Exception:
            log.exception("a block could not be written to the disk tier")

    def _put(self, block: Block, kept: HostBlock, *, to_host: bool, remembered: bool = False) -> None:
        """Have a block in host memory; where it has no room there, among those that are passing."""
        outgrown = self.index.outgrown(block)
        to_host |= any(key in self._host for key in outgrown)
        remembered |= any(self._host.is_remembered(key) for key in outgrown)
        self._drop(outgrown)
        self.index.add(block)
        store, other = (self._host, self._passing) if to_host else (self._passing, self._host)
        other.remove(block.key)
        for key, used in store.put(block, kept, remembered=remembered):
            self._origins.pop(key, None)
            if to_host:
                self.counts.evictions += 1
                self._host.demand.left(self.index.marks(self.index.blocks[key])[-1], used)
            self._let_go(key)

    def _kept(self, key: bytes) -> HostBlock | None:
        """A block that is in host memory."""
        return self._host.find(key) or self._passing.find(key)

    def _let_go(self, key: bytes) -> None:
        """Know a block no longer that no tier has."""
        if not self.is_here(key) and not self._is_on_disk(key):
            self.index.remove(key)
            self._origins.pop(key, None)

    def _is_on_disk(self, key: bytes) -> bool:
        """Or will be."""
        doomed = key in self._deleting and not self._deleting[key].done()
        return self._disk is not None and (key in self._writing or (key in self._disk and not doomed))

    # Coming back --------------------------------------------------------------------------------------------

    def read(self, key: bytes) -> HostBlock | Future[HostBlock | None] | None:
        """A block that is in host memory, or that is read from the disk on another thread. None if it is in neither."""
        if self.is_here(key):
            return self.take(key)
        if key not in self._reading and self._threads is not None and self._is_on_disk(key):
            self._reading[key] = self._threads.submit(self._read, key)
            self._origins[key] = "disk"
        return self._reading.get(key)

    def is_here(self, key: bytes) -> bool:
        """Whether a block is in host memory."""
        return key in self._host or key in self._passing

    def take(self, key: bytes) -> HostBlock:
        """A block that is in host memory, for one who loads it now."""
        return (self._host if key in self._host else self._passing).use(key)

    def got(self, key: bytes, num_tokens: int) -> str:
        """Count that a prompt got tokens of a block. Returns where it was before: `host`, `disk` or `peer`."""
        origin = self._origins.pop(key, "host")
        self.counts.add_tokens(origin, num_tokens)
        return origin

    def is_reading(self, keys: Iterable[bytes]) -> bool:
        return not self._reading.keys().isdisjoint(keys)

    @property
    def has_blocks(self) -> bool:
        """Whether there are any, in either tier."""
        return bool(self.index.blocks)

    @property
    def has_host_blocks(self) -> bool:
        return len(self._host) + len(self._passing) > 0

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
            return None if found is None else self._link.from_numpy(found[1], may_change=False)
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
        if self.is_here(key):
            return
        new = New(kept.nbytes, self.index.marks(block), remembered=False)
        promised = sum(each.nbytes for each, _ in self._moving if each.to_host)
        taken = self._host.demand.take([new], promised)
        self.counts.refused += 1 - taken
        self._put(block, kept, to_host=taken == 1)

    # From other engines, and to them ------------------------------------------------------------------------

    @functools.cached_property
    def fingerprint(self) -> dict[str, str | int | float]:
        """What blocks depend on besides tokens. Engines for which it is equal can use each other's."""
        return _fingerprint(self._runner, self._link)

    @functools.cached_property
    def model(self) -> str:
        """The digest of the fingerprint."""
        return digest(self.fingerprint)

    def file_of(self, key: bytes) -> Callable[[], BlockFile | None] | None:
        """What gives a block as a file, from any thread; None if it is gone by then. None: no tier has it."""
        block, kept = self.index.blocks.get(key), self._kept(key)
        if block is not None and kept is not None:
            return functools.partial(self._file_of, block, kept, self.model)
        if self._disk is not None and self._is_on_disk(key):
            return functools.partial(self._disk.file, key)
        return None

    def _file_of(self, block: Block, kept: HostBlock, model: str) -> BlockFile:
        """The file of a block in host memory, which it shares. What many ask for is summed up once."""
        pieces = self._link.to_numpy(kept)
        kept.sums = kept.sums or block_file.sums_of(pieces)
        return block_file.file_of(block, pieces, model, kept.sums)

    def host_block(self, pieces: Several[np.ndarray]) -> HostBlock:
        """As `Link.from_numpy`, from any thread, of arrays that nobody changes. Raises ValueError and LinkError."""
        return self._link.from_numpy(pieces, may_change=False)

    def nbytes_of(self, block: Block) -> int:
        """That a block takes in host memory."""
        return self._link.block_bytes(-(-block.num_tokens // self.index.page_size))

    def expect(self, blocks: Several[Block]) -> list[Block]:
        """Which blocks of another engine should be fetched: those that no tier has or awaits, as far as there is room.

        Each of them is then awaited, until `arrived` or `not_coming`.
        """
        new = [block for block in blocks if self.index.holder(block) is None and block.key not in self._fetching]
        asked = [New(self.nbytes_of(block), self.index.marks(block), remembered=False) for block in new]
        promised = sum(each.nbytes for each, _ in self._moving if each.to_host)
        promised += sum(map(self.nbytes_of, self._fetching.values()))
        taken = new[: self._host.demand.take(asked, promised)]
        self.counts.refused += len(new) - len(taken)
        self._fetching |= {block.key: block for block in taken}
        return taken

    def awaits(self, key: bytes) -> bool:
        """Whether a block is being fetched."""
        return key in self._fetching

    def arrived(self, key: bytes, kept: HostBlock) -> bool:
        """Take a block that another engine has sent. False if it was forgotten meanwhile, or is here already."""
        block = self._fetching.pop(key, None)
        if block is None or self.index.holder(block) is not None:
            return False
        self.counts.fetched_bytes += kept.nbytes
        self._origins[key] = "peer"
        self._put(block, kept, to_host=True)
        return True

    def not_coming(self, key: bytes) -> None:
        """A block could not be fetched."""
        self._fetching.pop(key, None)

    # Going ------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """The device's store is lost, and with it all that is on its way down."""
        self._going.clear()
        self._moving.clear()

    def warm_up(self) -> None:
        """Compile what moves blocks, and have host memory ready."""
        self._runner.store = self._link.warm_up(self._runner.store)
        self._link.reserve(self._runner.store, self._host.limit_bytes + self._passing.limit_bytes)

    def forget(self, text: Int32[np.ndarray, "text"], namespace: str) -> None:
        """Remove every block with a copy of a text, and those that are on their way."""
        names = namespace, company_namespace(namespace)
        stored = [key for name in names for key in self.index.copies(text, name)]
        self._drop(stored)
        self._delete_now(stored)
        on_the_way = BlockIndex(self.index.page_size)
        for each in self._under_way():
            on_the_way.add(each.block)
        for block in self._fetching.values():
            on_the_way.add(block)
        gone = {key for name in names for key in on_the_way.copies(text, name)}
        self._going = deque(each for each in self._going if each.block.key not in gone)
        self._moving = [(each, kept) for each, kept in self._moving if each.block.key not in gone]
        self._fetching = {key: block for key, block in self._fetching.items() if key not in gone}

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
            self._passing.remove(key)
            self._origins.pop(key, None)
            if key in self._writing:
                self._writing[key].cancel()
        if keys and self._disk is not None and self._threads is not None:
            deleted = self._threads.submit(self._delete, keys)  # behind what is being written
            self._deleting = {key: each for key, each in self._deleting.items() if not each.done()}
            self._deleting |= dict.fromkeys(keys, deleted)

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
            self._host.nbytes + self._passing.nbytes,
            self._host.limit_bytes + self._passing.limit_bytes,
            len(self._host) + len(self._passing),
            disk.nbytes if disk is not None else 0,
            disk.limit_bytes if disk is not None else 0,
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
        self._passing.check()
        assert not [key for key in self.index.blocks if key in self._host and key in self._passing]
        nowhere = {key for key in self.index.blocks if not self.is_here(key) and not self._is_on_disk(key)}
        if self._disk is not None:
            self._take_evicted(self._disk)  # also what was evicted on the other thread until now
        assert nowhere & self.index.blocks.keys() <= self._reading.keys(), len(nowhere)
        assert self._origins.keys() <= self.index.blocks.keys()


def make_tiers(runner: Runner, link: Link, mirroring: Mirroring | None = None) -> Tiers:
    """The tiers that an engine's configuration asks for. Arguments as `Tiers`.

    Raises:
      DiskStoreError: the directory cannot be used, or another process has it.
    """
    engine = runner.engine
    if engine.disk_store is None:
        return Tiers(runner, link, engine.host_store_bytes, mirroring=mirroring)
    disk = DiskStore(engine.disk_store, engine.disk_store_bytes, _fingerprint(runner, link))
    try:
        return Tiers(runner, link, engine.host_store_bytes, disk, mirroring)
    except InvalidRequestError:
        disk.close()
        raise


def _fingerprint(runner: Runner, link: Link) -> dict[str, str | int | float]:
    """All that blocks depend on besides tokens: frequencies, biases and windows are among the fields of the model. How
    long a prompt may be is too, and says nothing of a block."""
    model = dataclasses.asdict(runner.model)
    del model["max_position"]
    return {
        "model": json.dumps(model, sort_keys=True),
        "weights": weights_digest(without_kv_copies(runner.params, runner.model, runner.mesh)),
        "dtype": runner.engine.dtype,
        "kv_dtype": runner.engine.store_dtype,
        "page_size": runner.engine.page_size,
        "groups": str([len(layers) for layers in link.layers]),
    }
