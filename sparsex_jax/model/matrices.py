"""Weights as stacks of matrices, as quantised ones are kept, and where their parts live on a mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.sharding import TENSOR_AXIS, Axes
from sparsex_jax.model.weights import Params, Weight, describe, leaf_name, random_params
from sparsex_kernels.quantised import KINDS, SQUARE, Kind, Quantised, blocks_within, finer, quantise, turned

_BLOCKED = ("scales", "mins", "large", "large_mins")
NEVER_MADE = ("embed", "lm_head", "router")  # no codes are made of their floats


def sides(name: str, weight: Weight) -> tuple[Axes, Axes, Axes]:
    """The axes of a weight that count matrices, inputs and outputs. An embedding is the matrix that makes logits."""
    stack = tuple(axis for axis in ("layers", "experts") if axis in weight.axes)
    inputs = ("embed",) if name == "embed" else weight.input_axes
    return stack, inputs, tuple(axis for axis in weight.axes if axis not in (*stack, *inputs))


def is_matrix(name: str, weight: Weight) -> bool:
    """Whether a weight multiplies rows. Biases, norms and routers do not, or are never quantised."""
    return name != "router" and bool(weight.input_axes or name == "embed")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one layer's matrices live.

    Attributes:
      matrices: experts of a layer; 1 where there are none.
      inputs, outputs: of a matrix.
      divided: the mesh's axis that divides each axis of `[inputs, outputs]`, or `[experts, inputs, outputs]`.
      by_squares: whether its products read codes of 8 bits with squares turned around: those of layers, on a GPU.
    """

    mesh: Mesh
    matrices: int
    inputs: int
    outputs: int
    divided: PartitionSpec
    by_squares: bool = False

    @classmethod
    def of(cls, name: str, weight: Weight, mesh: Mesh) -> Place:
        sizes = dict(zip(weight.axes, weight.shape, strict=True))
        stack, inputs, outputs = sides(name, weight)
        per_axis = dict(zip(weight.axes, weight.sharding(mesh).spec, strict=True))

        def over(axes: Axes) -> str | None:
            return TENSOR_AXIS if any(per_axis[axis] for axis in axes) else None

        rows, columns = (math.prod(sizes[axis] for axis in axes) for axes in (inputs, outputs))
        experts = tuple(axis for axis in stack if axis != "layers")
        divided = PartitionSpec(*(over((axis,)) for axis in experts), over(inputs), over(outputs))
        by_squares = stack == ("layers",) and mesh.devices.flat[0].platform == "gpu"
        return cls(mesh, math.prod(sizes[axis] for axis in experts), rows, columns, divided, by_squares)

    @property
    def size(self) -> int:
        """Weights of a layer."""
        return self.matrices * self.inputs * self.outputs

    def shards(self, axis: int) -> int:
        """Parts that the mesh makes of an axis."""
        return self.mesh.shape[TENSOR_AXIS] if self.divided[axis] else 1

    def can_hold(self, kind: str) -> bool:
        """Whether the groups of codes that are packed together stay together, and blocks fill the inputs."""
        about = KINDS[kind]
        whole = self.inputs % max(about.block, about.large, 1) == 0
        return whole and self.inputs % (about.granule * self.shards(-2)) == 0

    def sharding(self, *, turned: bool = False, stacked: bool = False) -> NamedSharding:
        """Of parts with all of their blocks: outputs first where they are `turned`, with an axis of layers in front."""
        *front, inputs, outputs = self.divided
        back = (outputs, inputs) if turned else (inputs, outputs)
        return NamedSharding(self.mesh, PartitionSpec(*([None] if stacked else []), *front, *back))

    def fitted(self, matrices: Quantised) -> Quantised:
        """The same in the order that the devices' kernels read, with scales of blocks that lie within one device."""
        fit = self._divisible(matrices)
        sizes = self.inputs // self.shards(-2), self.outputs // self.shards(-1)
        turns = self.by_squares and KINDS[fit.kind] == Kind(8) and not any(size % SQUARE for size in sizes)
        return turned(fit) if turns else fit

    def _divisible(self, matrices: Quantised) -> Quantised:
        """The same with scales of blocks that lie within what one device has."""
        parts = {name: getattr(matrices, name) for name in _BLOCKED if getattr(matrices, name) is not None}
        for axis, size in ((-2, self.inputs), (-1, self.outputs)):
            shards = self.shards(axis)
            for name, part in parts.items() if shards > 1 else ():
                parts[name] = finer(part, axis, blocks_within(size, size // part.shape[axis], shards))
        return dataclasses.replace(matrices, **parts)


def quantise_params(config: ModelConfig, params: Params, kind: str, mesh: Mesh) -> Params:
    """The parameters with codes in place of the floats that multiply rows, one weight after another."""

    def make(path: tuple[Any, ...], weight: Weight, stack: Any) -> Any:
        return quantise_stack(leaf_name(path)[-1], weight, stack, kind, mesh)

    return jax.tree.map_with_path(make, describe(config), params)


def random_quantised(config: ModelConfig, dtype: str, mesh: Mesh, kind: str, seed: int = 0) -> Params:
    """`random_params` in codes. No more than one weight is on the devices in floats."""

    def finish(path: tuple[Any, ...], weight: Weight, stack: Any) -> Any:
        return quantise_stack(leaf_name(path)[-1], weight, stack, kind, mesh)

    return random_params(config, dtype, mesh, seed, finish)


def quantise_stack(name: str, weight: Weight, stack: Any, kind: str, mesh: Mesh) -> Any:
    """A weight of all layers in codes; as it is where none are made of it, or its inputs do not fill whole blocks."""
    place = Place.of(name, weight, mesh)
    if not (weight.stacked and is_matrix(name, weight) and place.can_hold(kind)):
        return stack
    shape = (*(weight.shape[at] for at in range(len(sides(name, weight)[0]))), place.inputs, place.outputs)
    dtype = stack.dtype.name

    @jax.jit
    def make(stack: Any) -> Quantised:
        made = jax.lax.map(lambda matrix: place.fitted(quantise(matrix, kind)), stack.reshape(shape))
        made = dataclasses.replace(made, dtype=dtype)
        return jax.lax.with_sharding_constraint(made, place.sharding(stacked=True))

    return make(stack)
