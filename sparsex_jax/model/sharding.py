"""Logical axes, and the one table that maps them to mesh axes.

Weights and the KV store are described by logical axes alone; this table decides where they live. The mesh has one axis
today, `tensor`, over which heads, the MLP or the experts, and the vocabulary are split. Where it has more devices than
the model has KV heads, each head is there several times: `on_mesh`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import logical_to_mesh_axes
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import InvalidRequestError

TENSOR_AXIS = "tensor"

# Rules for flax: logical axis, mesh axis. An axis that is not listed is an error; None means replicated.
RULES: tuple[tuple[str, str | None], ...] = (
    ("layers", None),
    ("embed", None),
    ("embed_columns", TENSOR_AXIS),
    ("looked_up", None),
    ("q_heads", TENSOR_AXIS),
    ("kv_heads", TENSOR_AXIS),
    ("head_dim", None),
    ("mlp", TENSOR_AXIS),
    ("experts", TENSOR_AXIS),
    ("expert_mlp", None),
    ("vocab", TENSOR_AXIS),
    ("pages", None),
    ("kv", None),
    ("slots", None),
)

Axes = tuple[str, ...]

# Sums run beside other work on multiprocessors that are left to them. NCCL takes one for each channel, and reads this
# when devices first communicate.
SPARED = 4  # 3 % of an H100's
_CHANNELS = "NCCL_MAX_NCHANNELS"

_MORE_ON_CPU = "A processor is one device, or as many as JAX_NUM_CPU_DEVICES or XLA_FLAGS says when JAX starts"


def make_mesh(tensor_parallel: int = 1) -> Mesh:
    """A mesh of the first `tensor_parallel` devices along the `tensor` axis.

    Raises:
      InvalidRequestError: there are not so many devices, or of several processes one has none of these.
    """
    devices = jax.devices()
    if not 1 <= tensor_parallel <= len(devices):
        on_cpu = devices[0].platform == "cpu" and tensor_parallel > 1
        raise InvalidRequestError(
            f"tensor_parallel={tensor_parallel} must be from 1 to {len(devices)}, the number of devices"
            + (f". {_MORE_ON_CPU}" if on_cpu else "")
        )
    _require_every_process(devices, tensor_parallel)
    if tensor_parallel > 1 and devices[0].platform == "gpu":
        os.environ.setdefault(_CHANNELS, str(SPARED))
    return Mesh(np.array(devices[:tensor_parallel]), (TENSOR_AXIS,), axis_types=(AxisType.Auto,))


def _require_every_process(devices: Sequence[jax.Device], used: int) -> None:
    idle = {device.process_index for device in devices[used:]} - {device.process_index for device in devices[:used]}
    if idle:
        raise InvalidRequestError(
            f"tensor_parallel={used} leaves process {', '.join(map(str, sorted(idle)))} without a device; it must be "
            f"{len(devices)}, all devices of all processes"
        )


def device_name(mesh: Mesh) -> str:
    """The kind of the devices, with their number if there are several: `2 x NVIDIA H100`."""
    kind = mesh.devices.flat[0].device_kind
    return kind if mesh.size == 1 else f"{mesh.size} x {kind}"


def check_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """Check that the model divides over a mesh, and give a mesh of the same devices whose axes are automatic.

    Raises:
      InvalidRequestError: the mesh has no `tensor` axis, or its size does not divide the query heads, or the MLP or
        the number of experts, or it and the number of KV heads do not divide one another.
    """
    if TENSOR_AXIS not in mesh.axis_names:
        raise InvalidRequestError(f"mesh has axes {mesh.axis_names}; it needs one named {TENSOR_AXIS!r}")
    wrong = _undivided(config, mesh.shape[TENSOR_AXIS])
    if wrong:
        fitting = [str(size) for size in range(1, config.num_q_heads + 1) if not _undivided(config, size)]
        raise InvalidRequestError(f"{wrong}. tensor_parallel={' or '.join(fitting)} suits this model")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _undivided(config: ModelConfig, size: int) -> str | None:
    """Which field of the model does not divide over this number of devices, in words. None: all of it divides."""
    mlp = "intermediate_size" if config.num_experts is None else "num_experts"
    for field in ("num_q_heads", mlp):
        if getattr(config, field) % size:
            return f"{field}={getattr(config, field)} does not divide over the mesh's {TENSOR_AXIS}={size}"
    heads = config.num_kv_heads
    if heads % size and size % heads:
        return f"num_kv_heads={heads} does not divide over the mesh's {TENSOR_AXIS}={size}, nor that over them"
    return None


def kv_copies(config: ModelConfig, mesh: Mesh) -> int:
    """On how many devices of the axis `tensor` each KV head is: 1, or more where there are more devices than heads.

    Copies of a head stand next to each other. So the query heads of a device find the KV head that they belong to on
    it. With 8 query heads and 2 KV heads on 4 devices:

        device      0     1     2     3
        queries    0 1   2 3   4 5   6 7
        KV head     0     0     1     1
    """
    return max(mesh.shape[TENSOR_AXIS] // config.num_kv_heads, 1)


def on_mesh(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model as the devices have it: each copy of a KV head counts as one. Its weights are those that
    `kv_copies.with_kv_copies` makes, and neither kernels nor programs know of it."""
    copies = kv_copies(config, mesh)
    return config if copies == 1 else dataclasses.replace(config, num_kv_heads=copies * config.num_kv_heads)


def spec(axes: Axes) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
      ValueError: an axis that `RULES` does not list. flax would replicate it without a word.
    """
    unknown = set(axes) - {axis for axis, _ in RULES}
    if unknown:
        raise ValueError(f"axes={axes} has {', '.join(sorted(unknown))}, which the sharding rules do not list")
    partition = logical_to_mesh_axes(axes, RULES)
    assert partition is not None  # it is None for no axes at all
    return partition


def sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array with these logical axes lives. A dimension that does not divide is replicated.

    Only the vocabulary can fail to divide here, columns of embeddings, and KV heads of which no copies were made yet:
    `check_mesh` refuses the rest.
    """
    parts = [
        mesh_axis if mesh_axis is not None and size % mesh.shape[mesh_axis] == 0 else None
        for mesh_axis, size in zip(spec(axes), shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*parts))


def zeros_of(shapes: Any) -> Any:
    """Zeros on the devices for a tree of `jax.ShapeDtypeStruct`, each with its sharding."""
    return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), shapes)


def to_devices(tree: Any, to: Sharding) -> Any:
    """A tree of arrays on the devices of `to`.

    Where other processes have some of these, each process places its own part of the values that all have alike.
    `jax.device_put` would compare them first, which takes a collective for each array.
    """
    return jax.device_put(tree, to) if to.is_fully_addressable else jax.tree.map(lambda leaf: _own_part(leaf, to), tree)


def _own_part(leaf: Any, to: Sharding) -> Array:
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, to)  # from all devices to all devices: a program
    value = np.asarray(leaf)
    own = to.addressable_devices_indices_map(value.shape)
    parts = [jax.device_put(value[index], device) for device, index in own.items()]
    return jax.make_array_from_single_device_arrays(value.shape, to, parts)
