"""GGUF files as bytes: their metadata and tensors, of one file or of a model that comes in several parts.

This module reads the header itself in a tenth of a second. The reader of the `gguf` package takes seconds, because it
makes an array of every token and merge. That package dequantises the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import require_content
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)

# Types of metadata values in the header, and how `struct` unpacks the scalar ones.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZE = struct.Struct("<Q")  # in front of every string
_MAX_AXES = 4  # ggml's limit
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # ggml's names
_ELEMENTS_AT_ONCE = 1 << 17


class GGUFModel:
    """A model's metadata and tensors, from all files that it comes in.

    Attributes:
      path: the first of its files.
      metadata: that of the first file, which has all of it.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
          path: its only file, or any of its parts, `X-00001-of-00003.gguf` and so on.

        Raises:
          UnknownModelError: a part is missing; the message names it.
          UnsupportedModelError: a file is damaged, or the parts do not belong together.
        """
        files = _files(path)
        self.path, self.metadata = files[0].path, files[0].metadata
        self._files = {name: file for file in files for name in file.tensors}
        stored = sum(len(file.tensors) for file in files)
        if stored != len(self._files):
            raise UnsupportedModelError(f"{self.path}: two parts have a tensor of the same name")
        if self.metadata.get("split.tensors.count", stored) != stored:
            raise UnsupportedModelError(
                f"{self.path}: split.tensors.count={self.metadata['split.tensors.count']!r}, "
                f"but the {len(files)} parts have {stored} tensors"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: file.tensors[name] for name, file in self._files.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor or some of its rows: with its own dtype where it is stored as floats, else dequantised to float32.

        Raises:
          UnsupportedModelError: its encoding cannot be read, or the file is truncated.
        """
        return self._files[name].read(name, rows)

    def encoding(self, name: str) -> str:
        """ggml's name for the encoding of a tensor, such as `Q4_K`; a number where it has none."""
        import gguf

        number = self._files[name].tensors[name].encoding
        names = {int(each): each.name for each in gguf.GGMLQuantizationType}
        return names.get(number, str(number))

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor that is quantised: uint8 `[..., rows, blocks, bytes of a block]`. Errors as `read`."""
        return self._files[name].blocks(name)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file.

    Attributes:
      shape: rows first.
      encoding: ggml's number for the type of its elements.
      start: bytes from the beginning of the data.
    """

    shape: tuple[int, ...]
    encoding: int
    start: int


def models_in(directory: Path) -> list[Path]:
    """The GGUF models in a directory: single files, and of those in parts one file each."""
    names = sorted(file.name for file in directory.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    return [directory / parts[0] for parts in group_models(names).values()]


def group_models(files: Iterable[str]) -> dict[str, list[str]]:
    """GGUF files by the model that they belong to, which is called as its file, or as its parts without their number.

    >>> group_models(["q8/a-00001-of-00002.gguf", "q8/a-00002-of-00002.gguf"])
    {'q8/a-of-00002.gguf': ['q8/a-00001-of-00002.gguf', 'q8/a-00002-of-00002.gguf']}
    """
    models: dict[str, list[str]] = {}
    for file in files:
        part = _PART.fullmatch(file)
        models.setdefault(f"{part['stem']}-of-{part['count']}.gguf" if part else file, []).append(file)
    return models


def _files(path: Path) -> list[_File]:
    """The file, or all parts of the model that it is a part of, the first part first."""
    opened, named = _File(path), _PART.fullmatch(path.name)
    expected = int(named["count"]) if named else 1
    fields = Fields(str(path), opened.metadata)
    count = fields.count("split.count") if fields.get("split.count") else expected
    if count != expected:
        fields.refuse("split.count", "is not what the file's name says; parts are named NAME-00001-of-00003.gguf")
    if named is None or count == 1:
        return [opened]
    parts = [path.with_name(_part_name(path.name, named, number)) for number in range(1, count + 1)]
    _require_parts(parts)
    files = [opened if part == path else _File(part) for part in parts]
    _require_numbered(files)
    return files


def _part_name(name: str, named: re.Match[str], number: int) -> str:
    start, end = named.span("number")
    return f"{name[:start]}{number:05}{name[end:]}"


def _require_parts(parts: list[Path]) -> None:
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UnknownModelError(
            f"{parts[0].parent} has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}, "
            f"and the model needs all its {len(parts)} parts"
        )


def _require_numbered(files: list[_File]) -> None:
    for number, file in enumerate(files):
        stated = file.metadata.get("split.no", number), file.metadata.get("split.count", len(files))
        if stated != (number, len(files)):
            raise UnsupportedModelError(
                f"{file.path}: split.no={stated[0]!r} and split.count={stated[1]!r} are not what its name says"
            )


class _File:
    """One mapped file: its metadata, and its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_content(path)
        try:
            with path.open("rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header(_Cursor(self._bytes))
        except (ValueError, OverflowError, MemoryError, struct.error) as error:
            raise UnsupportedModelError(f"{path} is not a readable GGUF file: {error}") from error

    def _read_header(self, cursor: _Cursor) -> None:
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, and not with b'GGUF', version 2 or 3")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata = _unique((cursor.string(), cursor.value(cursor.scalar("I"))) for _ in range(num_fields))
        self.tensors = _unique((cursor.string(), cursor.tensor()) for _ in range(num_tensors))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r} must be an integer >= 1")
        self._data_start = -(-cursor.offset // alignment) * alignment
        self._require_whole()

    def _require_whole(self) -> None:
        """Raises ValueError if a tensor goes beyond the end of the file. Unknown encodings are refused when read."""
        for name, tensor in self.tensors.items():
            size = _num_bytes(tensor)
            end = self._data_start + tensor.start + (size or 0)
            if size is not None and end > len(self._bytes):
                raise ValueError(
                    f"tensor {name!r} ends at byte {end}, and the file at {len(self._bytes)}: it is not whole"
                )

    def blocks(self, name: str) -> np.ndarray:
        import gguf

        tensor = self.tensors[name]
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.encoding)]
        count = math.prod(tensor.shape) // block * size
        stored = np.frombuffer(self._bytes, np.uint8, count, self._data_start + tensor.start)
        return stored.reshape(*tensor.shape[:-1], -1, size)

    def read(self, name: str, rows: slice) -> np.ndarray:
        import gguf

        tensor = self.tensors[name]
        try:
            encoding = gguf.GGMLQuantizationType(tensor.encoding)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, encoding)
            stored = np.frombuffer(self._bytes, np.uint8, math.prod(shape), self._data_start + tensor.start)
            if len(shape) == 1:  # bytes; there are no rows of them
                return _dequantised(stored, encoding)[rows]
            wanted = stored.reshape(shape)[rows]
            return _dequantised(wanted.ravel(), encoding).reshape(-1, *tensor.shape[1:])
        except (ValueError, OverflowError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error


def _num_bytes(tensor: Tensor) -> int | None:
    """How many a tensor has in its file; None if its encoding or its shape cannot be."""
    from gguf import GGML_QUANT_SIZES

    sizes = {int(encoding): size for encoding, size in GGML_QUANT_SIZES.items()}
    block, block_bytes = sizes.get(tensor.encoding, (1, 0))
    elements = math.prod(tensor.shape)
    return None if not block_bytes or elements % block else elements // block * block_bytes


def _dequantised(stored: np.ndarray, encoding: Any) -> np.ndarray:
    """The elements of a tensor in a row: as stored where they are floats, else float32.

    The `gguf` package makes temporary arrays of several times the size of what it is given. It gets few blocks at a
    time, so that these stay in the processor's caches.
    """
    import gguf

    if encoding.name in _FLOATS:
        return stored.view(_FLOATS[encoding.name])
    size, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
    blocks, step = stored.reshape(-1, block_bytes), max(1, _ELEMENTS_AT_ONCE // size)
    out = np.empty((len(blocks), size), np.float32)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        out[start : start + step] = gguf.dequantize(part.reshape(1, -1), encoding).reshape(-1, size)
    return out.ravel()


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary, in which no name may come twice: nothing says which of two values counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name!r} twice")
        found[name] = value
    return found


class _Cursor:
    """Reads the values of the header one after another. Each has a type, which the file gives as a number."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.offset = 0

    def scalar(self, code: str) -> Any:
        (value,) = self._unpack(code)
        return value

    def string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """So many, in one loop: vocabularies have some hundred thousand."""
        buffer, at, found = self.buffer, self.offset, []
        for _ in range(count):
            (size,) = _SIZE.unpack_from(buffer, at)
            at += _SIZE.size + size
            if at > len(buffer):
                raise ValueError(f"a string of {size} bytes goes beyond its end")
            found.append(buffer[at - size : at].decode())
        self.offset = at
        return found

    def value(self, type_: int) -> Any:
        if type_ == _STRING:
            return self.string()
        return self._array() if type_ == _ARRAY else self.scalar(_code(type_))

    def tensor(self) -> Tensor:
        axes = self.scalar("I")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"a tensor has {axes} axes; it may have 1 to {_MAX_AXES}")
        dims = self._unpack(f"{axes}Q")  # the axis with stride 1 comes first; in NumPy it comes last
        return Tensor(shape=dims[::-1], encoding=self.scalar("I"), start=self.scalar("Q"))

    def _array(self) -> list[Any]:
        type_, size = self.scalar("I"), self.scalar("Q")
        if type_ == _STRING:
            return self._strings(size)
        return list(self._unpack(f"{size}{_code(type_)}"))

    def _unpack(self, code: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{code}", self.buffer, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return values


def _code(type_: int) -> str:
    if type_ not in _SCALARS:
        raise ValueError(f"a value has the unknown type {type_}")
    return _SCALARS[type_]
