"""Faults of files, told as errors of the disk store."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sparsex_jax.errors import DiskStoreError


@contextlib.contextmanager
def told(what: str, path: Path) -> Iterator[None]:
    """Within, what the system or an archive complains of is a DiskStoreError that says what was tried."""
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise DiskStoreError(f"cannot {what} {path}: {getattr(error, 'strerror', None) or error}") from error
