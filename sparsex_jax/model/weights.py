"""The decoder's parameters, and the one description that everything about them is derived from.

The fields of `Params` and `Layers` carry each weight's logical axes, its initialisation and which models have it.
Shapes follow from the axes and a `ModelConfig`; shardings follow from the axes and a mesh (`sharding.RULES`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.low_rank import LowRank, ValuesApart
from sparsex_jax.model.sharding import Axes, sharding
from sparsex_kernels.mailboxes import Mailboxes


def _in_every_model(config: ModelConfig) -> bool:
    return True


def _has_experts(config: ModelConfig) -> bool:
    return config.num_experts is not None


def _has_mlp(config: ModelConfig) -> bool:
    return config.num_experts is None


def _where_looked_up(config: ModelConfig) -> Axes:
    """An embedding that is only looked up lives by columns: a device then has its part of each row, and the parts are
    gathered. Of rows that each one device has, a mesh would have to sum all, which sends twice as much."""
    return ("vocab", "embed") if config.tied_embeddings else ("looked_up", "embed_columns")


def weight(
    *axes: str,
    fan_in: Axes = (),
    only_if: Callable[[ModelConfig], bool] = _in_every_model,
    lives: Callable[[ModelConfig], Axes] | None = None,
) -> Any:
    """A field that holds a weight with these logical axes.

    Args:
      fan_in: the axes whose sizes multiply to the number of inputs of each output. Empty for the scale of a norm, whose
        dtype `ModelConfig.norm_dtype` may say.
      only_if: tells whether a model has the weight; the field is None where it does not.
      lives: the logical axes by which it is divided over a mesh, if not by its own.
    """
    return struct.field(metadata={"axes": axes, "fan_in": fan_in, "only_if": only_if, "lives": lives})


_EXPERTS = ("layers", "experts")


# The run-time check of types is off for both classes, because trees with their structure also hold shapes, shardings
# and descriptions.
@no_type_check
@struct.dataclass(kw_only=True)
class Layers:
    """The weights of all layers, stacked: the first axis of each counts the layers."""

    attn_norm: Array = weight("layers", "embed")
    wq: Array = weight("layers", "embed", "q_heads", "head_dim", fan_in=("embed",))
    wk: Array = weight("layers", "embed", "kv_heads", "head_dim", fan_in=("embed",))
    wv: Array = weight("layers", "embed", "kv_heads", "head_dim", fan_in=("embed",))
    wo: Array = weight("layers", "q_heads", "head_dim", "embed", fan_in=("q_heads", "head_dim"))
    mlp_norm: Array = weight("layers", "embed")
    # Either an MLP or, where there is a router, experts; the others are None.
    w_gate: Array = weight("layers", "embed", "mlp", fan_in=("embed",), only_if=_has_mlp)
    w_up: Array = weight("layers", "embed", "mlp", fan_in=("embed",), only_if=_has_mlp)
    w_down: Array = weight("layers", "mlp", "embed", fan_in=("mlp",), only_if=_has_mlp)
    router: Array | None = weight("layers", "embed", "experts", fan_in=("embed",), only_if=_has_experts)
    expert_gate: Array = weight(*_EXPERTS, "embed", "expert_mlp", fan_in=("embed",), only_if=_has_experts)
    expert_up: Array = weight(*_EXPERTS, "embed", "expert_mlp", fan_in=("embed",), only_if=_has_experts)
    expert_down: Array = weight(*_EXPERTS, "expert_mlp", "embed", fan_in=("expert_mlp",), only_if=_has_experts)
    bq: Array | None = weight("layers", "q_heads", "head_dim", fan_in=("embed",), only_if=lambda c: c.qkv_bias)
    bk: Array | None = weight("layers", "kv_heads", "head_dim", fan_in=("embed",), only_if=lambda c: c.qkv_bias)
    bv: Array | None = weight("layers", "kv_heads", "head_dim", fan_in=("embed",), only_if=lambda c: c.qkv_bias)
    q_norm: Array | None = weight("layers", "head_dim", only_if=lambda c: c.qk_norm)
    k_norm: Array | None = weight("layers", "head_dim", only_if=lambda c: c.qk_norm)
    post_attn_norm: Array | None = weight("layers", "embed", only_if=lambda c: c.post_norms)
    post_mlp_norm: Array | None = weight("layers", "embed", only_if=lambda c: c.post_norms)
    wide_q_norm: Array | None = weight("layers", "q_heads", "head_dim", only_if=lambda c: c.wide_qk_norm)
    wide_k_norm: Array | None = weight("layers", "kv_heads", "head_dim", only_if=lambda c: c.wide_qk_norm)


@no_type_check
@struct.dataclass(kw_only=True)
class Params:
    """All weights of a decoder.

    Attributes:
      lm_head: None where the output projection is the embedding's transpose.
      adapters: what they add to the weights of layers, by the weights' names. None: there are none.
      values_apart: what they add to values, where a store has it apart. `adapters` has no keys or values then.
      mailboxes: by which the GPUs of a mesh sum few rows. None: there are none, and collectives sum.
    """

    embed: Array = weight("vocab", "embed", fan_in=("embed",), lives=_where_looked_up)
    layers: Layers
    final_norm: Array = weight("embed")
    lm_head: Array | None = weight("embed", "vocab", fan_in=("embed",), only_if=lambda c: not c.tied_embeddings)
    adapters: dict[str, LowRank] | None = None
    values_apart: ValuesApart | None = None
    mailboxes: Mailboxes | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """The description of one weight of a given model.

    Attributes:
      shape: its size along each of `axes`.
      axes: its logical axes.
      fan_in: the number of inputs of each output, which sets the scale of random weights; 0 for the scale of a norm.
      input_axes: which of its axes count the inputs; none for biases and the scales of norms.
      lives: the logical axes by which it is divided over a mesh.
      dtype: if it is not that of the other weights.
    """

    shape: tuple[int, ...]
    axes: Axes
    fan_in: int
    input_axes: Axes
    lives: Axes
    dtype: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether it is one array of all layers."""
        return self.axes[0] == "layers"

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Where it is on a mesh."""
        return sharding(mesh, self.lives, self.shape)

    @property
    def of_experts(self) -> bool:
        """Whether each layer's part is one array of all experts."""
        return self.axes[:2] == _EXPERTS


def describe(config: ModelConfig) -> Params:
    """The parameters of a model with a `Weight` in place of each array."""
    layers = Layers(**_described(Layers, config))
    return Params(layers=layers, **_described(Params, config))


def _described(record: type, config: ModelConfig) -> dict[str, Any]:
    """A `Weight` or None for each field of the record that is a weight."""
    fields = dataclasses.fields(record)
    return {field.name: _weight(field.metadata, config) for field in fields if "axes" in field.metadata}


def _weight(metadata: Mapping[str, Any], config: ModelConfig) -> Weight | None:
    if not metadata["only_if"](config):
        return None
    sizes, axes, inputs = axis_sizes(config), metadata["axes"], metadata["fan_in"]
    fan_in = math.prod(sizes[axis] for axis in inputs) if inputs else 0
    shape = tuple(sizes[axis] for axis in axes)
    dtype, lives = None if inputs else config.norm_dtype, metadata["lives"]
    input_axes = tuple(axis for axis in inputs if axis in axes)
    return Weight(shape, axes, fan_in, input_axes, lives(config) if lives else axes, dtype)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each logical axis of the weights."""
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "q_heads": config.num_q_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "experts": config.num_experts or 0,
        "expert_mlp": config.intermediate_size,
    }


def leaf_name(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The fields that lead to a leaf of `Params`, such as `("layers", "wq")`."""
    return tuple(key.name for key in path)


def num_parameters(config: ModelConfig) -> int:
    """The number of scalars in all weights together."""
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(describe(config)))


def abstract_params(config: ModelConfig, dtype: str, mesh: Mesh) -> Params:
    """The parameters with a `jax.ShapeDtypeStruct` for each array, which says where on the mesh it lives."""

    def abstract(weight: Weight) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(weight.shape, jnp.dtype(weight.dtype or dtype), sharding=weight.sharding(mesh))

    return jax.tree.map(abstract, describe(config))


def random_params(
    config: ModelConfig, dtype: str, mesh: Mesh, seed: int = 0, finish: Callable[..., Any] | None = None
) -> Params:
    """Random weights of the right scale, made on the devices that will hold them.

    Args:
      finish: is called with the path of each weight, its description and the array, and gives what takes its place.
    """
    described = describe(config)
    # Weights get their random keys in the order of their names, so the order of the fields does not matter.
    names = sorted(leaf_name(path) for path, _ in jax.tree.leaves_with_path(described))
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))

    def make(path: tuple[Any, ...], weight: Weight) -> Any:
        array = _random(keys[leaf_name(path)], weight, weight.dtype or dtype, weight.sharding(mesh))
        return array if finish is None else finish(path, weight, array)

    return jax.tree.map_with_path(make, described)


def _random(key: Array, weight: Weight, dtype: str, placed: NamedSharding) -> Array:
    """Ones for the scale of a norm, else noise that keeps the scale of what the weight is multiplied with."""
    if not weight.fan_in:
        return jnp.ones(weight.shape, dtype, device=placed)
    return _noise(key, weight.shape, dtype, 1 / math.sqrt(weight.fan_in), placed)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale", "placed"))
def _noise(key: Array, shape: tuple[int, ...], dtype: str, scale: float, placed: NamedSharding) -> Array:
    noise = scale * jax.random.normal(key, shape, jnp.dtype(dtype))
    return jax.lax.with_sharding_constraint(noise, placed)
