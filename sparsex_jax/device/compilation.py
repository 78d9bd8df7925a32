"""Counts the programs that JAX compiles, and has JAX keep them on disk for the next process."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

_MAX_BYTES = 4 << 30  # JAX evicts the programs used longest ago; it locks the files only if there is such a limit
_MIN_SECONDS = 0.3  # programs that compile faster are not worth a file

# Compiler options of every program that the store is donated to. XLA counts a store that kernels write into twice, once
# as their operand and once as their result. Where the store fills most of a GPU, it would save memory that is not
# missing: make small arrays anew in each layer, and run sums over a mesh alone.
WITH_STORE = {"xla_gpu_memory_limit_slop_factor": 10_000}  # percent of what is free

# Compiler options of a program for several GPUs without loops whose ends the host has to tell: sums over the GPUs are
# in its CUDA graphs too. Else the GPUs wait for their hosts twice a layer.
SUMS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,COLLECTIVES",
    "xla_gpu_experimental_use_collective_kernels": "",  # those cannot be in graphs
}


class _Counter:
    """A listener that JAX calls for every program it compiles in this process, or loads from its cache on disk. Who
    loads others counts these."""

    number = 0

    def __call__(self, event: str, duration_secs: float, **_: Any) -> None:
        self.number += event == "/jax/core/compile/backend_compile_duration"


_counter = _Counter()
monitoring.register_event_duration_secs_listener(_counter)


def num_compilations() -> int:
    """The programs that this process compiled, or loaded from disk, since it imported this module."""
    return _counter.number


def count_loaded() -> None:
    """Count a program that was loaded without JAX's cache."""
    _counter.number += 1


def num_processors() -> int:
    """The processors that this process may use, to compile among other things."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_on_disk() -> None:
    """Have JAX keep compiled programs in the user's cache directory, so that the next process can load them.

    JAX's own settings have precedence: JAX_COMPILATION_CACHE_DIR names another directory, and with
    JAX_ENABLE_COMPILATION_CACHE=false JAX keeps and loads nothing.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def cache_directory() -> Path:
    """Where this package keeps what it need not make again on machines of this kind; it may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparsex-jax" / _processor()


def _processor() -> str:
    """A name for this kind of processor.

    Several machines may share a home directory, and JAX would load programs that another machine compiled, with
    instructions that this one may not have.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.node()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
