"""The decoder's parameters: one abstract description is the only source of shape, logical axes and init.

Parameters are a pytree of plain dictionaries. The leaves under `layers` are stacked, layer first.
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
from jax.sharding import Mesh, NamedSharding

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.sharding import Axes, sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its shape, its logical axes, and how many inputs feed each output (0: a norm's scale)."""

    shape: tuple[int, ...]
    axes: Axes
    fan_in: int = 0


def describe(config: ModelConfig) -> Params:
    """The parameter pytree with a `Weight` at every leaf."""
    hidden, mlp, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
    layer = {
        "attn_norm": Weight((hidden,), ("embed",)),
        "wq": Weight((hidden, q_heads, dim), ("embed", "q_heads", "head_dim"), hidden),
        "wk": Weight((hidden, kv_heads, dim), ("embed", "kv_heads", "head_dim"), hidden),
        "wv": Weight((hidden, kv_heads, dim), ("embed", "kv_heads", "head_dim"), hidden),
        "wo": Weight((q_heads, dim, hidden), ("q_heads", "head_dim", "embed"), q_heads * dim),
        "mlp_norm": Weight((hidden,), ("embed",)),
        "w_gate": Weight((hidden, mlp), ("embed", "mlp"), hidden),
        "w_up": Weight((hidden, mlp), ("embed", "mlp"), hidden),
        "w_down": Weight((mlp, hidden), ("mlp", "embed"), mlp),
    }
    if config.qkv_bias:
        layer |= {
            "bq": Weight((q_heads, dim), ("q_heads", "head_dim"), hidden),
            "bk": Weight((kv_heads, dim), ("kv_heads", "head_dim"), hidden),
            "bv": Weight((kv_heads, dim), ("kv_heads", "head_dim"), hidden),
        }
    if config.qk_norm:
        layer |= {"q_norm": Weight((dim,), ("head_dim",)), "k_norm": Weight((dim,), ("head_dim",))}
    stacked = {name: Weight((config.num_layers, *w.shape), ("layers", *w.axes), w.fan_in) for name, w in layer.items()}
    params: Params = {
        "embed": Weight((config.vocab_size, hidden), ("vocab", "embed"), hidden),
        "layers": stacked,
        "final_norm": Weight((hidden,), ("embed",)),
    }
    if not config.tied_embeddings:
        params["lm_head"] = Weight((hidden, config.vocab_size), ("embed", "vocab"), hidden)
    return params


def abstract_params(config: ModelConfig, dtype: str, mesh: Mesh) -> Params:
    """The parameter pytree of `jax.ShapeDtypeStruct`, placed: what a checkpoint is restored into."""
    return _map(
        config, lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=sharding(mesh, w.axes, w.shape))
    )


def random_params(config: ModelConfig, dtype: str, mesh: Mesh, seed: int = 0) -> Params:
    """Random weights of the right scale, made on the devices that will hold them."""
    leaves, treedef = jax.tree.flatten(describe(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        _random(key, weight, dtype, sharding(mesh, weight.axes, weight.shape))
        for key, weight in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _random(key: jax.Array, weight: Weight, dtype: str, placed: NamedSharding) -> jax.Array:
    """Ones for a norm, else noise that keeps the scale of what goes through."""
    if not weight.fan_in:
        return jnp.ones(weight.shape, dtype, device=placed)
    return _noise(key, weight.shape, dtype, 1 / math.sqrt(weight.fan_in), placed)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale", "placed"))
def _noise(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float, placed: NamedSharding) -> jax.Array:
    noise = scale * jax.random.normal(key, shape, jnp.dtype(dtype))
    return jax.lax.with_sharding_constraint(noise, placed)


def place_params(config: ModelConfig, dtype: str, mesh: Mesh, read: Callable[[str], np.ndarray]) -> Params:
    """Put a checkpoint's arrays on the mesh, one leaf at a time.

    Args:
      read: gives the array of a leaf by its path, `embed`, `layers/wq`, ..., stacked and in the shape of
        `describe`; any float dtype.
    """

    def put(path: tuple[Any, ...], weight: Weight) -> jax.Array:
        name = "/".join(key.key for key in path)
        array = read(name)
        if array.shape != weight.shape:
            raise ValueError(f"{name} has shape {array.shape}; the configuration needs {weight.shape}")
        return jax.device_put(array.astype(jnp.dtype(dtype), copy=False), sharding(mesh, weight.axes, weight.shape))

    return jax.tree_util.tree_map_with_path(put, describe(config))


def _map(config: ModelConfig, fn: Callable[[Weight], Any]) -> Params:
    return jax.tree.map(fn, describe(config))


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(describe(config)))
