"""Engines for benches."""

from __future__ import annotations

from typing import Any

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.config import named_config
from sparsex_jax.engine import Engine
from sparsex_jax.errors import UnknownModelError


def load_engine(model: str, **options: Any) -> tuple[Engine, Any]:
    """An engine, and a tokenizer for its prompts.

    A named configuration gets random weights, and SmolLM2's tokenizer. The prompts then mean nothing to the model, and
    ids that are not in its vocabulary have to be wrapped.

    Args:
      model: a checkpoint or a named configuration.
      options: fields of `EngineConfig`.
    """
    try:
        named_config(model)
    except UnknownModelError:
        engine = Engine.from_pretrained(model, **options)
        return engine, engine.tokenizer
    return Engine.from_config(model, **options), open_checkpoint("smollm2-135m-instruct").tokenizer
