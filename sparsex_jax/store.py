"""The paged KV store on the devices: one array of all layers, split over KV heads."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.sharding import sharding
from sparsex_kernels.layout import Store

STORE_AXES = ("layers", "pages", "kv", "kv_heads", "slots", "head_dim")


def make_store(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Store:
    """A store `[layers, pages, 2, kv_heads, page_size, head_dim]` of zeros, each device holding its heads only."""
    shape = (model.num_layers, engine.num_pages, 2, model.num_kv_heads, engine.page_size, model.head_dim)
    return jnp.zeros(shape, engine.dtype, device=sharding(mesh, STORE_AXES, shape))
