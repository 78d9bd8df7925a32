"""GGUF files: llama.cpp's format, with the tokenizer in the metadata and weights that may be quantised.

This module reads the header itself in a tenth of a second. The reader of the `gguf` package takes seconds, because it
makes an array of every token and merge. That package dequantises the tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint, place_rows, refuse_unread
from sparsex_jax.config import ModelConfig, rope_factors
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

# Types of metadata values in the header, and how `struct` unpacks the scalar ones.
_STRING, _ARRAY = 8, 9
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # ggml's numbers of the encodings that are not quantised
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFCheckpoint(Checkpoint):
    """A `.gguf` file of a Llama, Mistral, Qwen2 or Qwen3 model.

    Raises:
      UnsupportedModelError: another architecture, experts, a rotary scaling that is not implemented, or a
        damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._file = _File(path)
        self.config = _model_config(self._file)
        stored = self._file.tensors.keys() - {_ROTARY}  # which the configuration has
        refuse_unread(path, stored, self.config, TENSORS)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        return tokenizer_from_gguf(self._file.metadata)

    @property
    def dtype(self) -> str | None:
        encodings = {tensor.encoding for tensor in self._file.tensors.values() if len(tensor.shape) == 2}
        return _FLOATS.get(encodings.pop()) if len(encodings) == 1 else None

    def load_params(self, dtype: str, mesh: Mesh) -> Params:
        config = self.config
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


def _model_config(file: _File) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"general.architecture={architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    fields = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if fields.get("expert_count"):
        raise UnsupportedModelError(
            f"{prefix}expert_count={fields['expert_count']}: mixtures of experts are not supported"
        )
    try:
        return _dense_config(architecture, fields, file)
    except KeyError as error:
        raise UnsupportedModelError(f"{file.path} lacks {error.args[0]!r}, which {architecture} needs") from error


def _dense_config(architecture: str, fields: Mapping[str, Any], file: _File) -> ModelConfig:
    hidden, heads = fields["embedding_length"], fields["attention.head_count"]
    head_dim = fields.get("attention.key_length", hidden // heads)
    window = fields.get("attention.sliding_window") or fields["context_length"]
    return ModelConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=fields["feed_forward_length"],
        num_layers=fields["block_count"],
        num_q_heads=heads,
        num_kv_heads=fields.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        # Up to its window, a sliding-window model attends to every token, as this decoder does; beyond, it does not.
        max_position=min(fields["context_length"], window),
        rope_theta=fields.get("rope.freq_base", 10000.0),
        rope_factors=_rope_factors(fields, head_dim, file),
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        tied_embeddings="output.weight" not in file.tensors,
        eos_token_ids=_eos_token_ids(file.metadata),
    )


def _rope_factors(fields: Mapping[str, Any], head_dim: int, file: _File) -> tuple[float, ...] | None:
    """The divisor of each rotary frequency: stored in the file (Llama 3), or of the scaling that the metadata names."""
    if fields.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"rope.dimension_count={fields['rope.dimension_count']} must be head_dim={head_dim}: partial rotation"
        )
    if _ROTARY in file.tensors:
        return tuple(file.read(_ROTARY).astype(float).tolist())
    # Old files name a factor and no type, or the factor by its old name. Both mean linear, as llama.cpp reads them.
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear")
    scaling = fields.get("rope.scaling.type") or ("linear" if factor else "none")
    rope_type = "default" if scaling == "none" else scaling
    return rope_factors({"rope_type": rope_type, "factor": factor}, head_dim)


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the file.

    Attributes:
      shape: rows first.
      encoding: ggml's number for the type of its elements.
      start: bytes from the beginning of the data.
    """

    shape: tuple[int, ...]
    encoding: int
    start: int


class _File:
    """A mapped GGUF file: its metadata, and its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header(_Cursor(self._bytes))
        except (ValueError, KeyError, struct.error) as error:
            raise UnsupportedModelError(f"{path} is not a readable GGUF file: {error}") from error

    def _read_header(self, cursor: _Cursor) -> None:
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, and not with b'GGUF', version 2 or 3")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_fields)}
        self.tensors = {cursor.string(): cursor.tensor() for _ in range(num_tensors)}
        alignment = self.metadata.get("general.alignment", 32)
        self._data_start = -(-cursor.offset // alignment) * alignment

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32 where it is not stored as floats.

        Raises:
          UnsupportedModelError: there is no such tensor, its encoding cannot be read, or the file is truncated.
        """
        import gguf

        if name not in self.tensors:
            raise UnsupportedModelError(f"{self.path} has no tensor {name!r}")
        tensor = self.tensors[name]
        try:
            encoding = gguf.GGMLQuantizationType(tensor.encoding)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, encoding)
            start = self._data_start + tensor.start
            stored = np.frombuffer(self._bytes, np.uint8, math.prod(shape), start)
            return gguf.dequantize(stored.reshape(shape), encoding)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error


class _Cursor:
    """Reads the values of the header one after another. Each has a type, which the file gives as a number."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.offset = 0

    def scalar(self, code: str) -> Any:
        (value,) = self._unpack(code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.offset += size
        return self.buffer[self.offset - size : self.offset].decode()

    def value(self, type_: int) -> Any:
        if type_ == _STRING:
            return self.string()
        return self._array() if type_ == _ARRAY else self.scalar(_SCALARS[type_])

    def tensor(self) -> _Tensor:
        dims = self._unpack(f"{self.scalar('I')}Q")  # the axis with stride 1 comes first; in NumPy it comes last
        return _Tensor(shape=dims[::-1], encoding=self.scalar("I"), start=self.scalar("Q"))

    def _array(self) -> list[Any]:
        type_, size = self.scalar("I"), self.scalar("Q")
        if type_ in _SCALARS:
            return list(self._unpack(f"{size}{_SCALARS[type_]}"))
        return [self.value(type_) for _ in range(size)]

    def _unpack(self, code: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{code}", self.buffer, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return values
