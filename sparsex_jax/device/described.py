"""Devices that are described, not present: their own compilers, which come in wheels, compile for them anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, use_abstract_mesh

from sparsex_jax.device.compilation import WITH_STORE
from sparsex_jax.model.sharding import TENSOR_AXIS
from sparsex_kernels.backend import Backend

# The TPU kernels and nothing else, whether they have been validated on a device or not.
TPU = Backend("tpu", preferred=("tpu",))

# What XLA's compiler asks of a GPU (`GpuTargetConfigProto` in XLA's sources), by the name of a topology.
GPUS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def described_mesh(topology: str, num_devices: int) -> Mesh:
    """A mesh of this number of devices that are not there.

    Args:
      topology: of TPUs, such as `v5e:2x4`, whose first devices are taken; or a name in `GPUS`.

    Raises:
      RuntimeError: the wheel with the compiler, `libtpu` or `jax-cuda13-plugin`, is not installed.
    """
    devices = _gpus(topology, num_devices) if topology in GPUS else _tpus(topology)
    return Mesh(np.array(devices[:num_devices]), (TENSOR_AXIS,), axis_types=(AxisType.Auto,))


def _gpus(name: str, num_devices: int) -> list[jax.Device]:
    about = {"target_config": GPUS[name], "topology": f"1x1x{num_devices}"}  # slices, hosts of each, GPUs of each
    return topologies.get_topology_desc(platform="cuda", **about).devices


def _tpus(topology: str) -> list[jax.Device]:
    # No metadata server to ask, no lock on a device to take.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def backend_of(mesh: Mesh) -> Backend:
    """The kernels that are compiled for a described mesh."""
    device = mesh.devices.flat[0]
    return TPU if device.platform == "tpu" else Backend.of(device)


def compile_options(mesh: Mesh) -> dict[str, Any] | None:
    """What `Lowered.compile` has to be told: what the steps themselves tell it on devices, and on GPUs not to find out
    which of XLA's products is the quickest, for which one has to be there."""
    return WITH_STORE | {"xla_gpu_autotune_level": 0} if backend_of(mesh).platform == "gpu" else None


@contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """Within this context, Pallas looks up the mesh's chip."""
    with use_abstract_mesh(mesh.abstract_mesh):
        yield
