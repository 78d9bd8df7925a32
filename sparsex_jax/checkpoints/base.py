"""What every checkpoint format offers, and what the formats that store each layer apart have in common."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError
from sparsex_jax.model.weights import Params, Weight, describe, leaf_name, place_params


class Checkpoint(abc.ABC):
    """An opened checkpoint. Opening reads the configuration; `tokenizer` and `load_params` read the rest."""

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
        """The parameters in `dtype`, placed on the mesh."""


def refuse_unread(where: Path, stored: Iterable[str], config: ModelConfig, names: Mapping[str, str]) -> None:
    """Refuse tensors that the model as configured would not read: without them it would compute something else.

    Args:
      where: the checkpoint, for the message.
      stored: the names of its tensors, without those that are read elsewhere.
      names: field of `Params` or `Layers` to the tensor's name, with the layer's number to be filled in.

    Raises:
      UnsupportedModelError: the message names the first few of them.
    """
    fields = [(leaf_name(path)[-1], weight) for path, weight in jax.tree.leaves_with_path(describe(config))]
    layers = range(config.num_layers)
    read = {names[name].format(layer) for name, weight in fields for layer in (layers if weight.stacked else [None])}
    unread = sorted(set(stored) - read)
    if unread:
        more = f" and {len(unread) - 4} more" if len(unread) > 4 else ""
        raise UnsupportedModelError(f"{where} has tensors that are not read: {', '.join(unread[:4])}{more}")


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
    """A view of a stored `[out, in]` matrix, bias or norm in our shape: inputs first, one axis for the heads.

    An `[in, out]` matrix of the same size is refused, unless it is square.
    """
    inputs = [math.prod(shape[:axes]) for axes in range(1, len(shape) + 1)]
    turned = stored.size == math.prod(shape) and stored.shape[-1] in inputs
    if not (stored.shape == shape if name == "embed" else turned):
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
