"""Archives: blocks of one model in one file, to be moved to another machine.

It is a tar file of `fingerprint.json` and, for each block, `<key>.safetensors`, as in the disk tier's directory.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sparsex_jax.errors import DiskStoreError
from sparsex_jax.tiers import block_file
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.faults import told
from sparsex_jax.tiers.fingerprint import Fingerprint, decode, differences, digest, encode

_FINGERPRINT = "fingerprint.json"


def export(
    path: str | os.PathLike[str], fingerprint: Fingerprint, blocks: Iterable[tuple[Block, Sequence[np.ndarray]]]
) -> int:
    """Write an archive, which appears under its name when it is whole. Returns how many blocks it has.

    Args:
      blocks: with their pieces, taken one at a time. The importing side keeps the last ones if it lacks room for all.

    Raises:
      DiskStoreError: the file cannot be written.
    """
    path, count = Path(path), 0
    temporary = path.with_name(path.name + ".partial")
    with told("write", path), _removed_on_error(temporary), tarfile.open(temporary, "w") as tar:
        _add(tar, _FINGERPRINT, encode(fingerprint).encode())
        for block, pieces in blocks:
            _add(tar, f"{block.key.hex()}.safetensors", block_file.encode(block, pieces, digest(fingerprint)))
            count += 1
    with told("write", path):
        _sync_and_rename(temporary, path)
    return count


def import_(path: str | os.PathLike[str], fingerprint: Fingerprint) -> Iterator[tuple[Block, list[np.ndarray]]]:
    """The blocks of an archive and their pieces, one at a time, each checked.

    Raises:
      DiskStoreError: the file cannot be read, is of another model, or a block is not whole. Blocks before it are.
    """
    with told("read", Path(path)), tarfile.open(path, "r:") as tar:
        if differs := differences(fingerprint, _fingerprint(tar)):
            raise DiskStoreError(f"{path} is of another model: {differs}")
        for member in iter(tar.next, None):
            yield _block(tar, member, digest(fingerprint))


def fingerprint_of(path: str | os.PathLike[str]) -> Fingerprint:
    """That of the model whose blocks an archive has. Raises DiskStoreError: it cannot be read, or is no archive."""
    with told("read", Path(path)), tarfile.open(path, "r:") as tar:
        return _fingerprint(tar)


def _fingerprint(tar: tarfile.TarFile) -> Fingerprint:
    first = tar.next()
    if first is None or first.name != _FINGERPRINT:
        raise DiskStoreError(f"{tar.name!s} is not an archive of blocks")
    return decode(_content(tar, first))


def _block(tar: tarfile.TarFile, member: tarfile.TarInfo, model: str) -> tuple[Block, list[np.ndarray]]:
    try:
        key = bytes.fromhex(member.name.removesuffix(".safetensors"))
        return block_file.decode(np.frombuffer(bytearray(_content(tar, member)), np.uint8), key, model)
    except ValueError as error:
        raise DiskStoreError(f"{member.name} in {tar.name!s} is not whole: {error}") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _sync_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
