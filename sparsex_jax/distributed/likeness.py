"""What all processes of a group must have alike, by the names that an error says."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from importlib.metadata import version

import jax
import numpy as np

from sparsex_jax.device.runner import Runner
from sparsex_jax.distributed.joining import About


def of_programs() -> dict[str, str]:
    """Versions: other ones may dispatch other programs, or have other plans."""
    packages = {name: version(name) for name in ("sparsex-jax", "jax", "jaxlib")}
    return packages | {"Python": ".".join(platform.python_version_tuple()[:2])}


def of_runner(runner: Runner) -> About:
    """The model, the engine's configuration, the mesh and the weights."""
    model, engine = (dataclasses.asdict(each) for each in (runner.model, runner.engine))
    devices = runner.mesh.devices.flat
    return {
        **{f"model.{name}": repr(value) for name, value in model.items()},
        **{name: repr(value) for name, value in engine.items()},
        "tensor_parallel": str(runner.mesh.size),
        "devices": ", ".join(dict.fromkeys(device.device_kind for device in devices)),
        "kernels": repr(runner.decoder.ops.backend),
        "weights": _norms(runner),
    }


def _norms(runner: Runner) -> str:
    """A digest of the scales of norms. Each device has these whole, and two models hardly ever have the same."""
    layers = runner.params.layers
    scales = jax.device_get([layers.attn_norm, layers.mlp_norm, runner.params.final_norm])
    digest = hashlib.sha256()
    for each in scales:
        digest.update(np.asarray(each).tobytes())
    return digest.hexdigest()[:16]
