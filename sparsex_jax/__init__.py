"""SparseX in JAX: segment-level KV-cache reuse for LLM serving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.errors import (
    InvalidRequestError,
    NonFiniteLogitsError,
    OverloadedError,
    SparsexError,
    StoreFullError,
    UnknownHandleError,
    UnknownModelError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from sparsex_jax.device.generation import Generation, Prefill, TokenLogprobs
    from sparsex_jax.engine import Engine
    from sparsex_jax.reuse.report import Report

__all__ = [
    "Engine",
    "EngineConfig",
    "Generation",
    "InvalidRequestError",
    "ModelConfig",
    "NonFiniteLogitsError",
    "OverloadedError",
    "Prefill",
    "Report",
    "ReuseConfig",
    "SamplingParams",
    "SparsexError",
    "StoreFullError",
    "TokenLogprobs",
    "UnknownHandleError",
    "UnknownModelError",
    "UnsupportedModelError",
]

# What needs jax is imported when it is first asked for: configuration and the command line's help come at once.
_LAZY = {
    "Engine": "engine",
    "Generation": "device.generation",
    "Prefill": "device.generation",
    "Report": "reuse.report",
    "TokenLogprobs": "device.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
