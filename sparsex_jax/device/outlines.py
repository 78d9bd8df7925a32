"""Objects on their way to another process with the same devices, without what their arrays hold.

Whoever compiles needs of an array its shape, its type and its place. So that is what comes of each array on the
devices, as `jax.ShapeDtypeStruct`; all else comes as it is.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import jax


def outline(value: Any) -> bytes:
    """Raises what `pickle` does, where something that is no array cannot be sent."""
    file = io.BytesIO()
    _Outliner(file).dump(value)
    return file.getvalue()


def of_outline(outlined: bytes) -> Any:
    """What `outline` was given, with shapes for arrays. Starts the devices."""
    return _Reader(io.BytesIO(outlined)).load()


class _Outliner(pickle.Pickler):
    def persistent_id(self, obj: Any) -> int | None:
        return obj.id if isinstance(obj, jax.Device) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, jax.Array):
            return NotImplemented
        return _shape, (obj.shape, obj.dtype, obj.sharding, obj.weak_type)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._devices = {device.id: device for device in jax.devices()}

    def persistent_load(self, pid: int) -> jax.Device:
        return self._devices[pid]


def _shape(shape: tuple[int, ...], dtype: Any, placed: jax.sharding.Sharding, weak_type: bool) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed, weak_type=weak_type)
