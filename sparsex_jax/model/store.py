"""The paged KV store on the devices: one array of all layers, split over KV heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.config.checks import require
from sparsex_jax.model.sharding import sharding
from sparsex_jax.model.weights import Params
from sparsex_kernels.layout import FLOAT8, Store

STORE_AXES = ("layers", "pages", "kv", "kv_heads", "slots", "head_dim")


def abstract_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape `[layers, pages, 2, kv_heads, page_size, head_dim]`, each device holding its heads only."""
    shape = (model.num_layers, engine.num_pages, 2, model.num_kv_heads, engine.page_size, model.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(engine.store_dtype), sharding=sharding(mesh, STORE_AXES, shape))


def make_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Store:
    """A store of zeros."""
    like = abstract_store(model, engine, mesh)
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


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
