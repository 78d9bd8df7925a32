"""Engines for benches, and passes over them that compile nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.config import named_config
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.engine import Engine
from sparsex_jax.errors import UnknownModelError
from sparsex_jax.eval.arguments import count
from sparsex_jax.model.sharding import make_mesh

MAX_PASSES = 4  # one of these must compile nothing


def settled[Result](one_pass: Callable[[], Result], name: str) -> Result:
    """The result of the first pass that compiles nothing. Raises RuntimeError if none of `MAX_PASSES` does."""
    for _ in range(MAX_PASSES):
        before = num_compilations()
        result = one_pass()
        if num_compilations() == before:
            return result
    raise RuntimeError(f"{MAX_PASSES} passes of {name} all compiled something")


def add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    """The option of a bench, `--tensor-parallel N`, for `make_engine`, `make_mesh` and `results.provenance`."""
    text = "devices to split model and store over; a processor is one, or as many as JAX_NUM_CPU_DEVICES says"
    parser.add_argument("--tensor-parallel", type=count, default=1, metavar="N", help=text)


def make_engine(model: str, *, tensor_parallel: int = 1, **options: Any) -> Engine:
    """An engine of a checkpoint, or of a named configuration with random weights.

    Args:
      options: fields of `EngineConfig`.
    """
    make = Engine.from_config if _is_named(model) else Engine.from_pretrained
    return make(model, mesh=make_mesh(tensor_parallel), **options)


def load_engine(model: str, **options: Any) -> tuple[Engine, Any]:
    """As `make_engine`, and a tokenizer for its prompts: SmolLM2's for a named configuration. The prompts then mean
    nothing to the model, and ids that are not in its vocabulary have to be wrapped."""
    engine = make_engine(model, **options)
    return engine, open_checkpoint("smollm2-135m-instruct").tokenizer if _is_named(model) else engine.tokenizer


def _is_named(model: str) -> bool:
    try:
        named_config(model)
    except UnknownModelError:
        return False
    return True
