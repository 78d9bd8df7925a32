"""The disk tier: one file for each block, in a directory that outlives the process.

    PATH/sparsex.lock                      held while a store is open, so that a second process is refused
    PATH/<model>/fingerprint.json          what the KV depends on besides tokens; its digest names the directory
    PATH/<model>/<ke>/<key>.safetensors    a block, found by its key; the file's time is that of its last use
    PATH/<model>/writing/                  files that are being written; opening the store removes what is left there

A file gets its final name by a rename, after its bytes have reached the disk. So a process may be killed at any
instant: what is found afterwards under such a name is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import filelock
import numpy as np

from sparsex_jax.errors import DiskStoreError
from sparsex_jax.tiers import block_file
from sparsex_jax.tiers.block_file import BlockFile
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.demand import Demand, New
from sparsex_jax.tiers.faults import told
from sparsex_jax.tiers.fingerprint import Fingerprint, decode, digest, encode
from sparsex_jax.tiers.order import UseOrder

_MODEL = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(r"[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{32}\.safetensors")  # whatever else is in PATH is left alone


@dataclasses.dataclass
class DiskCounts:
    """What happened since the store was opened. Bytes are those of whole files."""

    written: int = 0
    written_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    evicted: int = 0
    corrupt: int = 0


class _Read(NamedTuple):
    """A block that was read, its pieces, and the bytes of its file, of which the pieces are views."""

    block: Block
    pieces: list[np.ndarray]
    data: np.ndarray


class DiskStore:
    """Blocks of one model on disk, bounded in bytes. Any thread may call it; files are read and written side by side.

    The limit is that of the whole directory, blocks of other models included. The least recently used file goes first,
    whichever model it is of; how the blocks of a sequence are ordered among themselves, `UseOrder` says.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int, fingerprint: Fingerprint) -> None:
        """Opens or makes the directory, and drops files whose header or length is not that of a whole block.

        Args:
          limit_bytes: of all files together, those that are being written included.
          fingerprint: what the KV depends on besides tokens. Blocks that were stored for another one are not seen.

        Raises:
          DiskStoreError: the directory cannot be made or used, or another process has it open.
        """
        self.counts = DiskCounts()
        self._root, self.limit_bytes, self._model = Path(path), limit_bytes, digest(fingerprint)
        self._home = self._root / self._model
        self._mutex = threading.RLock()  # guards all below; files are read and written without it
        self._order: UseOrder[Path] = UseOrder()
        self._demand = Demand(self._order, limit_bytes)
        self._blocks: dict[Path, Block] = {}  # of this model
        self._writing: dict[Path, Path] = {}  # final names and those they are written under; `delete` takes them out
        self._evicted: list[tuple[bytes, int]] = []
        self._writing_bytes = self._last_use = 0
        self._numbers = itertools.count()
        with told("open", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._root)
            try:
                self._open(encode(fingerprint))
            except BaseException:
                self.close()
                raise

    def put(self, block: Block, pieces: Sequence[np.ndarray], *, remembered: bool = False) -> None:
        """Stores a block, or does nothing if it is there or on its way. Returns when its bytes have reached the disk.

        Args:
          remembered: it is of a remembered text, which stays longer.

        Raises:
          DiskStoreError: the disk is full or fails, or the block alone is over the limit.
        """
        path = self._path(block.key)
        if self._used(path):
            return
        file = block_file.file_of(block, pieces, self._model)
        with told("write", path), self._reserved(path, file.nbytes) as temporary:
            if temporary is not None:
                _write_synced(temporary, file.parts)
                self._publish(temporary, path, block, file.nbytes, remembered)

    def get(self, key: bytes) -> tuple[Block, list[np.ndarray]] | None:
        """The block and its pieces, byte for byte as stored; None if it is not there.

        A file that cannot be read or is not whole any more is deleted, and the block is not there.
        """
        read = self._get(key)
        return None if read is None else (read.block, read.pieces)

    def file(self, key: bytes) -> BlockFile | None:
        """As `get`: the block's file as it is, whole."""
        read = self._get(key)
        return None if read is None else block_file.in_parts(read.data)

    def _get(self, key: bytes) -> _Read | None:
        path = self._path(key)
        if key not in self:
            return None
        try:
            found = self._read(path, key)
        except (block_file.NotWholeError, OSError):
            return self._read_alone(path, key)
        return found if self._was_read(path, found.data.nbytes) else None

    def touch(self, keys: Iterable[bytes], *, remembered: bool = False) -> None:
        """Count these as used now: their KV was of use, but was found in a tier above.

        Args:
          remembered: they are of a remembered text from now on.
        """
        for path in map(self._path, keys):
            with self._mutex:
                if self._used(path) and remembered:
                    self._order.remember(path)

    def delete(self, keys: Iterable[bytes]) -> None:
        """Remove these, those that are being written included. They stay removed if the machine fails afterwards.

        Raises:
          DiskStoreError: a file cannot be removed.
        """
        with self._mutex, told("delete from", self._home):
            removed = [path for path in map(self._path, keys) if self._remove(path)]
            for directory in {path.parent for path in removed if path.parent.is_dir()}:
                _sync(directory)

    def blocks(self) -> Iterator[Block]:
        """All blocks of this model, the least recently used first."""
        with self._mutex:
            return iter([self._blocks[path] for path in self._order if path in self._blocks])

    def visit(self, new: Sequence[New], nbytes: int, promised: int) -> int:
        """How many new blocks of a sequence should be put here. As `Demand.visit`; whatever is put here is taken."""
        with self._mutex:
            return self._demand.visit(new, nbytes, promised + self._writing_bytes)

    def left(self, mark: bytes, used: int) -> None:
        """What was evicted is known for a while by this mark. As `Demand.left`."""
        with self._mutex:
            self._demand.left(mark, used)

    def take_evicted(self) -> list[tuple[bytes, int]]:
        """The keys of the blocks that were evicted since this was asked last, and when they were used last."""
        with self._mutex:
            taken, self._evicted = self._evicted, []
            return taken

    @property
    def nbytes(self) -> int:
        """Of all files that the limit counts."""
        return self._order.nbytes + self._writing_bytes

    def __contains__(self, key: bytes) -> bool:
        with self._mutex:
            return self._path(key) in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def close(self) -> None:
        """Lets others open the directory. The store is of no use afterwards."""
        self._lock.release()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _path(self, key: bytes) -> Path:
        return self._home / key.hex()[:2] / f"{key.hex()}.safetensors"

    def _open(self, fingerprint: str) -> None:
        """Nobody else writes, because of the lock, so what is in `writing` was left by a process that has ended."""
        for directory in self._root.glob("*/writing"):
            shutil.rmtree(directory)
        temporary = self._home / "writing" / "fingerprint.json"
        _write_synced(temporary, [fingerprint.encode()])
        temporary.replace(self._home / temporary.name)
        for used, path in sorted((path.stat().st_mtime_ns, path) for path in self._root.glob("*/*/*.safetensors")):
            if _OURS.fullmatch(path.relative_to(self._root).as_posix()):
                self._last_use = used
                self._find(path)
        self._make_room(0)

    def _find(self, path: Path) -> None:
        """List a file that was there before."""
        try:
            own = path.is_relative_to(self._home)
            self._add(path, path.stat().st_size, block_file.read_header(path, self._model) if own else None)
        except block_file.NotWholeError:
            self.counts.corrupt += 1
            path.unlink()

    def _add(self, path: Path, nbytes: int, block: Block | None, remembered: bool = False) -> None:
        if block is not None:
            self._blocks[path] = block
        before = self._path(block.before) if block is not None and block.before else None
        self._order.add(path, nbytes, before, remembered=remembered)

    def _used(self, path: Path) -> bool:
        """Count it as used. Whether it is there."""
        with self._mutex:
            if path not in self._blocks:
                return False
            self._demand.use(path)
            self._stamp(path)
            return True

    def _was_read(self, path: Path, nbytes: int) -> bool:
        """Whether it is still there, and was not deleted meanwhile."""
        with self._mutex:
            self.counts.read += 1
            self.counts.read_bytes += nbytes
            return self._used(path)

    def _stamp(self, path: Path) -> None:
        """Later than all before, also when the clock was set back."""
        self._last_use = max(self._last_use + 1, time.time_ns())
        with contextlib.suppress(OSError):  # only the order after a restart suffers
            os.utime(path, ns=(self._last_use, self._last_use))

    @contextlib.contextmanager
    def _reserved(self, path: Path, nbytes: int) -> Iterator[Path | None]:
        """Room for a file, and the name to write it under; None if it is there or another thread writes it."""
        temporary = self._reserve(path, nbytes)
        try:
            yield temporary
        finally:
            if temporary is not None:
                self._release(path, temporary, nbytes)

    def _reserve(self, path: Path, nbytes: int) -> Path | None:
        with self._mutex:
            if path in self._blocks or path in self._writing:
                return None
            self._make_room(nbytes)
            self._writing[path] = self._home / "writing" / str(next(self._numbers))
            self._writing_bytes += nbytes
            return self._writing[path]

    def _release(self, path: Path, temporary: Path, nbytes: int) -> None:
        with self._mutex:
            self._writing_bytes -= nbytes
            if self._writing.get(path) == temporary:
                del self._writing[path]
        temporary.unlink(missing_ok=True)  # it is there only if writing it failed or it was deleted meanwhile

    def _publish(self, temporary: Path, path: Path, block: Block, nbytes: int, remembered: bool) -> None:
        with self._mutex:
            if self._writing.get(path) != temporary:
                return  # deleted meanwhile
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
            self._add(path, nbytes, block, remembered)
            self._stamp(path)
            self.counts.written += 1
            self.counts.written_bytes += nbytes

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self.limit_bytes:
            raise DiskStoreError(
                f"a block of {nbytes} bytes is larger than the disk store's limit of {self.limit_bytes}"
            )
        while self._order and self.nbytes + nbytes > self.limit_bytes:
            path = next(iter(self._order))
            if path in self._blocks:
                self._evicted.append((self._blocks[path].key, self._order.last_use(path)))
            self._remove(path)
            self.counts.evicted += 1

    def _remove(self, path: Path) -> bool:
        """Whether it was there."""
        self._writing.pop(path, None)
        if path not in self._order:
            return False
        path.unlink(missing_ok=True)
        self._order.drop(path)
        self._blocks.pop(path, None)
        return True

    def _read(self, path: Path, key: bytes) -> _Read:
        """Raises NotWholeError, OSError."""
        data = np.fromfile(path, np.uint8)
        return _Read(*block_file.decode(data, key, self._model), data)

    def _read_alone(self, path: Path, key: bytes) -> _Read | None:
        """What could not be read while others might write. It may have been removed meanwhile, or stored again; if it
        cannot be read now either, it is broken, and goes."""
        with self._mutex:
            if path not in self._blocks:
                return None
            try:
                found = self._read(path, key)
            except (block_file.NotWholeError, OSError):
                with contextlib.suppress(OSError):
                    self.counts.corrupt += self._remove(path)
                return None
            return found if self._was_read(path, found.data.nbytes) else None


def fingerprints(path: str | os.PathLike[str]) -> list[Fingerprint]:
    """Those of all models that a store was opened for, so that one can be opened without its model. Takes no lock.

    Raises:
      DiskStoreError: a fingerprint cannot be read.
    """
    files = sorted(Path(path).glob("*/fingerprint.json"))
    with told("read", Path(path)):
        return [decode(file.read_text(encoding="utf-8")) for file in files if _MODEL.fullmatch(file.parent.name)]


def _locked(root: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(root / "sparsex.lock", thread_local=False)  # any thread may close the store
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise DiskStoreError(f"the disk store {root} is open in another process") from None
    return lock


def _write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
