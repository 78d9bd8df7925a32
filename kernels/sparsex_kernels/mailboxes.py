"""Memory of each GPU of one process into which the others write, so that kernels can sum over a mesh in one trip.

A collective of a few rows takes a GPU longer to begin than its bytes take. Here each GPU writes its part of a sum into
the memory of all others, in packets that say themselves when they have arrived, and each adds the same parts in the
same order. NCCL's protocol LL does so too, and the one-shot all-reduces of TensorRT-LLM and vLLM.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

MOST_PROGRAMS, MOST_WARPS = 512, 16  # that make a sum; each warp counts those it took part in
HEADER = 4 * MOST_PROGRAMS * MOST_WARPS  # bytes: these counters
PACKET = 16  # bytes: two words of numbers, each with a flag behind it
NUMBERS = 4  # of a packet, of two bytes each


@no_type_check  # trees with its structure also hold shapes and shardings
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mailboxes:
    """Where the mailboxes of all GPUs of a mesh are.

    Attributes:
      table: a line for each device: its number, zero, and the addresses of all mailboxes, of eight bytes each, the
        lower half first. Divided over the mesh by lines.
      memory: the mailboxes, a line for each device. Kernels find them by their addresses; as an operand they are not
        freed while one runs.
      rows: that there is room for in each sum.
      axis: the mesh's.
    """

    table: Int[Array, "lines words"]
    memory: Int[Array, "lines mailbox"]
    rows: int = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})


def mailbox_bytes(devices: int, rows: int, width: int) -> int:
    """Bytes of a mailbox: each device's rows of two sums, one of which may still be read as the next one arrives."""
    return HEADER + 2 * devices * rows * (width // NUMBERS) * PACKET


def abstract_mailboxes(mesh: Mesh, rows: int, width: int) -> Mailboxes:
    """Those of a mesh of one axis as shapes, for devices that are not there."""
    table, memory = _shapes(mesh, rows, width)
    shape: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=_by_device(mesh))
    return Mailboxes(shape(table), shape(memory), rows, _axis(mesh))


def make_mailboxes(mesh: Mesh, rows: int, width: int) -> Mailboxes:
    """Mailboxes for sums of up to `rows` rows of `width` numbers, of the GPUs of a mesh of one axis.

    What kernels write into them is not seen by JAX. They are zero at first, and all GPUs have to run the same sums in
    the same order: where one has failed, make new ones.
    """
    (_, size), by_device = _shapes(mesh, rows, width), _by_device(mesh)
    memory = jax.block_until_ready(jnp.zeros(size, jnp.int32, device=by_device))
    own = {shard.device: shard.data.unsafe_buffer_pointer() for shard in memory.addressable_shards}
    addresses = np.array([own[device] for device in mesh.devices.flat], np.uint64).view(np.int32)
    lines = [np.concatenate([np.array([rank, 0], np.int32), addresses]) for rank in range(mesh.size)]
    return Mailboxes(jax.device_put(np.stack(lines), by_device), memory, rows, _axis(mesh))


def _shapes(mesh: Mesh, rows: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of table and memory."""
    return (mesh.size, 2 * (mesh.size + 1)), (mesh.size, mailbox_bytes(mesh.size, rows, width) // 4)


def _by_device(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(_axis(mesh)))


def _axis(mesh: Mesh) -> str:
    (axis,) = mesh.axis_names
    return axis


def reach_one_another(devices: Sequence[jax.Device]) -> bool:
    """Whether these are GPUs of this process, each of which can write into the memory of the others.

    JAX lets every GPU of a process do so where the driver says that it can.
    """
    if any(device.platform != "gpu" or device.process_index != jax.process_index() for device in devices):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    numbers = [device.local_hardware_id for device in devices]
    return all(_reaches(driver, a, b) for a in numbers for b in numbers if a != b)


def _reaches(driver: ctypes.CDLL, a: int, b: int) -> bool:
    answer = ctypes.c_int(0)
    return driver.cuDeviceCanAccessPeer(ctypes.byref(answer), a, b) == 0 and answer.value == 1
