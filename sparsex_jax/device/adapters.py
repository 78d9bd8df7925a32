"""The slots of the devices' memory that adapters are loaded into: stacks of a fixed shape, written a slot at a time.

Loading compiles nothing, since a slot's number is data and ranks are filled up with zeros: `make_stacks` has compiled
the few writes that there are.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.config.checks import require
from sparsex_jax.model.adapters import TARGETS, AdapterWeights, Pair
from sparsex_jax.model.low_rank import LowRank, ValuesApart
from sparsex_jax.model.matrices import Place
from sparsex_jax.model.sharding import TENSOR_AXIS, kv_copies, on_mesh, to_devices, zeros_of
from sparsex_jax.model.store import abstract_low_rank_store
from sparsex_jax.model.weights import describe

_KV = ("wk", "wv")  # where adapters share KV, keys have none, and values have theirs in `ValuesApart`
_INPUTS, _OUTPUTS = 1, 2  # axes of A and B; the other one of these two counts the ranks


def targets(model: ModelConfig, mesh: Mesh) -> dict[str, Place]:
    """The weights of a model that adapters may add to, and where their matrices live. Experts are none of them."""
    layers = describe(model).layers
    weights = {name: getattr(layers, name) for name in TARGETS}
    return {name: Place.of(name, weight, mesh) for name, weight in weights.items() if weight is not None}


def all_ranks(engine: EngineConfig, platform: str) -> int:
    """Columns of all slots, on GPUs with zeros behind them: kernels take multiples of 64."""
    ranks = engine.max_adapters * engine.max_adapter_rank
    return ranks + -ranks % 64 if platform == "gpu" else ranks


def _stack(model: ModelConfig, engine: EngineConfig, mesh: Mesh, sizes: tuple[int, ...], *divided: str | None) -> Any:
    """Of all layers.

    Args:
      divided: the axes of the mesh that divide the first of `sizes`, and those behind it.
    """
    placed = NamedSharding(mesh, PartitionSpec(None, *divided))
    return jax.ShapeDtypeStruct((model.num_layers, *sizes), jnp.dtype(engine.dtype), sharding=placed)


def abstract_stacks(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> dict[str, LowRank] | None:
    """The stacks of an engine as shapes with shardings, by the names of the weights; None where it has no adapters.

    A is divided as the weight's inputs are, and B as its outputs.
    """
    if engine.max_adapters == 0:
        return None
    ranks, made = all_ranks(engine, mesh.devices.flat[0].platform), {}
    for name, place in targets(on_mesh(model, mesh), mesh).items():
        if engine.share_adapters and name in _KV:
            continue
        inputs, outputs = place.divided
        a = _stack(model, engine, mesh, (place.inputs, ranks), inputs, None)
        b = _stack(model, engine, mesh, (ranks, place.outputs), None, outputs)
        made[name] = LowRank(a, b, engine.max_adapter_rank)
    return made


def abstract_apart(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> ValuesApart | None:
    """What adapters add to values where they share KV, as shapes with shardings; None where they do not.

    Each device has all of A, and B of its KV heads.
    """
    if not engine.share_adapters:
        return None
    a = model.hidden_size, all_ranks(engine, mesh.devices.flat[0].platform)
    b = engine.max_adapters, on_mesh(model, mesh).num_kv_heads, engine.max_adapter_rank, model.head_dim
    return ValuesApart(_stack(model, engine, mesh, a), _stack(model, engine, mesh, b, None, TENSOR_AXIS))


def check_room(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> None:
    """Raise InvalidRequestError if all that the slots of adapters take is more than a device of the mesh has."""
    shapes = jax.tree.leaves((abstract_stacks(model, engine, mesh), abstract_apart(model, engine, mesh)))
    if engine.share_adapters:
        shapes.append(abstract_low_rank_store(model, engine, mesh))
    needed, there = sum(map(_bytes_on_a_device, shapes)), _memory_of(mesh)
    beside = f", with store_tokens={engine.store_tokens} and share_adapters," if engine.share_adapters else ""
    require(
        there is None or needed <= there,
        f"max_adapters={engine.max_adapters} slots of max_adapter_rank={engine.max_adapter_rank}{beside} take "
        f"{needed / 1e9:.1f} GB on each device, which has {(there or 0) / 1e9:.1f} GB",
    )


def _bytes_on_a_device(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _memory_of(mesh: Mesh) -> int | None:
    """Bytes that each device has, the others of its host beside it. None: they do not say."""
    if mesh.devices.flat[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((each["bytes_limit"] for each in stats if "bytes_limit" in each), default=None)


def make_stacks(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> dict[str, LowRank] | None:
    """Stacks of zeros, once the writes into them are compiled. None where the engine has no adapters."""
    shapes = abstract_stacks(model, engine, mesh)
    if shapes is None:
        return None
    return {name: put(stack, 0, None) for name, stack in zeros_of(shapes).items()}


def make_apart(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> ValuesApart | None:
    """As `make_stacks`, for values where adapters share KV."""
    shapes = abstract_apart(model, engine, mesh)
    return None if shapes is None else put_apart(zeros_of(shapes), 0, None)


def check_shared(name: str, weights: AdapterWeights) -> None:
    """Raise InvalidRequestError if an adapter cannot be one of those that share KV."""
    about = f"adapter {name!r} does not fit an engine with share_adapters: it"
    require("wk" not in weights.pairs, f"{about} adds to keys ('wk'), and what is added cannot be kept apart from them")
    acts_late = "wv" in weights.pairs and len(weights.invocation) > 0
    require(not acts_late, f"{about} adds to values ('wv') from its invocation sequence on, and not to all of a prompt")


def check_pairs(name: str, weights: AdapterWeights, model: ModelConfig, mesh: Mesh, dtype: str) -> None:
    """Raise InvalidRequestError if an adapter does not fit the model, or has numbers that its dtype does not hold.

    One infinity in a slot's B would reach the rows of all other slots, whose zeros it is multiplied with.
    """
    places, size = targets(model, mesh), model.vocab_size
    known = all(0 <= token < size for token in weights.invocation)
    require(known, f"adapter {name!r} is invoked by {weights.invocation}; tokens are from 0 to {size - 1}")
    for target, pair in weights.pairs.items():
        about = f"adapter {name!r} has a pair for {target!r:.60}"
        require(target in places, f"{about}; this model takes pairs for {', '.join(places)}")
        place, rank = places[target], pair.a.shape[-1]
        wanted = (model.num_layers, place.inputs, rank), (model.num_layers, rank, place.outputs)
        require(
            (pair.a.shape, pair.b.shape) == wanted,
            f"{about} of shapes {pair.a.shape} and {pair.b.shape}; they must be {wanted[0]} and {wanted[1]}",
        )
        require(0 < rank <= weights.rank, f"{about} of rank {rank}, and says that {weights.rank} is its largest")
        require(all(_is_finite(part, dtype) for part in pair), f"{about} that has NaN or infinities in {dtype}")


def pairs_with_kv_copies(pairs: Mapping[str, Pair], model: ModelConfig, mesh: Mesh) -> dict[str, Pair]:
    """The pairs as the devices have the weights: what B makes of keys and values, for each copy of a head."""
    copies = kv_copies(model, mesh)

    def spread(pair: Pair) -> Pair:
        by_head = pair.b.reshape(*pair.b.shape[:_OUTPUTS], model.num_kv_heads, model.head_dim)
        return pair._replace(b=by_head.repeat(copies, axis=_OUTPUTS).reshape(*pair.b.shape[:_OUTPUTS], -1))

    return {name: spread(pair) if name in _KV else pair for name, pair in pairs.items()}


def _is_finite(part: np.ndarray, dtype: str) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(part.astype(jnp.dtype(dtype))).all())


def put(stack: LowRank, slot: int, pair: Pair | None) -> LowRank:
    """A stack with a pair in one of its slots, filled up with zeros; zeros alone for None."""
    a = np.zeros((*stack.a.shape[:_OUTPUTS], stack.rank), stack.a.dtype)
    b = np.zeros((stack.b.shape[0], stack.rank, stack.b.shape[_OUTPUTS]), stack.b.dtype)
    if pair is not None:
        a[:, :, : pair.a.shape[_OUTPUTS]], b[:, : pair.b.shape[_INPUTS]] = pair
    at = np.int32(slot * stack.rank)
    return LowRank(_written(stack.a, a, at, _OUTPUTS), _written(stack.b, b, at, _INPUTS), stack.rank)


def put_apart(apart: ValuesApart, slot: int, pair: Pair | None) -> ValuesApart:
    """As `put`, for values that are stored without what adapters add to them."""
    layers, _, heads, rank, head_dim = apart.b.shape
    a = np.zeros((*apart.a.shape[:_OUTPUTS], rank), apart.a.dtype)
    b = np.zeros((layers, rank, heads, head_dim), apart.b.dtype)
    if pair is not None:
        given = pair.a.shape[_OUTPUTS]
        a[:, :, :given] = pair.a
        b[:, :given] = pair.b.reshape(layers, given, heads, head_dim)
    by_head = b.transpose(0, 2, 1, 3)[:, None]
    made = _written(apart.a, a, np.int32(slot * rank), _OUTPUTS)
    return ValuesApart(made, _written(apart.b, by_head, np.int32(slot), axis=1))


def _written(stack: Array, part: np.ndarray, at: np.int32, axis: int) -> Array:
    return _write(stack, to_devices(part, stack.sharding), at, axis=axis, placed=stack.sharding)


@functools.partial(jax.jit, static_argnames=("axis", "placed"))
def _write(
    stack: Float[Array, "layers *sizes"],
    part: Float[Array, "layers *_"],
    at: Int[Array, ""],
    *,
    axis: int,
    placed: NamedSharding,
) -> Float[Array, "layers *sizes"]:
    """The stack is not donated: what is under way still reads it."""
    return lax.with_sharding_constraint(lax.dynamic_update_slice_in_dim(stack, part, at, axis), placed)
