"""A block as bytes: a safetensors file, whose header says which block and model it is of and what its pieces sum to.

Its layout: 8 bytes with the header's length, the header as JSON, then the pieces, one behind the other. Tensor "0" is
the first piece, "1" the second and so on. The header's metadata has one entry, `sparsex`, which is JSON in turn.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsex_jax.tiers.blocks import Block

VERSION = 1
DTYPES = {  # by the names that safetensors gives them
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the first piece; safetensors fills the header up with blanks
_ARRAY_ALIGNMENT = 64  # of JAX's arrays on a CPU, in bytes
_AT_ONCE = 1 << 18  # bytes that are summed up as soon as they are there, while a processor's cache has them


class NotWholeError(ValueError):
    """These bytes are not a whole block of this model: torn, changed, or of another model or version."""


class _Piece(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the first piece on
    end: int
    sha256: str


class BlockFile(NamedTuple):
    """The bytes of a file, in parts that lie where they lay before: nothing is copied to put them together.

    Attributes:
      header: says all of the rest: the block, and the checksums of its pieces.
      pieces: their bytes, in the order of the file.
    """

    header: bytes
    pieces: list[memoryview]

    @property
    def parts(self) -> list[bytes | memoryview]:
        """All of it, in order."""
        return [self.header, *self.pieces]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


def sums_of(pieces: Iterable[np.ndarray]) -> list[str]:
    """The checksum of each piece, as a file's header has them: of its dtype, shape and bytes."""
    return [_sum(piece) for piece in pieces]


def file_of(block: Block, pieces: Sequence[np.ndarray], model: str, sums: Sequence[str] | None = None) -> BlockFile:
    """The file of a block. It has the memory of the pieces that are contiguous.

    Args:
      pieces: of any shape and any of `DTYPES`.
      model: digest of the fingerprint of the model that made them.
      sums: `sums_of(pieces)`, if that is known already.
    """
    sums = sums_of(pieces) if sums is None else sums
    said = {"version": VERSION, "model": model, "block": block.to_json(), "sha256": [*sums]}
    # As safetensors orders them: so each lies as its dtype wants it.
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].dtype.itemsize, str(i)))
    ends = [*itertools.accumulate((pieces[i].nbytes for i in order), initial=0)]
    tensors: dict[str, Any] = {"__metadata__": {"sparsex": json.dumps(said)}}
    for i, offsets in zip(order, itertools.pairwise(ends), strict=True):
        piece = pieces[i]
        tensors[str(i)] = {"dtype": _NAMES[piece.dtype], "shape": [*piece.shape], "data_offsets": [*offsets]}
    return BlockFile(_header(tensors), [_bytes_of(pieces[i]).data for i in order])


def _header(tensors: dict[str, Any]) -> bytes:
    header = json.dumps(tensors, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def encode(block: Block, pieces: Sequence[np.ndarray], model: str) -> bytes:
    """The bytes of `file_of`, in one."""
    return b"".join(file_of(block, pieces, model).parts)


def in_parts(data: np.ndarray) -> BlockFile:
    """A file that is whole, of its bytes as uint8, whose memory it has."""
    start = _header_end(data[:_LENGTH_BYTES].tobytes(), len(data))
    return BlockFile(data[:start].tobytes(), [data[start:].data])


def decode(data: np.ndarray, key: bytes, model: str) -> tuple[Block, list[np.ndarray]]:
    """The block of that key and its pieces, which are views of `data`, bytes as uint8. Raises NotWholeError."""
    start = _header_end(data[:_LENGTH_BYTES].tobytes(), len(data))
    block, places = _parse(data[_LENGTH_BYTES:start].tobytes(), len(data) - start, model)
    pieces = [data[start + p.begin : start + p.end].view(p.dtype).reshape(p.shape) for p in places]
    if any(_sum(piece) != place.sha256 for piece, place in zip(pieces, places, strict=True)):
        raise NotWholeError("a checksum differs")
    return _of_key(block, key), pieces


def receive(
    read_into: Callable[[memoryview], None],
    num_bytes: int,
    key: bytes,
    model: str,
    *,
    most_header: int,
    check: Callable[[bytes], None],
) -> list[np.ndarray]:
    """As `decode`, of a file that comes bit by bit: it is summed up while more is on its way.

    Args:
      read_into: fills a part of memory with what comes next.
      num_bytes: of the file.
      most_header: bytes that the header may have.
      check: is given the header before any of it is believed, and raises where it should not be.

    Returns:
      The pieces, which share memory that is new.

    Raises:
      NotWholeError: as `decode`, and where pieces do not lie one behind the other.
    """
    length = _read(read_into, _LENGTH_BYTES)
    start = _header_end(length, min(num_bytes, most_header))
    header = _read(read_into, start - _LENGTH_BYTES)
    check(length + header)
    block, places = _parse(header, num_bytes - start, model)
    _of_key(block, key)
    data, at = _new(num_bytes - start), 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin != at:
            raise NotWholeError("the pieces do not lie one behind the other")
        _receive_piece(read_into, data[at : place.end].data, place)
        at = place.end
    return [data[p.begin : p.end].view(p.dtype).reshape(p.shape) for p in places]


def _new(num_bytes: int) -> np.ndarray:
    """Memory that begins where JAX can have arrays without a copy."""
    data = np.empty(num_bytes + _ARRAY_ALIGNMENT, np.uint8)
    at = -data.ctypes.data % _ARRAY_ALIGNMENT
    return data[at : at + num_bytes]


def _read(read_into: Callable[[memoryview], None], num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    read_into(memoryview(data))
    return bytes(data)


def _receive_piece(read_into: Callable[[memoryview], None], into: memoryview, place: _Piece) -> None:
    digest = _digest_of(place.dtype, place.shape)
    for at in range(0, len(into), _AT_ONCE):
        part = into[at : at + _AT_ONCE]
        read_into(part)
        digest.update(part)
    if digest.hexdigest() != place.sha256:
        raise NotWholeError("a checksum differs")


def read_header(path: Path, model: str) -> Block:
    """The block of a file that is named after its key and has the length that its header says.

    Raises NotWholeError and OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        end = _header_end(file.read(_LENGTH_BYTES), size)
        block, _ = _parse(file.read(end - _LENGTH_BYTES), size - end, model)
    return _of_key(block, bytes.fromhex(path.stem))


def _of_key(block: Block, key: bytes) -> Block:
    if block.key != key:
        raise NotWholeError("the block is not the one that the file is named after")
    return block


def _header_end(length: bytes, size: int) -> int:
    end = _LENGTH_BYTES + int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or end > size:
        raise NotWholeError("the header is cut off")
    return end


def _parse(header: bytes, num_bytes: int, model: str) -> tuple[Block, list[_Piece]]:
    """Block and places of the pieces, of which there must be `num_bytes` behind the header."""
    try:
        tensors = json.loads(header)
        said = json.loads(tensors.pop("__metadata__")["sparsex"])
        block, places = Block.from_json(said["block"]), _places(tensors, said)
        made_for = said["version"], said["model"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotWholeError(f"the header cannot be read: {error!r}") from error
    if made_for != (VERSION, model):
        raise NotWholeError("of another model or version")
    if max((place.end for place in places), default=0) != num_bytes:
        raise NotWholeError("the pieces are cut off")
    return block, places


def _places(tensors: dict[str, Any], said: dict[str, Any]) -> list[_Piece]:
    """In the order of the pieces, which is not always that of their bytes."""
    ordered = [tensors[str(i)] for i in range(len(tensors))]
    return [
        _place(DTYPES[tensor["dtype"]], tensor["shape"], tensor["data_offsets"], sha256)
        for tensor, sha256 in zip(ordered, said["sha256"], strict=True)
    ]


def _place(dtype: np.dtype, shape: list[int], offsets: list[int], sha256: str) -> _Piece:
    begin, end = offsets
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a piece's shape is not that of its bytes")
    return _Piece(dtype, tuple(shape), begin, end, sha256)


def _sum(piece: np.ndarray) -> str:
    digest = _digest_of(piece.dtype, piece.shape)
    digest.update(_bytes_of(piece))
    return digest.hexdigest()


def _digest_of(dtype: np.dtype, shape: tuple[int, ...]) -> hashlib._Hash:
    """Of what is not among a piece's bytes."""
    return hashlib.sha256(f"{dtype.name} {shape}".encode())


def _bytes_of(piece: np.ndarray) -> np.ndarray:
    """As uint8, without a copy if the piece is contiguous."""
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
