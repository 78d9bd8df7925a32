"""Brings quantised weights to the devices: as a checkpoint has them, or made there from its floats.

As for floats, a tensor is sent as it is stored, outputs first, and the devices turn it and write it into the stack of
all layers. Each part of it, such as codes and scales, has a stack of its own. A layer of another kind than the others
is in stacks of its kind (`Mixed`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsex_jax.model.sharding import TENSOR_AXIS, Axes, sharding
from sparsex_jax.model.weights import Weight
from sparsex_kernels.quantised import KINDS, Mixed, Quantised, blocks_within, finer, quantise

MADE = ("fp8", "int8")  # the kinds that are made of floats when a checkpoint is loaded
_FLOATS = ("embed", "lm_head", "router")  # of which no codes are made
_BLOCKED = ("scales", "mins", "large", "large_mins")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One layer's weight in a checkpoint's codes.

    Attributes:
      kind: a name in `KINDS`.
      parts: the fields of `Quantised`, outputs first: `[*experts, outputs, inputs]`, or with blocks of each.
    """

    kind: str
    parts: dict[str, np.ndarray]

    def rows(self, which: slice | np.ndarray) -> Stored:
        """Some outputs, or all in another order."""
        outputs = self.parts["codes"].shape[-2]
        if isinstance(which, slice) and which.indices(outputs) == (0, outputs, 1):
            return self
        whole = {name: _of_each_output(part, outputs) for name, part in self.parts.items()}
        return Stored(self.kind, {name: part[..., which, :] for name, part in whole.items()})

    def ordered(self, order: Callable[[np.ndarray], np.ndarray]) -> Stored:
        """With the outputs in another order, which a function gives to arrays of them."""
        numbers = np.arange(self.parts["codes"].shape[-2])
        new = order(numbers)
        return self if np.array_equal(new, numbers) else self.rows(new)


def _of_each_output(part: np.ndarray, outputs: int) -> np.ndarray:
    return part.repeat(outputs // part.shape[-2], axis=-2)


@dataclasses.dataclass(frozen=True)
class Held:
    """What stays quantised, or becomes it.

    Attributes:
      kind: of a layer's weight, such as `("wq", 3)`, on the devices. None: it is to be floats.
      read: the layer's weight, of those that have a kind: in codes of this kind, or as floats of which codes are made.
    """

    kind: Callable[[str, int | None], str | None]
    read: Callable[[str, int | None], Stored | np.ndarray]


def choose_held(
    quantization: str,
    read: Callable[[str, int | None], np.ndarray],
    kind: Callable[[str, int | None], str | None],
    in_codes: Callable[[str, int | None], Stored | np.ndarray],
) -> Held | None:
    """What `EngineConfig.quantization` asks for.

    Args:
      read: a weight as floats.
      kind: of a weight in the checkpoint; None where it is floats.
      in_codes: a weight in the checkpoint's codes where it has them, else as floats.
    """
    if quantization == "none":
        return None
    if quantization == "stored":
        return Held(lambda name, layer: None if name == "router" else kind(name, layer), in_codes)

    def made(name: str, layer: int | None) -> str | None:
        return None if name in _FLOATS else quantization

    def source(name: str, layer: int | None) -> Stored | np.ndarray:
        return in_codes(name, layer) if kind(name, layer) == quantization else read(name, layer)

    return Held(made, source)


def sides(name: str, weight: Weight) -> tuple[Axes, Axes, Axes]:
    """The axes of a weight that count matrices, inputs and outputs. An embedding is the matrix that makes logits."""
    stack = tuple(axis for axis in ("layers", "experts") if axis in weight.axes)
    inputs = ("embed",) if name == "embed" else weight.input_axes
    return stack, inputs, tuple(axis for axis in weight.axes if axis not in (*stack, *inputs))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where matrices `[inputs, outputs]`, or with an axis of experts, live: what divides each of their axes."""

    mesh: Mesh
    stack: int  # experts of a layer; 0 where a layer has one matrix
    inputs: int
    outputs: int
    divided: PartitionSpec

    @classmethod
    def of(cls, name: str, weight: Weight, mesh: Mesh) -> _Place:
        sizes = dict(zip(weight.axes, weight.shape, strict=True))
        stack, inputs, outputs = sides(name, weight)
        per_axis = dict(zip(weight.axes, sharding(mesh, weight.axes, weight.shape).spec, strict=True))

        def over(axes: Axes) -> str | None:
            return TENSOR_AXIS if any(per_axis[axis] for axis in axes) else None

        rows, columns = (math.prod(sizes[axis] for axis in axes) for axes in (inputs, outputs))
        experts = ("experts",) if "experts" in stack else ()
        divided = PartitionSpec(*(over((axis,)) for axis in experts), over(inputs), over(outputs))
        return cls(mesh, sizes["experts"] if experts else 0, rows, columns, divided)

    def shards(self, axis: int) -> int:
        return self.mesh.shape[TENSOR_AXIS] if self.divided[axis] else 1

    def can_hold(self, kind: str) -> bool:
        """Whether the groups of codes that are packed together stay together."""
        return self.inputs % (KINDS[kind].granule * self.shards(-2)) == 0

    def sharding(self, *, turned: bool = False, stacked: bool = False) -> NamedSharding:
        """Of parts with all of their blocks: outputs first where they are `turned`, with an axis of layers in front."""
        *front, inputs, outputs = self.divided
        back = (outputs, inputs) if turned else (inputs, outputs)
        return NamedSharding(self.mesh, PartitionSpec(*([None] if stacked else []), *front, *back))


def hold(
    name: str, weight: Weight, mesh: Mesh, dtype: str, held: Held, tell: Callable[[float], Any]
) -> Quantised | Mixed | None:
    """A weight on the devices, each part with all layers; None: it is to be floats.

    Args:
      tell: is called with the bytes that were placed.
    """
    if not weight.input_axes and name != "embed":
        return None
    place = _Place.of(name, weight, mesh)
    layers = list(range(weight.shape[0])) if weight.stacked else [None]
    kinds = [_kind(held.kind(name, layer), place) for layer in layers]
    if not any(kinds):
        return None
    found = list(dict.fromkeys(kinds))
    holding = _Holding(name, place, dtype, held, tell)
    parts = [
        holding.stack([layer for layer, its in zip(layers, kinds, strict=True) if its == kind], kind) for kind in found
    ]
    if len(parts) == 1:
        return parts[0] if weight.stacked else jax.tree.map(lambda part: part[0], parts[0])
    numbers = [(found.index(kind), kinds[:at].count(kind)) for at, kind in enumerate(kinds)]
    return Mixed(tuple(parts), tuple(numbers))


def num_bytes(name: str, weight: Weight, mesh: Mesh, dtype: str, held: Held | None) -> float:
    """Of a weight on the devices, without its scales."""
    whole, each = math.prod(weight.shape), jnp.dtype(weight.dtype or dtype).itemsize
    if held is None or not (weight.input_axes or name == "embed"):
        return whole * each
    layers, place = range(weight.shape[0]) if weight.stacked else [None], _Place.of(name, weight, mesh)
    kinds = [_kind(held.kind(name, layer), place) for layer in layers]
    return sum(whole / len(kinds) * (KINDS[kind].bits / 8 if kind else each) for kind in kinds)


def _kind(kind: str | None, place: _Place) -> str | None:
    return kind if kind is not None and place.can_hold(kind) else None


@dataclasses.dataclass(frozen=True)
class _Holding:
    """How one weight goes from a checkpoint to the devices."""

    name: str
    place: _Place
    dtype: str
    held: Held
    tell: Callable[[float], Any]

    def stack(self, layers: list[Any], kind: str | None) -> Any:
        """Some layers of one kind, into whose stacks each layer's tensor is written while the next is read."""
        stacks: Any = None
        for at, layer in enumerate(layers):
            read = self.held.read(self.name, layer)
            jax.block_until_ready(stacks)
            made = self._made(read, kind)
            del read
            if stacks is None:
                stacks = _stacks(made, len(layers), self.place)
            stacks = _with_layer(stacks, made, np.int32(at), self.place)
            bits = KINDS[kind].bits if kind else 8 * jnp.dtype(self.dtype).itemsize
            self.tell(self.place.inputs * self.place.outputs * max(self.place.stack, 1) * bits / 8)
        return jax.block_until_ready(stacks)

    def _made(self, read: Stored | np.ndarray, kind: str | None) -> Any:
        """One layer's weight on the devices, its inputs first."""
        if isinstance(read, np.ndarray):
            rows = read.astype(np.float32) if read.dtype == np.float64 else read
            return _of_floats(self._send(rows), kind, self.dtype, self.place)
        return _of_codes(
            Quantised(**jax.tree.map(self._send, read.parts), kind=read.kind, dtype=self.dtype), self.place
        )

    def _send(self, rows: np.ndarray) -> Array:
        target, spec = self.place.sharding(turned=True), self.place.divided
        whole = all(size % self.place.shards(axis) == 0 for size, axis in ((rows.shape[-1], -2), (rows.shape[-2], -1)))
        return jax.device_put(rows, target if whole else NamedSharding(self.place.mesh, PartitionSpec(*spec[:-2])))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _of_floats(rows: Array, kind: str | None, dtype: str, place: _Place) -> Any:
    matrix = rows.swapaxes(-1, -2)
    if kind is None:
        return matrix.astype(dtype)
    return _divisible(dataclasses.replace(quantise(matrix, kind), dtype=dtype), place)


@functools.partial(jax.jit, static_argnums=1)
def _of_codes(rows: Quantised, place: _Place) -> Quantised:
    return _divisible(jax.tree.map(lambda part: part.swapaxes(-1, -2), rows), place)


def _divisible(matrix: Quantised, place: _Place) -> Quantised:
    """With scales of blocks that lie within what one device has."""
    parts = {name: getattr(matrix, name) for name in _BLOCKED if getattr(matrix, name) is not None}
    for axis, size in ((-2, place.inputs), (-1, place.outputs)):
        shards = place.shards(axis)
        if shards == 1:
            continue
        for name, part in parts.items():
            parts[name] = finer(part, axis, blocks_within(size, size // part.shape[axis], shards))
    return dataclasses.replace(matrix, **parts)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stacks(like: Any, layers: int, place: _Place) -> Any:
    empty = jax.tree.map(lambda part: jnp.zeros((layers, *part.shape), part.dtype), like)
    return jax.lax.with_sharding_constraint(empty, place.sharding(stacked=True))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _with_layer(stacks: Any, made: Any, at: Any, place: _Place) -> Any:
    """The stacks with one layer written. Their memory is that of the stacks that are given."""
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=at, axis=0)
    written = jax.tree.map(lambda stack, part: update(stack, part), stacks, made)
    return jax.lax.with_sharding_constraint(written, place.sharding(stacked=True))
