"""What JAX compiles: how often, and where it is kept for the next process."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

_MOST_BYTES = 4 << 30  # what was used longest ago goes; with a limit, JAX locks the files too
_LEAST_SECONDS = 0.3  # what compiles faster is not worth a file


class _Counter:
    """Hears of every program that JAX compiles in this process, or loads from its cache on disk."""

    number = 0

    def __call__(self, event: str, duration_secs: float, **_: Any) -> None:
        self.number += event == "/jax/core/compile/backend_compile_duration"


_counter = _Counter()
monitoring.register_event_duration_secs_listener(_counter)


def num_compilations() -> int:
    """How many programs this process compiled, or loaded from JAX's cache on disk, since this module was imported."""
    return _counter.number


def keep_on_disk() -> None:
    """Have JAX keep what it compiles in the user's cache directory, for the next process to load.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another directory, and JAX_ENABLE_COMPILATION_CACHE=false
    keeps and loads nothing.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "sparsex-jax" / _processor()))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _processor() -> str:
    """A name for this kind of processor. A home may be shared by several, and JAX would load what another one compiled,
    whose instructions this one may not have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.node()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
