"""What every checkpoint format offers, and what those that store each layer apart have in common."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError
from sparsex_jax.model.weights import Params, describe, place_params


class Checkpoint(abc.ABC):
    """An opened checkpoint. Opening reads the configuration; tokenizer and weights are read when asked for."""

    config: ModelConfig

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Any | None:
        """A transformers `PreTrainedTokenizerFast`, built on first use, or None where the checkpoint has none."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str | None:
        """The dtype of the stored matrices, such as `bfloat16`; None where they are quantised or not of one dtype."""

    @abc.abstractmethod
    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        """The parameter pytree of `weights.describe(config)` in `dtype`, placed on the mesh."""


def place_rows(config: ModelConfig, dtype: str, mesh: Mesh, read: Callable[[str, int | None], np.ndarray]) -> Params:
    """Place the weights of a checkpoint that keeps each layer apart and stores linear ones as `[out, in]`.

    Host memory stays at one layer's array and one stacked leaf.

    Args:
      read: gives the stored array of a leaf of one layer, such as `("wq", 3)`, or of none, `("embed", None)`;
        any float dtype.

    Raises:
      UnsupportedModelError: a stored array has another size than the configuration says.
    """
    shapes = describe(config)

    def leaf(path: str) -> np.ndarray:
        name = path.removeprefix("layers/")
        if name == path:
            return _oriented(name, read(name, None), shapes[name].shape)
        stacked = np.empty(shapes["layers"][name].shape, jnp.dtype(dtype))
        for layer, out in enumerate(stacked):
            out[...] = _oriented(name, read(name, layer), out.shape)
        return stacked

    return place_params(config, dtype, mesh, leaf)


def _oriented(name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A view of a stored `[out, in]` matrix, bias or norm in our shape: inputs first, heads apart."""
    if stored.size != math.prod(shape):
        raise UnsupportedModelError(f"{name} is stored as {stored.shape}; the configuration needs {shape}")
    return stored if name == "embed" else stored.T.reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a checkpoint cannot be without."""
    if not path.is_file():
        raise UnknownModelError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} holds no JSON object")
    return value
