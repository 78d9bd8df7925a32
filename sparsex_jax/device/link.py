"""The link between the devices' store and host memory: KV goes down and up in blocks of pages.

A block's KV is kept in pieces, one for each group of consecutive layers, so that layers can be loaded apart. Where the
platform has memory that is pinned for its devices, pieces lie in it: copies then run at the link's full rate, beside
what the devices compute. The heads of a piece are split over the devices as the store's are, so each device moves its
own heads over its own link.

JAX dispatches all of it asynchronously. What is dispatched to a device runs in order, but copies to and from the host
have streams of their own. So a load runs beside the compute that is dispatched *after* it; and a program that waits for
a load makes all wait that is dispatched behind it, which is why `Link.place` takes only what has arrived.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.device.pieces import SIZES, gather, layer_groups, padded_size, piece_sharding, scatter, scatter_all
from sparsex_jax.errors import LinkError
from sparsex_jax.model.sharding import kv_copies
from sparsex_jax.model.store import abstract_store
from sparsex_jax.tiers.blocks import BLOCK_PAGES
from sparsex_kernels.layout import Store

IN_FLIGHT_BYTES = 1 << 30  # on the way up at a time: they take memory of the devices
_HEADS = 3  # the axis of a piece
TOGETHER = 8  # full blocks that one call moves: each call takes a fraction of a millisecond of the host
MOST_IN_FLIGHT_BYTES = 4 << 30  # so that what is small and goes the same way does not wait for long
ROOM_SHARE = 0.25  # of the memory that the devices have free, for what is on the way up


def host_memory_kind(mesh: Mesh) -> str:
    """The memory of the host that these devices reach fastest; their own, if they have no other."""
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    return next((kind for kind in ("pinned_host", "unpinned_host") if kind in kinds), device.default_memory().kind)


Targets = Array | list[Array]  # `[TOGETHER, BLOCK_PAGES]`, or for each block; -1 drops a page


class _Transfer:
    """Pieces that are copied from one memory to another.

    Attributes:
      pieces: of some groups of layers, each `[padded pages, layers of the group, 2, kv_heads, page_size, head_dim]`.
      pages: how many pages there are without the padding.
      due: a throttled link says that it is ready from this time on, by `time.monotonic`.
    """

    def __init__(self, pieces: tuple[Array, ...], pages: int, due: float) -> None:
        self.pieces, self.pages, self.due = pieces, pages, due
        self._ended = False

    @property
    def nbytes(self) -> int:
        """Bytes that the pieces take, with their padding, on all devices together."""
        return sum(piece.nbytes for piece in self.pieces)

    def ready(self) -> bool:
        """Whether the copy has ended. Never waits.

        Raises:
          LinkError: the copy has failed.
        """
        if not self._ended and time.monotonic() >= self.due and _are_ready(self.pieces):
            self._end()
        return self._ended

    def wait(self) -> None:
        """Return once the copy has ended.

        Raises:
          LinkError: the copy has failed.
        """
        if not self._ended:
            time.sleep(max(self.due - time.monotonic(), 0.0))
            self._end()

    def _end(self) -> None:
        with _link_errors(self.nbytes):
            jax.block_until_ready(self.pieces)
        self._ended = True


class HostBlock(_Transfer):
    """The KV of a block in host memory, or on its way there. It is freed when nothing refers to it any more.

    Until it is ready, a copy of it takes as many bytes of the devices' memory, so few should be on their way at a time.

    Attributes:
      sums: the checksums of its pieces (`block_file.sums_of`), once somebody has needed them.
    """

    sums: Sequence[str] | None = None


class Arriving(_Transfer):
    """Pieces of a block on their way to the devices, whose memory they take.

    Attributes:
      groups: which groups of layers the pieces are of.
    """

    def __init__(self, pieces: tuple[Array, ...], pages: int, due: float, groups: tuple[int, ...]) -> None:
        super().__init__(pieces, pages, due)
        self.groups = groups


class _Lane:
    """One direction of a link, which a throttle lets carry one transfer after the other."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s, self._free_at = bytes_per_s, 0.0

    def due(self, nbytes: int, not_before: float = 0.0) -> float:
        """When a transfer that is asked for now will have ended; 0 without a throttle."""
        if self._bytes_per_s is None:
            return 0.0
        begins = max(self._free_at, time.monotonic(), not_before)
        self._free_at = begins + nbytes / self._bytes_per_s
        return self._free_at


class Link:
    """Moves blocks between an engine's store and host memory.

    Attributes:
      layers: the layers of each group.
      memory_kind: where blocks are kept, in JAX's terms.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        mesh: Mesh,
        *,
        num_groups: int = 4,
        bytes_per_s: float | None = None,
    ) -> None:
        """
        Args:
          num_groups: of consecutive layers, as even as they can be; a model of fewer layers has a group for each.
          bytes_per_s: for tests and benches: what takes less is said to be ready later, so that all devices together
            seem to move this much each way, one transfer after the other.

        Raises:
          ValueError: one of these is not above 0.
        """
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be at least 1")
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s={bytes_per_s} must be above 0")
        self._mesh, self._store, self._copies = mesh, abstract_store(model, engine, mesh), kv_copies(model, mesh)
        self.layers = layer_groups(model.num_layers, num_groups)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._starts = jax.device_put([np.int32(layers.start) for layers in self.layers], self._everywhere)
        self.memory_kind = host_memory_kind(mesh)
        self._shares_memory = mesh.devices.flat[0].platform == "cpu"  # JAX may use a NumPy array's memory as it is
        self._store_kind = mesh.devices.flat[0].default_memory().kind
        self._down, self._up = _Lane(bytes_per_s), _Lane(bytes_per_s)

    def block_bytes(self, pages: int) -> int:
        """Bytes that a block of so many pages takes in host memory: it is padded to 1, 2, 4, 8 or 16 pages."""
        _, _, *page = self._store.shape
        return padded_size(pages) * self._store.shape[0] * math.prod(page) * self._store.dtype.itemsize

    def room_bytes(self) -> int:
        """How much may be on the way up at a time: a part of what the devices have free, or `IN_FLIGHT_BYTES`."""
        stats = [device.memory_stats() or {} for device in self._mesh.local_devices]
        free = min(each.get("bytes_limit", 0) - each.get("bytes_in_use", 0) for each in stats)
        return min(max(IN_FLIGHT_BYTES, int(ROOM_SHARE * free) * len(stats)), MOST_IN_FLIGHT_BYTES)

    def spill(self, store: Store, pages: Sequence[int]) -> HostBlock:
        """Copy 1 to 16 pages of all layers to host memory. Does not wait: the store may be donated at once.

        Raises:
          LinkError: there is no memory for it.
        """
        self._check_pages(pages)
        padded = np.full(padded_size(len(pages)), pages[-1], np.int32)  # with a page of the same sequence
        padded[: len(pages)] = pages
        with _link_errors(self.block_bytes(len(pages))):
            pieces = gather(store, padded, mesh=self._mesh, groups=self.layers)
            pieces = jax.device_put(pieces, self._shardings(pieces, self.memory_kind))
        return HostBlock(pieces, len(pages), self._down.due(self.block_bytes(len(pages))))

    def fetch(self, block: HostBlock, groups: Sequence[int]) -> Arriving:
        """Begin to copy the pieces of these groups of layers to the devices. Does not wait.

        It runs beside the compute that is dispatched behind it, not beside what was dispatched before.

        Raises:
          LinkError: there is no memory for it.
        """
        return self._send_up(tuple(block.pieces[group] for group in groups), [block], tuple(groups))

    def fetch_together(self, blocks: Sequence[HostBlock], group: int) -> Arriving:
        """Begin to copy one group of layers of several blocks, as `fetch`: that is asked for sooner than one by one."""
        return self._send_up(tuple(block.pieces[group] for block in blocks), blocks, (group,) * len(blocks))

    def _send_up(self, pieces: tuple[Array, ...], blocks: Sequence[HostBlock], groups: tuple[int, ...]) -> Arriving:
        nbytes = sum(piece.nbytes for piece in pieces)
        with _link_errors(nbytes):
            arrived = jax.device_put(pieces, self._shardings(pieces, self._store_kind))
        due = self._up.due(nbytes, max(block.due for block in blocks))
        return Arriving(arrived, max(block.pages for block in blocks), due, groups)

    def targets(self, blocks: Sequence[HostBlock], places: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Targets:
        """Where pages of blocks go, on the devices: for `place_together`.

        Args:
          places: rows and pages of each block, as in `place`.

        Raises:
          LinkError: there is no memory for it.
        """
        for block, (rows, pages) in zip(blocks, places, strict=True):
            self._check_pages(pages)
            _check_rows(rows, pages, block.pages)
        each = [_target(padded_size(block.pages), *place) for block, place in zip(blocks, places, strict=True)]
        are_full = [len(target) for target in each] == [BLOCK_PAGES] * TOGETHER
        with _link_errors(sum(target.nbytes for target in each)):
            return jax.device_put(np.stack(each) if are_full else each, self._everywhere)

    def place_together(self, store: Store, arriving: Arriving, targets: Targets) -> Store:
        """Write what `fetch_together` began, as `place`. Raises LinkError."""
        arriving.wait()
        if isinstance(targets, list):
            return self._write(store, arriving, targets)
        first = self._starts[arriving.groups[0]]
        return scatter_all(store, arriving.pieces, targets, first, mesh=self._mesh)

    def place(self, store: Store, arriving: Arriving, rows: Sequence[int], pages: Sequence[int]) -> Store:
        """Write pages of a block into pages of the store, in the layers that have arrived.

        If they have not arrived yet, it waits: a step that fails takes the store with it, so none gets what may not
        come.

        Args:
          store: it is donated.
          rows: which pages of the block, each at most once.
          pages: where each goes, each at most once.

        Raises:
          LinkError: the copy has failed. The store is as it was.
        """
        self._check_pages(pages)
        _check_rows(rows, pages, arriving.pages)
        arriving.wait()
        target = jax.device_put(_target(padded_size(arriving.pages), rows, pages), self._everywhere)
        return self._write(store, arriving, [target] * len(arriving.pieces))

    def warm_up(self, store: Store) -> Store:
        """Compile all that `spill` and both ways to place need. Donates the store, whose content stays as it is."""
        for size in SIZES:
            block = self.spill(store, [0] * size)
            arriving = self.fetch(block, range(len(self.layers)))
            target = jax.device_put(_target(size, [], []), self._everywhere)
            store = self._write(store, arriving, [target] * len(self.layers))
        nowhere = jax.device_put(np.full((TOGETHER, BLOCK_PAGES), -1, np.int32), self._everywhere)
        for piece, first in zip(arriving.pieces, self._starts, strict=True):  # the last ones are full
            store = scatter_all(store, (piece,) * TOGETHER, nowhere, first, mesh=self._mesh)
        return store

    def reserve(self, store: Store, nbytes: int) -> None:
        """Have so much host memory pinned now. Pinning is slow, and the first blocks would wait for it: 18 s for 40 GB.

        Raises:
          LinkError: there is not so much memory.
        """
        if self._shares_memory:
            return  # nothing is pinned on a CPU
        size = self.block_bytes(BLOCK_PAGES)
        held = []
        for _ in range(nbytes // size):
            held.append(self.spill(store, [0] * BLOCK_PAGES))
            held[-1].wait()  # else their copies on the devices would be held too

    def to_numpy(self, block: HostBlock) -> list[np.ndarray]:
        """Its pieces without padding, with the heads of all devices, each head once. Waits until it is ready.

        They are not to be written to: they are the block's own memory where one device has all of it.

        Raises:
          LinkError: the copy has failed.
        """
        block.wait()
        whole = [np.asarray(_view(piece))[: block.pages] for piece in block.pieces]
        return [np.ascontiguousarray(piece[:, :, :, :: self._copies]) for piece in whole]

    def from_numpy(self, pieces: Sequence[np.ndarray], *, may_change: bool = True) -> HostBlock:
        """A block of what `to_numpy` gave, also that of another mesh.

        Args:
          may_change: the arrays may be changed afterwards. Else the block may lie in their memory.

        Raises:
          ValueError: the shapes or dtypes are not those of this link.
          LinkError: there is no memory for it.
        """
        self._check_pieces(pieces)
        pages = len(pieces[0])
        spread = [piece.repeat(self._copies, axis=_HEADS) if self._copies > 1 else piece for piece in pieces]
        padded = tuple(_pad(piece, padded_size(pages), copy=self._shares_memory and may_change) for piece in spread)
        with _link_errors(self.block_bytes(pages)):
            placed = jax.device_put(padded, self._shardings(padded, self.memory_kind))
        block = HostBlock(placed, pages, 0.0)
        block.wait()  # JAX may read the arrays until then
        return block

    def _write(self, store: Store, arriving: Arriving, targets: Sequence[Int[Array, "_"]]) -> Store:
        for group, piece, target in zip(arriving.groups, arriving.pieces, targets, strict=True):
            store = scatter(store, piece, target, self._starts[group], mesh=self._mesh)
        return store

    def _shardings(self, pieces: Sequence[Array | np.ndarray], memory_kind: str) -> tuple[NamedSharding, ...]:
        return tuple(piece_sharding(self._mesh, piece.shape, memory_kind) for piece in pieces)

    def _check_pages(self, pages: Sequence[int]) -> None:
        """JAX itself would clamp or drop what is outside."""
        if not 1 <= len(pages) <= BLOCK_PAGES:
            raise ValueError(f"len(pages)={len(pages)} must be from 1 to {BLOCK_PAGES}")
        if not all(0 <= page < self._store.shape[1] for page in pages):
            raise ValueError(f"pages={[*pages]} must be from 0 to {self._store.shape[1] - 1}")

    def _check_pieces(self, pieces: Sequence[np.ndarray]) -> None:
        found = [(piece.shape, piece.dtype) for piece in pieces]
        pages = len(pieces[0]) if pieces and pieces[0].ndim else 0
        _, _, kv, heads, *page = self._store.shape
        shape = kv, heads // self._copies, *page
        wanted = [((pages, len(layers), *shape), self._store.dtype) for layers in self.layers]
        if found != wanted or not 1 <= pages <= BLOCK_PAGES:
            raise ValueError(f"pieces have {found}; this link's have {wanted}, with 1 to {BLOCK_PAGES} pages")


def _check_rows(rows: Sequence[int], pages: Sequence[int], size: int) -> None:
    if len({*pages}) != len(pages):
        raise ValueError(f"pages={[*pages]} must all be different")
    if len(rows) != len(pages) or len({*rows}) != len(rows) or not all(0 <= row < size for row in rows):
        raise ValueError(f"rows={[*rows]} must be {len(pages)} different pages of a block of {size}")


def _target(size: int, rows: Sequence[int], pages: Sequence[int]) -> Int[np.ndarray, "size"]:
    """For each page of a padded block, the page of the store that it goes to; -1: none."""
    target = np.full(size, -1, np.int32)
    target[list(rows)] = pages
    return target


def _are_ready(pieces: Sequence[Any]) -> bool:
    return all(piece.is_ready() for piece in pieces)  # which JAX's `Array` has, but does not declare


def _pad(piece: np.ndarray, pages: int, *, copy: bool) -> np.ndarray:
    piece = np.asarray(piece)  # JAX takes no subclasses, such as `np.memmap`
    missing = np.zeros_like(piece, shape=(pages - len(piece), *piece.shape[1:]))
    return np.concatenate([piece, missing]) if copy or len(missing) else piece


def _view(piece: Array) -> Array:
    """The same memory as another array. An array keeps the NumPy array that was made of it, a second copy for ever."""
    shards = [shard.data for shard in piece.addressable_shards]
    return jax.make_array_from_single_device_arrays(piece.shape, piece.sharding, shards)


@contextlib.contextmanager
def _link_errors(nbytes: int) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise LinkError(
            f"{nbytes} bytes of KV could not be moved between the devices and host memory. On GPUs, "
            f"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB limits the host memory that JAX pins: {error}"
        ) from error
