"""The speeds of an engine's devices: measured once, and kept in the user's cache directory for the next process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sparsex_jax.device.compilation import cache_directory, num_processors
from sparsex_jax.device.measuring import measure_speeds, wanted_tokens
from sparsex_jax.device.runner import Runner
from sparsex_jax.model.digest import kinds
from sparsex_jax.reuse.cost import Speeds

log = logging.getLogger(__name__)

Lend = Callable[[int], AbstractContextManager[Sequence[int]]]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "qkv_bias",
    "qk_norm",
    "post_norms",
    "activation",
    "wide_qk_norm",
    "num_experts",
    "experts_per_token",
)


def speeds_for(runner: Runner, lend: Lend) -> Speeds:
    """The speeds of a runner's model on its devices: of an earlier measurement, or measured now and kept on disk.

    A file that cannot be read, or that is about something else, is written again. Where none can be written, each
    process measures for itself.

    Args:
      lend: called only if they are measured, with a number of tokens; gives pages for these, or for fewer.
    """
    about = described(runner)
    path = cache_directory() / f"speeds-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    speeds = read(path, about)
    if speeds is None:
        started = time.perf_counter()
        with lend(wanted_tokens(runner)) as pages:
            speeds = measure_speeds(runner, pages)
        log.info("measured the speeds of prefills in %.1f s: %s", time.perf_counter() - started, speeds)
        write(path, about, speeds)
    return speeds


def described(runner: Runner) -> dict[str, Any]:
    """All that speeds depend on, ready for JSON. They are of the whole mesh: what a device computes and reads is its
    share, and collectives are in the times."""
    engine, shapes = runner.engine, runner.shapes
    adapters = engine.max_adapters * engine.max_adapter_rank
    return {
        "device": runner.mesh.devices.flat[0].device_kind,
        "mesh": dict(runner.mesh.shape),
        "processors": num_processors(),
        "backend": repr(runner.decoder.ops.backend),
        "versions": {"sparsex": version("sparsex-jax"), "jax": jax.__version__},
        "dtype": engine.dtype,
        "kv_dtype": engine.store_dtype,
        "weights": kinds(runner.params),
        "page_size": engine.page_size,
        "max_requests": shapes.max_requests,
        "max_pages": shapes.max_pages,
        "buckets": [list(bucket) for bucket in shapes.buckets],
        "model": {name: getattr(runner.model, name) for name in _SIZES} | {"windows": list(runner.model.windows)},
    } | ({"adapters": adapters, "shared": engine.share_adapters} if adapters else {})


def read(path: Path, about: dict[str, Any]) -> Speeds | None:
    """The speeds in a file, or None if it cannot be read or is about something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Speeds.from_dict(content["speeds"]) if content["about"] == about else None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        log.debug("no speeds in %s: %r", path, error)
        return None


def write(path: Path, about: dict[str, Any], speeds: Speeds) -> None:
    """Write a file in one step, so that who reads it meanwhile finds a whole one. Log it if that is not possible."""
    content = json.dumps({"about": about, "speeds": dataclasses.asdict(speeds)}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(content + "\n")
        try:
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)  # it is there only if that failed
    except OSError as error:
        log.info("the speeds of prefills are not kept, each process measures them: %s", error)
