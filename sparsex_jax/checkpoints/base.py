"""What every checkpoint format offers, and what the formats that store each layer apart have in common."""

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
from sparsex_jax.model.weights import Params, Weight, place_params


class Checkpoint(abc.ABC):
    """An opened checkpoint. Opening reads the configuration; `tokenizer` and `load_params` read the rest."""

    config: ModelConfig

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Any | None:
        """A transformers `PreTrainedTokenizerFast`, built on first use, or None where the checkpoint has none."""

    @abc.abstractmethod
    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        """The parameters in `dtype`, placed on the mesh."""


def place_rows(config: ModelConfig, dtype: str, mesh: Mesh, read: Callable[[str, int | None], np.ndarray]) -> Params:
    """Place the weights of a checkpoint that keeps each layer apart and stores linear weights as `[out, in]`.

    Host memory holds one weight of all layers and one layer's array at a time.

    Args:
      read: gives the stored array of one layer's weight, such as `("wq", 3)`, or of a weight outside the layers,
        `("embed", None)`, with any float dtype.

    Raises:
      UnsupportedModelError: a stored array has another size than the configuration says.
    """

    def whole(name: str, weight: Weight) -> np.ndarray:
        if not weight.stacked:
            return _oriented(name, read(name, None), weight.shape)
        out = np.empty(weight.shape, jnp.dtype(dtype))
        for layer, part in enumerate(out):
            part[...] = _oriented(name, read(name, layer), part.shape)
        return out

    return place_params(config, dtype, mesh, whole)


def _oriented(name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A view of a stored `[out, in]` matrix, bias or norm in our shape: inputs first, one axis for the heads."""
    if stored.size != math.prod(shape):
        raise UnsupportedModelError(f"{name} is stored as {stored.shape}; the configuration needs {shape}")
    return stored if name == "embed" else stored.T.reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a checkpoint must have.

    Raises:
      UnknownModelError: there is no such file.
      UnsupportedModelError: the file holds no JSON object.
    """
    if not path.is_file():
        raise UnknownModelError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} holds no JSON object")
    return value
