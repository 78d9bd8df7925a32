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

from sparsex_jax.model.matrices import NEVER_MADE, Place, is_matrix
from sparsex_jax.model.sharding import to_devices
from sparsex_jax.model.weights import Weight
from sparsex_kernels.quantised import KINDS, Mixed, Quantised, quantise


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
        whole = {name: part.repeat(outputs // part.shape[-2], axis=-2) for name, part in self.parts.items()}
        return Stored(self.kind, {name: part[..., which, :] for name, part in whole.items()})

    def ordered(self, order: Callable[[np.ndarray], np.ndarray]) -> Stored:
        """With the outputs in another order, which a function gives to arrays of them."""
        numbers = np.arange(self.parts["codes"].shape[-2])
        new = order(numbers)
        return self if np.array_equal(new, numbers) else self.rows(new)


@dataclasses.dataclass(frozen=True)
class Held:
    """What stays quantised, or becomes it.

    Attributes:
      kind: of a layer's weight, such as `("wq", 3)`, on the devices. None: it is to be floats.
      read: the layer's weight, of those that have a kind: in codes of this kind, or as floats of which codes are made.
    """

    kind: Callable[[str, int | None], str | None]
    read: Callable[[str, int | None], Stored | np.ndarray]

    def kinds(self, name: str, weight: Weight, mesh: Mesh) -> list[str | None]:
        """Of each layer, or of the one weight that is outside of them, what the mesh can hold."""
        layers: list[int | None] = [*range(weight.shape[0])] if weight.stacked else [None]
        if not is_matrix(name, weight):
            return [None] * len(layers)
        place = Place.of(name, weight, mesh)
        kinds = (self.kind(name, layer) for layer in layers)
        return [kind if kind is not None and place.can_hold(kind) else None for kind in kinds]


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
        return Held(kind, in_codes)

    def made(name: str, layer: int | None) -> str | None:
        return None if name in NEVER_MADE else quantization

    def source(name: str, layer: int | None) -> Stored | np.ndarray:
        return in_codes(name, layer) if kind(name, layer) == quantization else read(name, layer)

    return Held(made, source)


def num_bytes(name: str, weight: Weight, mesh: Mesh, dtype: str, held: Held | None) -> float:
    """Of a weight on the devices, without its scales."""
    each, whole = jnp.dtype(weight.dtype or dtype).itemsize, math.prod(weight.shape)
    kinds = [None] if held is None else held.kinds(name, weight, mesh)
    return sum(whole / len(kinds) * (KINDS[kind].bits / 8 if kind else each) for kind in kinds)


def hold(
    name: str, weight: Weight, mesh: Mesh, dtype: str, held: Held, tell: Callable[[float], Any]
) -> Quantised | Mixed | None:
    """A weight on the devices, each part with all layers; None: it is to be floats.

    Args:
      tell: is called with the bytes that were placed.
    """
    kinds = held.kinds(name, weight, mesh)
    if not any(kinds):
        return None
    found = list(dict.fromkeys(kinds))
    holding = _Holding(name, Place.of(name, weight, mesh), dtype, held, tell)
    if not weight.stacked:
        return jax.tree.map(lambda part: part[0], holding.stack([None], kinds[0]))
    parts = [holding.stack([at for at, its in enumerate(kinds) if its == kind], kind) for kind in found]
    if len(parts) == 1:
        return parts[0]
    numbers = [(found.index(kind), kinds[:at].count(kind)) for at, kind in enumerate(kinds)]
    return Mixed(tuple(parts), tuple(numbers))


@dataclasses.dataclass(frozen=True)
class _Holding:
    """How one weight goes from a checkpoint to the devices."""

    name: str
    place: Place
    dtype: str
    held: Held
    tell: Callable[[float], Any]

    def stack(self, layers: list[Any], kind: str | None) -> Any:
        """Some layers of one kind, into whose stacks each layer's tensor is written while the next is read."""
        bits, stacks = KINDS[kind].bits if kind else 8 * jnp.dtype(self.dtype).itemsize, None
        for at, layer in enumerate(layers):
            read = self.held.read(self.name, layer)
            jax.block_until_ready(stacks)
            made = self._made(read, kind)
            del read
            if stacks is None:
                stacks = _stacks(made, len(layers), self.place)
            stacks = _with_layer(stacks, made, np.int32(at), self.place)
            self.tell(self.place.size * bits / 8)
        return jax.block_until_ready(stacks)

    def _made(self, read: Stored | np.ndarray, kind: str | None) -> Any:
        """One layer's weight on the devices, its inputs first."""
        if isinstance(read, np.ndarray):
            rows = read.astype(np.float32) if read.dtype == np.float64 else read
            return _of_floats(self._send(rows), kind, self.dtype, self.place)
        parts: Any = {name: self._send(part) for name, part in read.parts.items()}
        return _of_codes(Quantised(**parts, kind=read.kind, dtype=self.dtype), self.place)

    def _send(self, rows: np.ndarray) -> Array:
        """To the devices, to each what it needs; all of it where that does not divide."""
        place, (outputs, inputs) = self.place, rows.shape[-2:]
        whole = inputs % place.shards(-2) == 0 and outputs % place.shards(-1) == 0
        anywhere = NamedSharding(place.mesh, PartitionSpec(*place.divided[:-2]))
        return to_devices(rows, place.sharding(turned=True) if whole else anywhere)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _of_floats(rows: Array, kind: str | None, dtype: str, place: Place) -> Any:
    matrix = rows.swapaxes(-1, -2)
    if kind is None:
        return matrix.astype(dtype)
    return place.fitted(dataclasses.replace(quantise(matrix, kind), dtype=dtype))


@functools.partial(jax.jit, static_argnums=1)
def _of_codes(rows: Quantised, place: Place) -> Quantised:
    return place.fitted(jax.tree.map(lambda part: part.swapaxes(-1, -2), rows))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stacks(like: Any, layers: int, place: Place) -> Any:
    empty = jax.tree.map(lambda part: jnp.zeros((layers, *part.shape), part.dtype), like)
    return jax.lax.with_sharding_constraint(empty, place.sharding(stacked=True))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _with_layer(stacks: Any, made: Any, at: Any, place: Place) -> Any:
    """The stacks with one layer written. Their memory is that of the stacks that are given."""

    def write(stack: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, part, at, 0)

    return jax.lax.with_sharding_constraint(jax.tree.map(write, stacks, made), place.sharding(stacked=True))
