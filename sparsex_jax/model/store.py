"""The paged KV store on the devices: one array of all layers, split over KV heads. Where adapters share it, what they
add to values is beside it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.config.checks import require
from sparsex_jax.model.sharding import on_mesh, sharding, zeros_of
from sparsex_jax.model.weights import Params
from sparsex_kernels.layout import FLOAT8, LowRankStore, Store

STORE_AXES = ("layers", "pages", "kv", "kv_heads", "slots", "head_dim")


@no_type_check  # trees with its structure also hold shapes
@struct.dataclass
class SharedStore:
    """The store of an engine whose adapters share KV: values have no adapter's part in them.

    Key t has for the rows of adapter i the value `V0[t] + Y_i[t] B_i` (LRAgent, arXiv 2602.01053; PReCache).

    Attributes:
      kv: K, and V0 = X W_v.
      low_rank: Y = X A of all adapters side by side, those of slot i from column `i * rank` on. Whoever computes a row
        writes it for all of them. It has the pages of `kv` and no heads: each device of a mesh has all of it.
    """

    kv: Store
    low_rank: LowRankStore

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.low_rank.nbytes


AnyStore = Store | SharedStore


def kv_of(store: AnyStore) -> Store:
    """The store of keys and values alone."""
    return store.kv if isinstance(store, SharedStore) else store


def abstract_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape `[layers, pages, 2, kv_heads, page_size, head_dim]`, each device holding its heads only.

    Where there are more devices than heads, each holds a copy of one, and copies count as heads.
    """
    heads = on_mesh(model, mesh).num_kv_heads
    shape = (model.num_layers, engine.num_pages, 2, heads, engine.page_size, model.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(engine.store_dtype), sharding=sharding(mesh, STORE_AXES, shape))


def abstract_low_rank_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape `[layers, pages, page_size, adapters * rank]`, whole on each device."""
    width = engine.max_adapters * engine.max_adapter_rank
    shape = (model.num_layers, engine.num_pages, engine.page_size, width)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(engine.dtype), sharding=NamedSharding(mesh, PartitionSpec()))


def abstract_any_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Any:
    """The shapes of an engine's `AnyStore`."""
    kv = abstract_store(model, engine, mesh)
    return SharedStore(kv, abstract_low_rank_store(model, engine, mesh)) if engine.share_adapters else kv  # type: ignore[arg-type]


def make_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> AnyStore:
    """A store of zeros."""
    made: AnyStore = zeros_of(abstract_any_store(model, engine, mesh))
    return made


def check_range(params: Params, engine: EngineConfig) -> None:
    """Raise InvalidRequestError if a model's keys are beyond what the store holds, by their biases alone.

    A rotation can put all of a pair into one of its numbers. Keys with a norm of their own are small.
    """
    bias = params.layers.bk
    if engine.kv_dtype != "fp8" or bias is None or params.layers.k_norm is not None:
        return
    first, second = jnp.split(bias.astype(jnp.float32), 2, axis=-1)
    reach, most = float(jnp.hypot(first, second).max()), float(jnp.finfo(FLOAT8).max)
    require(
        reach <= most, f"kv_dtype='fp8' holds numbers up to {most:.0f}; biases put keys of this model to {reach:.0f}"
    )
