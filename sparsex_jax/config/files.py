"""Reads JSON files that come with a model, and tells what is wrong with a file that was not downloaded whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsex_jax.errors import UnknownModelError, UnsupportedModelError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def require_content(path: Path) -> None:
    """Refuse a file without content: empty, or a pointer in its place, which Git leaves where LFS is not installed.

    Raises:
      UnknownModelError: there is no such file.
      UnsupportedModelError: it has no content.
    """
    if not path.is_file():
        raise UnknownModelError(f"{path.parent} has no {path.name}")
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise UnsupportedModelError(f"{path} is empty: its download was not finished")
    if start == _LFS_POINTER:
        raise UnsupportedModelError(
            f"{path} is a pointer of Git LFS and not the file itself; `git lfs pull` fetches it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a model must have.

    Raises:
      UnknownModelError: there is no such file.
      UnsupportedModelError: the file holds no JSON object, perhaps because its end is missing.
    """
    require_content(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} holds no JSON object")
    return value
