"""A block as bytes: a safetensors file, whose header says which block and model it is of and what its pieces sum to.

Its layout: 8 bytes with the header's length, the header as JSON, then the pieces, one behind the other. Tensor "0" is
the first piece, "1" the second and so on. The header's metadata has one entry, `sparsex`, which is JSON in turn.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

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
_LENGTH_BYTES = 8


class NotWholeError(ValueError):
    """These bytes are not a whole block of this model: torn, changed, or of another model or version."""


class _Piece(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the first piece on
    end: int
    sha256: str


def encode(block: Block, pieces: Sequence[np.ndarray], model: str) -> bytes:
    """The file's bytes.

    Args:
      pieces: of any shape and any of `DTYPES`.
      model: digest of the fingerprint of the model that made them.
    """
    said = {
        "version": VERSION,
        "model": model,
        "block": block.to_json(),
        "sha256": [_sum(piece) for piece in pieces],
    }
    tensors = {str(i): np.ascontiguousarray(piece) for i, piece in enumerate(pieces)}
    return safetensors.numpy.save(tensors, {"sparsex": json.dumps(said)})


def decode(data: np.ndarray, key: bytes, model: str) -> tuple[Block, list[np.ndarray]]:
    """The block of that key and its pieces, which are views of `data`, bytes as uint8. Raises NotWholeError."""
    start = _header_end(data[:_LENGTH_BYTES].tobytes(), len(data))
    block, places = _parse(data[_LENGTH_BYTES:start].tobytes(), len(data) - start, model)
    pieces = [data[start + p.begin : start + p.end].view(p.dtype).reshape(p.shape) for p in places]
    if any(_sum(piece) != place.sha256 for piece, place in zip(pieces, places, strict=True)):
        raise NotWholeError("a checksum differs")
    return _of_key(block, key), pieces


def header_of(data: bytes) -> bytes:
    """The beginning of a file's bytes that says all of the rest: the block, and the checksums of its pieces."""
    return data[: _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")]


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
    digest = hashlib.sha256(f"{piece.dtype.name} {piece.shape}".encode())
    digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    return digest.hexdigest()
