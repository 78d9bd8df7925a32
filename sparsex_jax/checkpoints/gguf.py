"""GGUF checkpoints: llama.cpp's format, with the tokenizer in the metadata and weights that may be quantised."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint, check_shapes, check_vocabulary, refuse_unread
from sparsex_jax.checkpoints.gguf_file import GGUFModel
from sparsex_jax.checkpoints.placing import place_rows
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.generation import checked_sampling
from sparsex_jax.config.rotary import DEFAULT_THETA, linear_factors
from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.model.weights import Params
from sparsex_jax.text.tokenizer import tokenizer_from_gguf

_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama

# Field of `Params` or `Layers` -> the tensor's name, with the layer's number to be filled in.
TENSORS = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "bq": "blk.{}.attn_q.bias",
    "bk": "blk.{}.attn_k.bias",
    "bv": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
}

_ROTARY = "rope_freqs.weight"

# Fields of `SamplingParams` -> what llama.cpp calls them.
_SAMPLING = {
    **{name: f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p")},
    "temperature": "general.sampling.temp",
    "repetition_penalty": "general.sampling.penalty_repeat",
}

_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # ggml's numbers of the encodings that are not quantised


class GGUFCheckpoint(Checkpoint):
    """A Llama, Mistral, Qwen2 or Qwen3 model in a `.gguf` file, or in parts of which any may be named.

    Raises:
      UnknownModelError: a part is missing.
      UnsupportedModelError: another architecture, experts, a rotary scaling that is not implemented, fields or tensors
        that are missing or wrong, or a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFModel(path)
        self.config = _model_config(self._file)
        # The configuration has the rotary divisors. For the other architectures llama.cpp does not read them.
        elsewhere = {_ROTARY} if self._file.metadata["general.architecture"] == "llama" else set()
        refuse_unread(path, self._file.tensors.keys() - elsewhere, self.config, TENSORS)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        found = tokenizer_from_gguf(self._file.metadata)
        check_vocabulary(self._file.path, found, self.config)
        return found

    @property
    def dtype(self) -> str | None:
        encodings = {tensor.encoding for tensor in self._file.tensors.values() if len(tensor.shape) == 2}
        return _FLOATS.get(encodings.pop()) if len(encodings) == 1 else None

    @property
    def sampling(self) -> Mapping[str, Any]:
        metadata = self._file.metadata
        found = {name: metadata[key] for name, key in _SAMPLING.items() if metadata.get(key) is not None}
        return checked_sampling(str(self._file.path), found)

    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        config = self.config
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        check_shapes(self._file.path, shapes, config, TENSORS)
        # For the architecture llama, llama.cpp interleaves the two halves of every rotated head; for Qwen it does not.
        permuted = self._file.metadata["general.architecture"] == "llama"
        heads = {
            "wq": config.num_q_heads,
            "bq": config.num_q_heads,
            "wk": config.num_kv_heads,
            "bk": config.num_kv_heads,
        }

        def read(name: str, layer: int | None) -> np.ndarray:
            stored = self._file.read(TENSORS[name].format(layer))
            return unpermute(stored, heads[name]) if permuted and name in heads else stored

        return place_rows(config, dtype, mesh, read)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Q or K rows from llama.cpp's order to ours.

    Its rotation turns neighbours, ours turns elements half a head apart. One head of 6 rows, by the place in our order:

    stored     0 3 1 4 2 5
    returned   0 1 2 3 4 5

    Args:
      rows: a weight `[heads * head_dim, in]` or a bias `[heads * head_dim]`.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _model_config(file: GGUFModel) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"general.architecture={architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    fields = _fields(architecture, file)
    if fields.get("expert_count"):
        fields.refuse("expert_count", "is not supported: mixtures of experts")
    if not fields.flag("attention.causal", True):
        fields.refuse("attention.causal", "is not supported: this decoder attends to earlier tokens only")
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", max(1, hidden // heads))
    length = fields.count("context_length")
    # Up to its window, a sliding-window model attends to every token, as this decoder does; beyond, it does not.
    window = fields.count("attention.sliding_window") if fields.get("attention.sliding_window") else length
    return ModelConfig(
        vocab_size=_vocabulary_size(file),
        hidden_size=hidden,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=fields.count("block_count"),
        num_q_heads=heads,
        num_kv_heads=fields.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=min(length, window),
        rope_theta=fields.number("rope.freq_base", DEFAULT_THETA),
        rope_factors=_rope_factors(fields, head_dim, file),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        tied_embeddings="output.weight" not in file.tensors,
        eos_token_ids=_eos_token_ids(file.metadata),
    )


def _fields(architecture: str, file: GGUFModel) -> Fields:
    """The architecture's fields. One that is given for each layer counts as one value where all layers agree."""
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    layers = values.get("block_count")
    alike = {key: value[0] for key, value in values.items() if _is_alike(value, layers)}
    return Fields(str(file.path), values | alike)


def _is_alike(value: Any, layers: Any) -> bool:
    return isinstance(value, list) and bool(value) and len(value) == layers and all(each == value[0] for each in value)


def _vocabulary_size(file: GGUFModel) -> int:
    tensor = file.tensors.get(TENSORS["embed"])
    if tensor is None:
        raise UnsupportedModelError(f"{file.path} has no tensor {TENSORS['embed']!r}")
    return tensor.shape[0]


def _rope_factors(fields: Fields, head_dim: int, file: GGUFModel) -> tuple[float, ...] | None:
    """The divisor of each rotary frequency: stored in the file (Llama 3), of a linear scaling, or of both together."""
    if fields.get("rope.dimension_count", head_dim) != head_dim:
        fields.refuse("rope.dimension_count", f"must be head_dim={head_dim}: partial rotation is not supported")
    stored, scaled = _stored_factors(file), _scaled_factors(fields, head_dim)
    if stored is None or scaled is None or len(stored) != len(scaled):
        return scaled if stored is None else stored  # of which the configuration sees a wrong number
    return tuple(one * other for one, other in zip(stored, scaled, strict=True))


def _stored_factors(file: GGUFModel) -> tuple[float, ...] | None:
    return tuple(file.read(_ROTARY).ravel().astype(float).tolist()) if _ROTARY in file.tensors else None


# Fields of a scaling that say nothing new where it is linear or none; the others belong to scalings that are refused.
_SILENT_SCALING = ("type", "factor", "original_context_length", "finetuned")


def _scaled_factors(fields: Fields, head_dim: int) -> tuple[float, ...] | None:
    """Those of a linear scaling. Old files name a factor and no type, or the factor by its old name: both are linear,
    as llama.cpp reads them."""
    names = ("rope.scaling.factor", "rope.scale_linear")
    factors = {name: fields.number(name) for name in names if fields.get(name) is not None}
    if len(set(factors.values())) > 1:
        fields.refuse("rope.scaling.factor", f"differs from rope.scale_linear={factors['rope.scale_linear']}")
    kind = fields.get("rope.scaling.type") or ("linear" if factors else "none")
    if kind not in ("none", "linear"):
        fields.refuse("rope.scaling.type", "is not supported; supported: none, linear")
    _refuse_scaling_fields(fields)
    if kind == "none":
        return None
    if not factors:
        fields.refuse("rope.scaling.type", "has no rope.scaling.factor beside it")
    return linear_factors(next(iter(factors.values())), head_dim)


def _refuse_scaling_fields(fields: Fields) -> None:
    for name, value in fields.values.items():
        scaling = name.removeprefix("rope.scaling.")
        if scaling == name or scaling in _SILENT_SCALING or (scaling == "attn_factor" and value == 1):
            continue
        fields.refuse(name, "is not supported")


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    fields = Fields("tokenizer.ggml", metadata)
    ids = (id_ for name in ("eos", "eot", "eom") for id_ in fields.token_ids(f"tokenizer.ggml.{name}_token_id"))
    return tuple(dict.fromkeys(ids))
