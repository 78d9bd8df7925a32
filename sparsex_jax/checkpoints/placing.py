"""Brings a checkpoint's tensors to the devices, one at a time, each as it is stored.

Host memory holds two tensors at most: one that is on its way, and the next, which is read meanwhile. The devices make
floats of codes, turn them into the model's shape and dtype, and write them into the stacks of all layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sparsex_jax.checkpoints.held import Held, Stored, hold, num_bytes
from sparsex_jax.config import ModelConfig
from sparsex_jax.model.sharding import Axes, sharding, to_devices
from sparsex_jax.model.weights import Params, Weight, describe, leaf_name
from sparsex_kernels.quantised import Quantised, dequantise

Read = Callable[[str, int | None], np.ndarray | Stored]


def stored_axes(name: str, weight: Weight) -> Axes:
    """The logical axes of one layer's tensor in the order in which checkpoints store it: outputs first.

    The embedding is stored as `[vocab, embed]`, a linear weight as `[out, in]`, a bias or the scale of a norm as
    `[out]`, where several axes may count the outputs or the inputs.
    """
    axes = tuple(axis for axis in weight.axes if axis != "layers")
    inputs = () if name == "embed" else weight.input_axes
    return (*(axis for axis in axes if axis not in inputs), *inputs)


def place_rows(config: ModelConfig, dtype: str, mesh: Mesh, read: Read, held: Held | None = None) -> Params:
    """Place the weights of a checkpoint that keeps each layer apart and stores linear weights as `[out, in]`.

    Shows a progress bar on standard error, where that is a terminal.

    Args:
      read: gives the stored array of one layer's weight, such as `("wq", 3)`, or of a weight outside the layers,
        `("embed", None)`, with any float dtype or in codes. Experts are one array. `check_shapes` has seen their
        shapes.
      held: which weights stay quantised, or become it; None: none.
    """
    described, size = describe(config), jnp.dtype(dtype).itemsize
    sizes = jax.tree.map_with_path(
        lambda path, each: num_bytes(leaf_name(path)[-1], each, mesh, dtype, held), described
    )
    with _bar(sum(jax.tree.leaves(sizes))) as bar:

        def place(path: tuple[Any, ...], weight: Weight) -> Any:
            name = leaf_name(path)[-1]
            quantised = None if held is None else hold(name, weight, mesh, dtype, held, bar.update)
            if quantised is not None:
                return quantised
            placing = _Placing(name, weight, mesh, read, lambda count: bar.update(count * size))
            made = weight.dtype or dtype
            return placing.stacked(made) if weight.stacked else placing.single(made)

        return jax.tree.map_with_path(place, described)


def _bar(size: float) -> tqdm:
    """Of bytes that are placed. Nothing is shown where standard error is no terminal."""
    return tqdm(total=size, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=None)


class _Placing:
    """How one weight goes from a checkpoint to the devices.

    Attributes:
      order: the axes of one layer's weight as places among the stored axes.
      placed: where the whole weight lives.
    """

    def __init__(self, name: str, weight: Weight, mesh: Mesh, read: Read, tell: Callable[[int], Any]) -> None:
        """
        Args:
          tell: is called with the number of elements that were placed.
        """
        self._name, self._weight, self._read, self._tell = name, weight, read, tell
        sizes, stored = dict(zip(weight.axes, weight.shape, strict=True)), stored_axes(name, weight)
        self._stored_shape = tuple(sizes[axis] for axis in stored)
        self._sent = sharding(mesh, stored, self._stored_shape)
        self.order = tuple(stored.index(axis) for axis in weight.axes if axis != "layers")
        self.placed = weight.sharding(mesh)

    def single(self, dtype: str) -> Array:
        sent = self._send(self._read(self._name, None))
        made = _oriented(sent, self._stored_shape, self.order, dtype, self.placed)
        return jax.block_until_ready(made)  # before the next tensor is read

    def stacked(self, dtype: str) -> Array:
        """One array of all layers, into which each layer's tensor is written while the next is read."""
        stack = _empty(self._weight.shape, dtype, self.placed)
        for layer in range(self._weight.shape[0]):
            rows = self._read(self._name, layer)
            jax.block_until_ready(stack)
            sent = self._send(rows)
            del rows
            stack = _with_layer(stack, sent, np.int32(layer), self._stored_shape, self.order, self.placed)
        return jax.block_until_ready(stack)

    def _send(self, rows: np.ndarray | Stored) -> Array | Quantised:
        """To the devices, to each what it needs. All codes go to each: they are few bytes, and may not divide."""
        self._tell(math.prod(self._stored_shape))
        if isinstance(rows, Stored):
            parts = to_devices(rows.parts, NamedSharding(self._sent.mesh, PartitionSpec()))
            return Quantised(**parts, kind=rows.kind)
        rows = rows.astype(np.float32) if rows.dtype == np.float64 else rows  # which devices do not have
        return to_devices(rows.reshape(self._stored_shape), self._sent)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: str, placed: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), placed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _oriented(
    sent: Array | Quantised, shape: tuple[int, ...], order: tuple[int, ...], dtype: str, placed: NamedSharding
) -> Array:
    return jax.lax.with_sharding_constraint(_rows(sent, shape).transpose(order).astype(dtype), placed)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _with_layer(
    stack: Array,
    sent: Array | Quantised,
    layer: Any,
    shape: tuple[int, ...],
    order: tuple[int, ...],
    placed: NamedSharding,
) -> Array:
    """The stack of all layers with one of them written. Its memory is that of the stack that is given."""
    rows = _rows(sent, shape).transpose(order).astype(stack.dtype)
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, rows, layer, 0), placed)


def _rows(sent: Array | Quantised, shape: tuple[int, ...]) -> Array:
    """What was sent as floats, outputs first; float32 where it was codes."""
    if not isinstance(sent, Quantised):
        return sent
    inputs_first = jax.tree.map(lambda part: part.swapaxes(-1, -2), sent)
    return dequantise(inputs_first, jnp.float32).swapaxes(-1, -2).reshape(shape)
