"""Hugging Face directories: `config.json` and `*.safetensors`, in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint, place_rows, read_json, refuse_unread
from sparsex_jax.config import ModelConfig
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


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as transformers saves it.

    Raises:
      UnknownModelError: a file is missing, such as a shard that the index names.
      UnsupportedModelError: the model is of another family, its weights are quantised, or a file is unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = read_json(directory / "config.json")
        if raw.get("quantization_config"):
            raise UnsupportedModelError(f"{directory} holds quantised weights (quantization_config); they are not read")
        config = ModelConfig.from_hf(raw)
        self._files = _weight_files(directory)
        self.config = dataclasses.replace(
            config,
            eos_token_ids=_eos_token_ids(config, directory),
            tied_embeddings=config.tied_embeddings and not self._has_own_head(),
        )
        refuse_unread(directory, self._to_read(), self.config, TENSORS)

    def _has_own_head(self) -> bool:
        """Whether a head is stored that differs from the embeddings: then it counts, whatever the configuration says of
        ties. Fine-tunes often keep the configuration of their base model."""
        tensors = [TENSORS[name] for name in ("embed", "lm_head")]
        if not all(tensor in self._files for tensor in tensors):
            return False
        embed, head = (_open_safetensors(self._files[tensor]).get_tensor(tensor) for tensor in tensors)
        return not np.array_equal(embed, head)

    def _to_read(self) -> list[str]:
        """The stored tensors but those that say nothing new: rotary tables, and a copy of tied embeddings."""
        copies = [TENSORS["lm_head"]] if self.config.tied_embeddings else []
        return [name for name in self._files if not name.endswith(_TABLES) and name not in copies]

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.directory)

    @property
    def dtype(self) -> str | None:
        """That of the embedding, as transformers stores all tensors alike; None where there is no such tensor."""
        name = TENSORS["embed"]
        if name not in self._files:
            return None
        return _DTYPES.get(_open_safetensors(self._files[name]).get_slice(name).get_dtype())

    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        opened = functools.cache(_open_safetensors)  # so each shard's header is parsed once, not for every tensor

        def read(name: str, layer: int | None) -> np.ndarray:
            tensor = TENSORS[name].format(layer)
            if tensor not in self._files:
                raise UnsupportedModelError(f"{self.directory} has no tensor {tensor!r}")
            return opened(self._files[tensor]).get_tensor(tensor)

        return place_rows(self.config, dtype, mesh, read)


def _eos_token_ids(config: ModelConfig, directory: Path) -> tuple[int, ...]:
    """The end tokens of both configurations: often only `generation_config.json` lists the token that ends a turn."""
    path = directory / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor -> its file: by the index where there is one, else of `model.safetensors`, else of all files.

    Raises:
      UnknownModelError: there are no weights, or a file that the index names is missing.
      UnsupportedModelError: two files have a tensor of the same name, and nothing says which one counts.
    """
    files: dict[str, Path] = {}
    if (directory / _INDEX).is_file():
        files = {name: directory / file for name, file in read_json(directory / _INDEX)["weight_map"].items()}
    else:
        single = directory / "model.safetensors"
        for file in [single] if single.is_file() else sorted(directory.glob("*.safetensors")):
            for name in _open_safetensors(file).keys():  # noqa: SIM118 (it is no dictionary)
                _require_one(name, files.setdefault(name, file), file)
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise UnknownModelError(f"{directory} has no {', '.join(missing)}, which {_INDEX} names")
    if not files:
        raise UnknownModelError(f"{directory} has no model.safetensors and no {_INDEX}")
    return files


def _require_one(tensor: str, first: Path, file: Path) -> None:
    if first != file:
        raise UnsupportedModelError(f"{first.name} and {file.name} in {file.parent} both have the tensor {tensor}")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error
