"""What every checkpoint format offers, and what the formats that store each layer apart have in common."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
    def in_numbers(self) -> bool:
        """Whether matrices are stored as numbers of 8 bits, fp8 or int8, which products can read as they are."""
        return False

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The fields of `SamplingParams` that the checkpoint recommends.

        Raises:
          UnsupportedModelError: one has a value that is outside its limits.
        """
        return {}

    @abc.abstractmethod
    def load_params(self, dtype: str, mesh: Mesh, quantization: str = "none") -> Params:
        """The parameters in `dtype`, placed on the mesh.

        Args:
          quantization: as `EngineConfig.quantization`, without `auto`.
        """


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
      names: field of `Params` or `Layers` to the tensor's name, with the layer's number to be filled in, and behind it
        the expert's where each expert has a tensor of its own. Fields with the same name lie in one tensor, one behind
        another in the order of these entries.

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
    for tensor, fields in _by_tensor(config, names).items():
        shapes = [stored_shape(name, weight) for name, weight in fields.items()]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if has_experts_apart(tensor):
            experts, shape = range(shape[0]), shape[1:]
        else:
            experts = range(1)
        for layer in range(layers) if all(weight.stacked for weight in fields.values()) else (None,):
            yield from ((tensor.format(layer, expert), shape) for expert in experts)


def has_experts_apart(name: str) -> bool:
    """Whether the name of a tensor has places for the numbers of a layer and an expert."""
    return name.count("{}") == 2


def _by_tensor(config: ModelConfig, names: Mapping[str, str]) -> dict[str, dict[str, Weight]]:
    """The weights of the model in each tensor, in their order there."""
    weights = {leaf_name(path)[-1]: weight for path, weight in jax.tree.leaves_with_path(describe(config))}
    tensors: dict[str, dict[str, Weight]] = {}
    for name, tensor in names.items():
        if name in weights:
            tensors.setdefault(tensor, {})[name] = weights[name]
    return tensors


def rows_within(config: ModelConfig, names: Mapping[str, str]) -> dict[str, slice]:
    """Which rows of its stored tensor each weight has, by the field's name."""
    rows: dict[str, slice] = {}
    for fields in _by_tensor(config, names).values():
        sizes = [stored_shape(name, weight)[0] for name, weight in fields.items()]
        ends = np.cumsum(sizes).tolist()
        rows |= {name: slice(end - size, end) for name, size, end in zip(fields, sizes, ends, strict=True)}
    return rows


def spread_rotary(name: str, stored: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Queries' or keys' rows in this package's order, where a checkpoint rotates the first dimensions of a head alone.

    Rotation turns pairs that are half a head apart. So the second half of what is rotated moves to the head's second
    half, and what stood there moves up. One head of 8 rows of which 4 are rotated, by the place in the stored order:

    stored     0 1 2 3 4 5 6 7     pairs (0, 2) and (1, 3)
    returned   0 1 4 5 2 3 6 7

    Args:
      name: the field of `Layers`. Others than those of queries and keys are given back as they are.
      stored: `[heads * head_dim, in]`, `[heads * head_dim]`, or `[head_dim]` of a norm.
    """
    if name not in ("wq", "wk", "bq", "bk", "q_norm", "k_norm"):
        return stored
    half, pairs = config.head_dim // 2, config.num_rotated_pairs
    order = np.arange(config.head_dim)
    first, second, rest = order[:pairs], order[pairs : 2 * pairs], order[2 * pairs :]
    order = np.concatenate([first, rest[: half - pairs], second, rest[half - pairs :]])
    heads = stored.reshape(-1, config.head_dim, *stored.shape[1:])
    return heads[:, order].reshape(stored.shape)


def stored_shape(name: str, weight: Weight) -> tuple[int, ...]:
    """`[vocab, embed]` of the embedding, `[out, in]` of a linear weight, `[out]` of a bias or the scale of a norm,
    `[experts, out, in]` of all experts."""
    sizes, axes = dict(zip(weight.axes, weight.shape, strict=True)), stored_axes(name, weight)
    if name == "embed":
        return tuple(sizes[axis] for axis in axes)
    experts = (sizes["experts"],) if weight.of_experts else ()
    outputs = math.prod(sizes[axis] for axis in axes[len(experts) :] if axis not in weight.input_axes)
    inputs = math.prod(sizes[axis] for axis in weight.input_axes)
    return (*experts, outputs, inputs) if weight.input_axes else (outputs,)
