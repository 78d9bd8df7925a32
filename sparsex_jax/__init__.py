"""SparseX in JAX: segment-level KV-cache reuse for LLM serving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsex_jax.config import (
    Behind,
    EngineConfig,
    Lazy,
    ModelConfig,
    Pin,
    ReuseConfig,
    Round,
    SamplingParams,
    Structure,
)
from sparsex_jax.errors import (
    AdapterInUseError,
    ContextLengthError,
    FrozenLimitError,
    GroupError,
    HubError,
    InvalidRequestError,
    NonFiniteLogitsError,
    NoRoomError,
    OverloadedError,
    SparsexError,
    StoreFullError,
    StructureError,
    UnknownAdapterError,
    UnknownHandleError,
    UnknownModelError,
    UnknownPinError,
    UnsupportedModelError,
)

# This also registers the methods under their names. None of it imports jax.
from sparsex_jax.reuse.methods import (
    CacheBlend,
    Epic,
    Excerpts,
    Focus,
    Full,
    Naive,
    Oracle,
    Prefix,
    ProphetKV,
    QCFuse,
    Random,
    SparseX,
)
from sparsex_jax.text.chat import Chat

if TYPE_CHECKING:
    from sparsex_jax.cache import PinState
    from sparsex_jax.engine import Engine
    from sparsex_jax.reuse.report import Report, RoundShare
    from sparsex_jax.scheduler.adapters import Adapter
    from sparsex_jax.scheduler.output import Generation, Prefill, TokenLogprobs
    from sparsex_jax.scheduler.pinning import PinRefused

__all__ = [
    "Adapter",
    "AdapterInUseError",
    "Behind",
    "CacheBlend",
    "Chat",
    "ContextLengthError",
    "Engine",
    "EngineConfig",
    "Epic",
    "Excerpts",
    "Focus",
    "FrozenLimitError",
    "Full",
    "Generation",
    "GroupError",
    "HubError",
    "InvalidRequestError",
    "Lazy",
    "ModelConfig",
    "Naive",
    "NoRoomError",
    "NonFiniteLogitsError",
    "Oracle",
    "OverloadedError",
    "Pin",
    "PinRefused",
    "PinState",
    "Prefill",
    "Prefix",
    "ProphetKV",
    "QCFuse",
    "Random",
    "Report",
    "ReuseConfig",
    "Round",
    "RoundShare",
    "SamplingParams",
    "SparseX",
    "SparsexError",
    "StoreFullError",
    "Structure",
    "StructureError",
    "TokenLogprobs",
    "UnknownAdapterError",
    "UnknownHandleError",
    "UnknownModelError",
    "UnknownPinError",
    "UnsupportedModelError",
]

# What needs jax is imported when it is first used, so that configuration and the command line's help come at once.
_LAZY = {
    "Adapter": "scheduler.adapters",
    "Engine": "engine",
    "Generation": "scheduler.output",
    "PinRefused": "scheduler.pinning",
    "PinState": "cache",
    "Prefill": "scheduler.output",
    "Report": "reuse.report",
    "RoundShare": "reuse.report",
    "TokenLogprobs": "scheduler.output",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
