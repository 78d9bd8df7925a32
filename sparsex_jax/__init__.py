"""SparseX in JAX: segment-level KV-cache reuse for LLM serving."""

from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.errors import (
    InvalidRequestError,
    SparsexError,
    StoreFullError,
    UnknownHandleError,
    UnknownModelError,
    UnsupportedModelError,
)
from sparsex_jax.generation import Generation, Prefill
from sparsex_jax.report import Report

__all__ = [
    "Engine",
    "EngineConfig",
    "Generation",
    "InvalidRequestError",
    "ModelConfig",
    "Prefill",
    "Report",
    "ReuseConfig",
    "SamplingParams",
    "SparsexError",
    "StoreFullError",
    "UnknownHandleError",
    "UnknownModelError",
    "UnsupportedModelError",
]
