"""Opens `.safetensors` files, and reads tensors in dtypes that NumPy does not have, and `safetensors` refuses:
float8_e4m3fn."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparsex_jax.config.files import require_content
from sparsex_jax.errors import UnsupportedModelError

_DTYPES: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


def open_safetensors(path: Path) -> Any:
    """A file whose tensors are read when they are asked for.

    Raises:
      UnknownModelError: there is no such file.
      UnsupportedModelError: it is empty or damaged.
    """
    from safetensors import SafetensorError, safe_open

    require_content(path)
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error


def read_tensor(path: Path, name: str) -> np.ndarray:
    """A view of a tensor in a file that `safetensors` has opened before, which checks its header and its size."""
    begin, header = _header(path, path.stat().st_mtime_ns)
    about = header[name]
    first, end = about["data_offsets"]
    stored = np.memmap(path, np.uint8, "r", offset=begin + first, shape=end - first)
    return np.asarray(stored).view(_DTYPES[about["dtype"]]).reshape(about["shape"])


@functools.lru_cache(maxsize=256)
def _header(path: Path, changed: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the file says of each, as it is since it was changed."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))
