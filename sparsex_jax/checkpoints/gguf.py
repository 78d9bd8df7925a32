"""GGUF checkpoints: llama.cpp's format, with the tokenizer in the metadata and weights that may be quantised."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import (
    Checkpoint,
    check_shapes,
    check_vocabulary,
    refuse_unread,
    rows_within,
    spread_rotary,
)
from sparsex_jax.checkpoints.gguf_blocks import is_held, take_apart
from sparsex_jax.checkpoints.gguf_config import LONG_FACTORS, ROTARY, SHORT_FACTORS, read_config
from sparsex_jax.checkpoints.gguf_file import GGUFModel
from sparsex_jax.checkpoints.held import Stored, choose_held
from sparsex_jax.checkpoints.placing import place_rows
from sparsex_jax.config.generation import checked_sampling
from sparsex_jax.model.weights import Params
from sparsex_jax.text.tokenizer import tokenizer_from_gguf

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
    "wide_q_norm": "blk.{}.attn_q_norm.weight",
    "wide_k_norm": "blk.{}.attn_k_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
    "router": "blk.{}.ffn_gate_inp.weight",
    "expert_gate": "blk.{}.ffn_gate_exps.weight",
    "expert_up": "blk.{}.ffn_up_exps.weight",
    "expert_down": "blk.{}.ffn_down_exps.weight",
}

_GEMMA3 = TENSORS | {
    "post_attn_norm": "blk.{}.post_attention_norm.weight",
    "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
}
_PHI3 = TENSORS | {
    **dict.fromkeys(("wq", "wk", "wv"), "blk.{}.attn_qkv.weight"),
    **dict.fromkeys(("w_gate", "w_up"), "blk.{}.ffn_up.weight"),
}
_OF_ARCHITECTURE = {"gemma3": _GEMMA3, "phi3": _PHI3}
# Rotary divisors, which the configuration has. For other architectures llama.cpp does not read them.
_DIVISORS = {"llama": {ROTARY}, "phi3": {SHORT_FACTORS, LONG_FACTORS}}

# Fields of `SamplingParams` -> what llama.cpp calls them.
_SAMPLING = {
    **{name: f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p")},
    "temperature": "general.sampling.temp",
    "repetition_penalty": "general.sampling.penalty_repeat",
}

_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # ggml's numbers of the encodings that are not quantised


class GGUFCheckpoint(Checkpoint):
    """A Llama, Mistral, Qwen2, Qwen3, Gemma 3 or Phi-3 model, or Mixtral, OLMoE or Qwen3-MoE, in a `.gguf` file, or in
    parts of which any may be named.

    Raises:
      UnknownModelError: a part is missing.
      UnsupportedModelError: another architecture, a rotary scaling that is not implemented, fields or tensors
        that are missing or wrong, or a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFModel(path)
        self.config = read_config(self._file)
        self._architecture = self._file.metadata["general.architecture"]
        self._names = _OF_ARCHITECTURE.get(self._architecture, TENSORS)
        stored = self._file.tensors.keys() - _DIVISORS.get(self._architecture, set())
        refuse_unread(path, stored, self.config, self._names)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        found = tokenizer_from_gguf(self._file.metadata)
        check_vocabulary(self._file.path, found, self.config)
        return found

    @property
    def dtype(self) -> str | None:
        encodings = {tensor.encoding for tensor in self._file.tensors.values() if len(tensor.shape) >= 2}
        return _FLOATS.get(encodings.pop()) if len(encodings) == 1 else None

    @property
    def sampling(self) -> Mapping[str, Any]:
        metadata = self._file.metadata
        found = {name: metadata[key] for name, key in _SAMPLING.items() if metadata.get(key) is not None}
        return checked_sampling(str(self._file.path), found)

    def load_params(self, dtype: str, mesh: Mesh, quantization: str = "none") -> Params:
        config, names = self.config, self._names
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        check_shapes(self._file.path, shapes, config, names)
        # For the architecture llama, llama.cpp interleaves the two halves of every rotated head; for no other.
        permuted, rows = self._architecture == "llama", rows_within(config, names)
        heads = {
            "wq": config.num_q_heads,
            "bq": config.num_q_heads,
            "wk": config.num_kv_heads,
            "bk": config.num_kv_heads,
        }

        def read(name: str, layer: int | None) -> np.ndarray:
            return ordered(name, self._file.read(names[name].format(layer), rows[name]))

        def ordered(name: str, stored: np.ndarray) -> np.ndarray:
            return unpermute(stored, heads[name]) if permuted and name in heads else spread_rotary(name, stored, config)

        def kind(name: str, layer: int | None) -> str | None:
            encoding = self._file.encoding(names[name].format(layer))
            return encoding.lower() if is_held(encoding) else None

        def in_codes(name: str, layer: int | None) -> Stored | np.ndarray:
            tensor = names[name].format(layer)
            if kind(name, layer) is None or len(shapes[tensor]) == 1:
                return read(name, layer)
            stored = take_apart(self._file.encoding(tensor), self._file.blocks(tensor))
            if stored.parts["codes"].ndim == 3:  # experts
                return stored
            return stored.rows(rows[name]).ordered(functools.partial(ordered, name))

        return place_rows(config, dtype, mesh, in_codes, choose_held(quantization, read, kind, in_codes))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Q or K rows from llama.cpp's order to ours.

    Its rotation turns neighbours, ours turns elements half a head apart. One head of 6 rows, by the place in our order:

    stored     0 3 1 4 2 5
    returned   0 1 2 3 4 5

    Args:
      rows: a weight `[heads * head_dim, in]` or a bias `[heads * head_dim]`.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
