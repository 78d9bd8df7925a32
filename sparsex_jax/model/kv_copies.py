"""Copies of KV heads, where a mesh has more devices than the model has heads (`sharding.kv_copies`).

They are made once, of the weights that make keys and values. What follows from those weights then has as many heads as
there are devices: what is written into the store, what attention reads, what adapters add.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.matrices import Place
from sparsex_jax.model.sharding import kv_copies, on_mesh
from sparsex_jax.model.weights import Params, Weight, describe
from sparsex_kernels.quantised import SQUARE, Mixed, Quantised, blocks_within, finer, turned

_HEADS = "kv_heads"


def with_kv_copies(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """The parameters as the devices compute with them: with copies of KV heads, one on each device.

    Args:
      params: of the model as its checkpoint has it, placed on the mesh. They are given back if no copies are needed.
    """
    copies = kv_copies(config, mesh)

    def make(name: str, weight: Weight, stack: Any) -> Any:
        placed = _placement(name, weight, stack, mesh)
        return _copied(stack, weight.axes.index(_HEADS), config.num_kv_heads, copies, placed)

    return params if copies == 1 else _with_heads(make, params, on_mesh(config, mesh))


def without_kv_copies(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """What `with_kv_copies` was given, but for scales of blocks that have become finer."""
    copies = kv_copies(config, mesh)

    def take(name: str, weight: Weight, stack: Any) -> Any:
        return _first_of_each(stack, weight.axes.index(_HEADS), copies * config.num_kv_heads, copies)

    return params if copies == 1 else _with_heads(take, params, config)


def _with_heads(make: Callable[[str, Weight, Any], Any], params: Params, config: ModelConfig) -> Params:
    """The parameters with `make(name, description, stack)` in place of each stack that has KV heads."""
    described = vars(describe(config).layers).items()
    having = {name: weight for name, weight in described if weight is not None and _HEADS in weight.axes}
    made = {name: make(name, weight, getattr(params.layers, name)) for name, weight in having.items()}
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, **made))


def _placement(name: str, weight: Weight, stack: Any, mesh: Mesh) -> NamedSharding:
    if isinstance(stack, Quantised | Mixed):
        return Place.of(name, weight, mesh).sharding(stacked=True)
    return weight.sharding(mesh)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _copied(stack: Any, axis: int, heads: int, copies: int, placed: NamedSharding) -> Any:
    made = _over_heads(lambda x, axis: jnp.repeat(x, copies, axis), _apart(stack, heads), axis, heads)
    return jax.lax.with_sharding_constraint(made, placed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _first_of_each(stack: Any, axis: int, heads: int, copies: int) -> Any:
    return _over_heads(lambda x, axis: jax.lax.slice_in_dim(x, 0, None, copies, axis), stack, axis, heads)


def _over_heads(change: Callable[[Array, int], Array], stack: Any, axis: int, heads: int) -> Any:
    """`change(array, axis)` of a stack whose `axis` counts heads. Those of matrices are side by side in the outputs."""
    if not isinstance(stack, Quantised | Mixed):
        return change(stack, axis)

    def of_matrices(part: Array) -> Array:
        *front, outputs = part.shape
        return change(part.reshape(*front, heads, outputs // heads), len(front)).reshape(*front, -1)

    return jax.tree.map(of_matrices, stack)


def _apart(stack: Any, heads: int) -> Any:
    """Matrices of which no block of codes, and no square that is turned around, belongs to two heads."""
    if isinstance(stack, Mixed):
        return dataclasses.replace(stack, parts=tuple(_apart(part, heads) for part in stack.parts))
    if not isinstance(stack, Quantised):
        return stack
    outputs = stack.shape[-1]
    crosses = stack.turned and outputs // heads % SQUARE

    def divided(part: Array) -> Array:
        return finer(part, -1, blocks_within(outputs, outputs // part.shape[-1], heads))

    return jax.tree.map(divided, turned(stack) if crosses else stack)
