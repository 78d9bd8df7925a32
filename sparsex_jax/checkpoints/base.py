"""What every checkpoint format offers, and what the formats that store each layer apart have in common."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sparsex_jax.checkpoints.placing import stored_axes
from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.model.weights import Params, Weight, describe, leaf_name

_PADDING = 256  # rows of an embedding


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

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The fields of `SamplingParams` that the checkpoint recommends.

        Raises:
          UnsupportedModelError: one has a value that is outside its limits.
        """
        return {}

    @abc.abstractmethod
    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        """The parameters in `dtype`, placed on the mesh."""


def check_vocabulary(where: Path, tokenizer: Any | None, config: ModelConfig) -> None:
    """Refuse a tokenizer that is not the model's. Embeddings may have some more rows than there are tokens, as padding.

    Raises:
      UnsupportedModelError: there are tokens without a row, or more than `_PADDING` rows beyond twice the tokens.
    """
    if tokenizer is None:
        return
    size, rows = max(tokenizer.get_vocab().values(), default=-1) + 1, config.vocab_size
    if not size <= rows <= 2 * size + _PADDING:
        raise UnsupportedModelError(
            f"{where}: the tokenizer has token ids up to {size - 1}, and the embedding {rows} rows; they do not belong "
            "together"
        )


def refuse_unread(where: Path, stored: Collection[str], config: ModelConfig, names: Mapping[str, str]) -> None:
    """Refuse tensors that the model as configured would not read: without them it would compute something else.

    Args:
      where: the checkpoint, for the message.
      stored: the names of its tensors, without those that are read elsewhere.
      names: field of `Params` or `Layers` to the tensor's name, with the layer's number to be filled in.

    Raises:
      UnsupportedModelError: the message names the first few of them.
    """
    layers = min(config.num_layers, len(stored))  # a configuration may claim billions
    unread = sorted(set(stored) - {tensor for tensor, _ in _needed(config, layers, names)})
    if unread:
        more = f" and {len(unread) - 4} more" if len(unread) > 4 else ""
        raise UnsupportedModelError(f"{where} has tensors that are not read: {', '.join(unread[:4])}{more}")


def check_shapes(
    where: Path, stored: Mapping[str, tuple[int, ...]], config: ModelConfig, names: Mapping[str, str]
) -> None:
    """Compare what a checkpoint stores, each layer apart and linear weights as `[out, in]`, with what the model reads.

    Args:
      where, names: as for `refuse_unread`.
      stored: the shapes of its tensors by name.

    Raises:
      UnsupportedModelError: a tensor is missing or has another shape.
    """
    for tensor, shape in _needed(config, config.num_layers, names):
        if tensor not in stored:
            raise UnsupportedModelError(f"{where} has no tensor {tensor!r}")
        if stored[tensor] != shape:
            raise UnsupportedModelError(
                f"{where}: {tensor} is stored as {stored[tensor]}; the configuration needs {shape}"
            )


def _needed(config: ModelConfig, layers: int, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each tensor that the model reads of its first layers and outside of them, with its shape as stored."""
    for path, weight in jax.tree.leaves_with_path(describe(config)):
        name = leaf_name(path)[-1]
        for layer in range(layers) if weight.stacked else (None,):
            yield names[name].format(layer), _stored_shape(name, weight)


def _stored_shape(name: str, weight: Weight) -> tuple[int, ...]:
    """`[vocab, embed]` of the embedding, `[out, in]` of a linear weight, `[out]` of a bias or the scale of a norm."""
    sizes, axes = dict(zip(weight.axes, weight.shape, strict=True)), stored_axes(name, weight)
    if name == "embed":
        return tuple(sizes[axis] for axis in axes)
    outputs = math.prod(sizes[axis] for axis in axes if axis not in weight.input_axes)
    inputs = math.prod(sizes[axis] for axis in weight.input_axes)
    return (outputs, inputs) if weight.input_axes else (outputs,)
