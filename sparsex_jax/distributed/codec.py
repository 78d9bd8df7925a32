"""Messages between processes as bytes: plain values, NumPy arrays, and the records that plans are made of.

Nothing that arrives can name code. A record is known by its name in the table below, and is made of its fields. What
lives on the devices of each process does not travel: a message says which call it came from (`Reference`), and each
process has its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import numpy as np
from jax import Array

from sparsex_jax.cache import Segment
from sparsex_jax.cache.derived import Derived
from sparsex_jax.cache.mirrors import Packing
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.runner import PrefillRun, ProbeRun
from sparsex_jax.device.sampling import Adjustment, Sampled, Sampling
from sparsex_jax.model.adapters import AdapterWeights, Pair
from sparsex_jax.reuse.adapters import Acting
from sparsex_jax.reuse.excerpt import Probe
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

_TUPLE, _ARRAY, _RECORD, _REFERENCE = range(1, 5)
_RECORDS: dict[str, type] = {
    each.__name__: each
    for each in (
        RequestPlan,
        PromptMap,
        Segment,
        Derived,
        Phase,
        Probe,
        Acting,
        Packing,
        DecodeState,
        Sampling,
        Adjustment,
        AdapterWeights,
        Pair,
    )
}


class Reference(NamedTuple):
    """What a call returned: all of it, or one place of the tuple that it returned.

    Attributes:
      call: its number.
      place: -1: all.
    """

    call: int
    place: int


def is_kept(value: Any) -> bool:
    """Whether it lives on the devices of each process, and is known by the call that returned it."""
    return isinstance(value, (PrefillRun, ProbeRun, DecodeState, Sampled, Array))


def kept_of(call: int, result: Any) -> dict[Reference, Any]:
    """What of a call's result is known by it."""
    parts = enumerate(result) if type(result) is tuple else [(-1, result)]
    return {Reference(call, place): part for place, part in parts if is_kept(part)}


def _nothing(_: Any) -> None:
    """Of a message that refers to nothing."""


def pack(value: Any, refer: Callable[[Any], Reference | None] = _nothing) -> bytes:
    """A value as bytes.

    Args:
      refer: gives the reference to what is not to travel, else None.

    Raises:
      TypeError: something in it is of a type that does not travel.
    """

    def encode(each: Any) -> msgpack.ExtType:
        reference = refer(each)
        if reference is not None:
            return extension(_REFERENCE, list(reference))
        if isinstance(each, (np.ndarray, np.generic)):
            return extension(_ARRAY, [each.dtype.name, list(each.shape), each.tobytes()])
        if type(each).__name__ in _RECORDS:
            return extension(_RECORD, [type(each).__name__, _fields(each)])
        if type(each) is tuple:
            return extension(_TUPLE, list(each))
        raise TypeError(f"{type(each).__name__} does not travel between processes: {each!r:.200}")

    def extension(code: int, content: list[Any]) -> msgpack.ExtType:
        return msgpack.ExtType(code, plain(content))

    def plain(content: Any) -> bytes:
        packed: bytes = msgpack.packb(content, default=encode, strict_types=True)
        return packed

    return plain(value)


def _fields(record: Any) -> dict[str, Any]:
    names = getattr(record, "_fields", None) or [field.name for field in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names}


def unpack(data: bytes, resolve: Callable[[Reference], Any] | None = None) -> Any:
    """What `pack` was given.

    Args:
      resolve: gives what a reference refers to.

    Raises:
      ValueError, KeyError, TypeError: these are not bytes that `pack` gave.
    """

    def decode(code: int, content: bytes) -> Any:
        value = plain(content)
        if code == _REFERENCE and resolve is not None:
            return resolve(Reference(*value))
        if code == _ARRAY:
            name, shape, numbers = value
            array = np.frombuffer(numbers, np.dtype(name)).reshape(shape)
            return array if shape else array[()]
        if code == _RECORD:
            name, fields = value
            return _RECORDS[name](**fields)
        if code == _TUPLE:
            return tuple(value)
        raise ValueError(f"a message has an extension of code {code}, which is unknown here")

    def plain(content: bytes) -> Any:
        return msgpack.unpackb(content, ext_hook=decode, strict_map_key=False)

    return plain(data)
