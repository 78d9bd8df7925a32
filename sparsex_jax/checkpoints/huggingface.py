"""Hugging Face directories: `config.json` and `*.safetensors`, in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint, check_shapes, check_vocabulary, refuse_unread
from sparsex_jax.checkpoints.placing import place_rows
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json, require_content
from sparsex_jax.config.generation import GENERATION_CONFIG, read_generation_config
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError
from sparsex_jax.model.weights import Params
from sparsex_jax.text.tokenizer import read_tokenizer

_INDEX = "model.safetensors.index.json"
_TABLES = "rotary_emb.inv_freq"  # old files have it, and it follows from the configuration

# Field of `Params` or `Layers` -> the tensor's name, with the layer's number to be filled in.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "wq": "model.layers.{}.self_attn.q_proj.weight",
    "wk": "model.layers.{}.self_attn.k_proj.weight",
    "wv": "model.layers.{}.self_attn.v_proj.weight",
    "wo": "model.layers.{}.self_attn.o_proj.weight",
    "bq": "model.layers.{}.self_attn.q_proj.bias",
    "bk": "model.layers.{}.self_attn.k_proj.bias",
    "bv": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "w_up": "model.layers.{}.mlp.up_proj.weight",
    "w_down": "model.layers.{}.mlp.down_proj.weight",
}


# The names that safetensors gives to floats.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Files and fields of quantised weights, whose scales or packing nothing here reads.
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTISED_FIELDS = ("quantization_config", "compression_config")
_ADAPTER = "adapter_config.json"
_ROWS_AT_ONCE = 4096  # of the embeddings, when they are compared with the head
_SINGLE = "model.safetensors"
# What is read of a model beside its weights and its tokenizer.
READ_FILES = ("config.json", GENERATION_CONFIG, _INDEX, _ADAPTER, *_QUANTISED_FILES)


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as transformers saves it.

    Raises:
      UnknownModelError: a file is missing, such as a shard that the index names.
      UnsupportedModelError: the model is of another family, its weights are quantised, fields or tensors are missing or
        wrong, or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "config.json"
        raw = read_json(path)
        _refuse_adapter(directory)
        _refuse_quantised(directory, raw)
        config = ModelConfig.from_hf(raw, str(path))
        self._open = functools.cache(_open_safetensors)  # so each file's header is parsed once, not for every tensor
        self._files = _weight_files(directory, self._open)
        self._shapes = self._read_shapes()
        if config.tied_embeddings and not self._has_own_head():
            self._shapes.pop(TENSORS["lm_head"], None)  # a copy of the embeddings
        else:
            config = dataclasses.replace(config, tied_embeddings=False)
        self.config = dataclasses.replace(config, eos_token_ids=_eos_token_ids(config, directory))
        refuse_unread(directory, self._shapes.keys(), self.config, TENSORS)

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the stored tensors but rotary tables, which say nothing new."""
        files = {name: file for name, file in self._files.items() if not name.endswith(_TABLES)}
        return {name: _float_shape(self._open(file), file, name) for name, file in files.items()}

    def _has_own_head(self) -> bool:
        """Whether a head is stored that differs from the embeddings: then it counts, whatever the configuration says of
        ties. Fine-tunes often keep the configuration of their base model."""
        tensors = [TENSORS[name] for name in ("embed", "lm_head")]
        if not all(tensor in self._files for tensor in tensors):
            return False
        embed, head = (self._open(self._files[tensor]).get_slice(tensor) for tensor in tensors)
        shape = embed.get_shape()
        if shape != head.get_shape() or not shape:
            return True
        starts = range(0, shape[0], _ROWS_AT_ONCE)
        parts = (slice(start, min(start + _ROWS_AT_ONCE, shape[0])) for start in starts)
        return any(not np.array_equal(embed[part], head[part]) for part in parts)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        found = read_tokenizer(self.directory)
        check_vocabulary(self.directory, found, self.config)
        return found

    @property
    def dtype(self) -> str | None:
        """That of the embedding, as transformers stores all tensors alike; None where there is no such tensor."""
        name = TENSORS["embed"]
        if name not in self._files:
            return None
        return _DTYPES.get(self._open(self._files[name]).get_slice(name).get_dtype())

    @property
    def sampling(self) -> Mapping[str, Any]:
        return read_generation_config(self.directory)

    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        check_shapes(self.directory, self._shapes, self.config, TENSORS)

        def read(name: str, layer: int | None) -> np.ndarray:
            tensor = TENSORS[name].format(layer)
            return self._open(self._files[tensor]).get_tensor(tensor)

        return place_rows(self.config, dtype, mesh, read)


def _refuse_adapter(directory: Path) -> None:
    """transformers would add the adapter to the weights beside it."""
    if (directory / _ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{directory} holds an adapter ({_ADAPTER}), which is not read; merge it into the weights"
        )


def _refuse_quantised(directory: Path, raw: Mapping[str, Any]) -> None:
    signs = [name for name in _QUANTISED_FIELDS if raw.get(name) is not None]
    signs += [name for name in _QUANTISED_FILES if (directory / name).is_file()]
    if signs:
        raise UnsupportedModelError(f"{directory} holds quantised weights ({signs[0]}); they are not read")


def _float_shape(opened: Any, file: Path, name: str) -> tuple[int, ...]:
    """A tensor's shape. Raises UnsupportedModelError if its elements are no plain floats, as of quantised weights."""
    stored = opened.get_slice(name)
    if stored.get_dtype() not in (*_DTYPES, "F64"):
        raise UnsupportedModelError(f"{file}: {name} has elements of type {stored.get_dtype()}; they are not read")
    return tuple(stored.get_shape())


def _eos_token_ids(config: ModelConfig, directory: Path) -> tuple[int, ...]:
    """The end tokens of both configurations: often only `generation_config.json` lists the token that ends a turn."""
    path = directory / "generation_config.json"
    more = Fields(str(path), read_json(path)).token_ids("eos_token_id") if path.is_file() else ()
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _weight_files(directory: Path, opened: Callable[[Path], Any]) -> dict[str, Path]:
    """Tensor -> its file.

    Raises:
      UnknownModelError: there are no weights, or a file that the index names is missing.
      UnsupportedModelError: two files have a tensor of the same name, or a tensor is not where the index says.
    """
    listed = weight_files(directory, [file.name for file in directory.iterdir() if file.is_file()])
    missing = [name for name in listed if not (directory / name).is_file()]
    if missing:
        raise UnknownModelError(f"{directory} has no {', '.join(missing)}, which {_INDEX} names")
    files: dict[str, Path] = {}
    for file in map(directory.joinpath, listed):
        for name in opened(file).keys():  # noqa: SIM118 (it is no dictionary)
            _require_one(name, files.setdefault(name, file), file)
    for name, said in _read_index(directory).items():
        if files.get(name) != directory / said:
            raise UnsupportedModelError(f"{directory / _INDEX}: {name} is not in {said}")
    return files


def weight_files(directory: Path, present: Collection[str]) -> list[str]:
    """The names of the files that hold the weights: those that the index names, else `model.safetensors`, else all.

    Args:
      directory: has the index, if there is one.
      present: the files that there are, which need not be in the directory yet.

    Raises:
      UnknownModelError: there are no weights.
      UnsupportedModelError: the index is damaged, or does not name `model.safetensors`, which is there too.
    """
    named = sorted(set(_read_index(directory).values()))
    if named and _SINGLE in present and _SINGLE not in named:
        raise UnsupportedModelError(
            f"{directory} has {_SINGLE}, and {_INDEX} names other files; nothing says which are the model's weights"
        )
    every = sorted(name for name in present if name.endswith(".safetensors"))
    listed = named or ([_SINGLE] if _SINGLE in present else every)
    if not listed:
        raise UnknownModelError(f"{directory} has no {_SINGLE} and no {_INDEX}")
    return listed


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor -> the name of the file that the index names for it; empty without an index."""
    path = directory / _INDEX
    if not path.is_file():
        return {}
    named = Fields(str(path), read_json(path)).object("weight_map").values
    if not named:
        raise UnsupportedModelError(f"{path} has no weight_map, which is needed")
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UnsupportedModelError(f"{path}: weight_map says {file!r} of {name}, which is no file's name")
    return dict(named)


def _require_one(tensor: str, first: Path, file: Path) -> None:
    if first != file:
        raise UnsupportedModelError(f"{first.name} and {file.name} in {file.parent} both have the tensor {tensor}")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    require_content(path)
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error
