"""Hugging Face directories: `config.json` and `*.safetensors`, in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsex_jax.checkpoints.adapter_config import ADAPTER_CONFIG
from sparsex_jax.checkpoints.base import (
    Checkpoint,
    check_shapes,
    check_vocabulary,
    has_experts_apart,
    refuse_unread,
    rows_within,
    spread_rotary,
)
from sparsex_jax.checkpoints.held import Stored, choose_held
from sparsex_jax.checkpoints.placing import place_rows
from sparsex_jax.checkpoints.safetensors_file import open_safetensors, read_tensor
from sparsex_jax.checkpoints.scheme import QUANTISED_FILES, floats_of, read_scheme
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
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
    "wide_q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "wide_k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "w_up": "model.layers.{}.mlp.up_proj.weight",
    "w_down": "model.layers.{}.mlp.down_proj.weight",
    "router": "model.layers.{}.mlp.gate.weight",
    "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "expert_up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "expert_down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}
# What Mixtral's files call it.
MIXTRAL_TENSORS = TENSORS | {
    "router": "model.layers.{}.block_sparse_moe.gate.weight",
    "expert_gate": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "expert_up": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "expert_down": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
# transformers 5 keeps a layer's experts as one tensor, and writes it so where it is not to write the original format.
# Gate and up are the halves of one tensor there, which count as two.
_GATE, _UP = " (gate)", " (up)"
FUSED_TENSORS = TENSORS | {
    "expert_gate": f"model.layers.{{}}.mlp.experts.gate_up_proj{_GATE}",
    "expert_up": f"model.layers.{{}}.mlp.experts.gate_up_proj{_UP}",
    "expert_down": "model.layers.{}.mlp.experts.down_proj",
}
_FUSED = "mlp.experts.gate_up_proj"


_PHI3 = TENSORS | {
    **dict.fromkeys(("wq", "wk", "wv"), "model.layers.{}.self_attn.qkv_proj.weight"),
    **dict.fromkeys(("w_gate", "w_up"), "model.layers.{}.mlp.gate_up_proj.weight"),
}
_GEMMA3 = TENSORS | {
    "post_attn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "post_mlp_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
_OF_FAMILY = {"phi3": _PHI3, "gemma3": _GEMMA3, "gemma3_text": _GEMMA3}
# The text model of one that also sees pictures: its prefixes in old and new files, and what is read by nothing here.
_TEXT_MODEL = {"language_model.": "", "model.language_model.": "model."}
_PICTURES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# The names that safetensors gives to floats.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_ROWS_AT_ONCE = 4096  # of the embeddings, when they are compared with the head
_SINGLE = "model.safetensors"
# What is read of a model beside its weights and its tokenizer.
READ_FILES = ("config.json", GENERATION_CONFIG, _INDEX, ADAPTER_CONFIG, *QUANTISED_FILES)


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
        self._scheme = read_scheme(directory, raw)
        config = ModelConfig.from_hf(raw, str(path))
        self._model_type = str(raw.get("model_type"))
        self._open = functools.cache(open_safetensors)  # so each file's header is parsed once, not for every tensor
        self._files = _weight_files(directory, self._open)
        self._stored = _stored_names(self._files, with_pictures=self._model_type == "gemma3")
        self._scales: dict[str, str] = {}  # of tensors in codes
        self._shapes = self._read_shapes()
        self._names = _OF_FAMILY.get(self._model_type) or _names_in(self._shapes)
        if config.tied_embeddings and not self._has_own_head():
            self._shapes.pop(TENSORS["lm_head"], None)  # a copy of the embeddings
        else:
            config = dataclasses.replace(config, tied_embeddings=False)
        self.config = dataclasses.replace(config, eos_token_ids=_eos_token_ids(config, directory))
        refuse_unread(directory, self._shapes.keys(), self.config, self._names)

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the stored tensors but rotary tables, which say nothing new."""
        names = {name: stored for name, stored in self._stored.items() if not name.endswith(_TABLES)}
        shapes = {name: self._shape(name) for name in names}
        for name in [name for name in names if self._is_in_codes(name)]:
            assert self._scheme is not None
            scale = self._scheme.scale_of(name, shapes)
            if scale is None or len(shapes[name]) != 2 or not self._scheme.accepts(shapes[scale], shapes[name]):
                found = "no scales" if scale is None else f"scales of shape {shapes[scale]}"
                raise UnsupportedModelError(f"{self.directory}: {name} of shape {shapes[name]} has {found}")
            self._scales[name] = scale
        return _with_halves({name: shape for name, shape in shapes.items() if name not in self._scales.values()})

    def _shape(self, name: str) -> tuple[int, ...]:
        """A tensor's. Raises UnsupportedModelError if its elements are no floats, nor codes that can be read."""
        stored = self._slice(name)
        if stored.get_dtype() not in (*_DTYPES, "F64") and not self._is_in_codes(name):
            file = self._files[self._stored[name]]
            raise UnsupportedModelError(f"{file}: {name} has elements of type {stored.get_dtype()}; they are not read")
        return tuple(stored.get_shape())

    def _is_in_codes(self, name: str) -> bool:
        return self._scheme is not None and self._slice(name).get_dtype() == self._scheme.dtype

    def _slice(self, name: str) -> Any:
        """A tensor that is not read yet, by the name that a model of text alone has for it."""
        stored = self._stored[name]
        return self._open(self._files[stored]).get_slice(stored)

    def _has_own_head(self) -> bool:
        """Whether a head is stored that differs from the embeddings: then it counts, whatever the configuration says of
        ties. Fine-tunes often keep the configuration of their base model."""
        tensors = [TENSORS[name] for name in ("embed", "lm_head")]
        if not all(tensor in self._stored for tensor in tensors):
            return False
        embed, head = (self._slice(tensor) for tensor in tensors)
        shape = embed.get_shape()
        if shape != head.get_shape() or not shape:
            return True
        if any(self._is_in_codes(tensor) for tensor in tensors):
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
    def in_numbers(self) -> bool:
        return self._scheme is not None

    @property
    def dtype(self) -> str | None:
        """That of the embedding, as transformers stores all tensors alike; None where there is no such tensor."""
        name = TENSORS["embed"]
        return _DTYPES.get(self._slice(name).get_dtype()) if name in self._stored else None

    @property
    def sampling(self) -> Mapping[str, Any]:
        return read_generation_config(self.directory)

    def load_params(self, dtype: str, mesh: Mesh, quantization: str = "none") -> Params:
        config, names = self.config, self._names
        check_shapes(self.directory, self._shapes, config, names)
        rows, less_one = rows_within(config, names), names is _GEMMA3

        def read(name: str, layer: int | None) -> np.ndarray:
            template = names[name]
            if has_experts_apart(template):
                return np.stack([self._read(template.format(layer, n)) for n in range(config.num_experts or 0)])
            stored = self._read(template.format(layer), rows[name])
            if less_one and name.endswith("norm"):  # the scale is one more than what is stored
                stored = 1 + stored.astype(np.float32)
            return spread_rotary(name, stored, config)

        def in_codes(name: str, layer: int | None) -> Stored:
            template = names[name]
            if has_experts_apart(template):
                return _together([self._codes(template.format(layer, n)) for n in range(config.num_experts or 0)])
            stored = self._codes(template.format(layer)).rows(rows[name])
            return stored.ordered(lambda outputs: spread_rotary(name, outputs, config))

        def kind(name: str, layer: int | None) -> str | None:
            tensors = (names[name].format(layer, n) for n in range(config.num_experts or 1))
            return self._scheme.kind if self._scheme and all(each in self._scales for each in tensors) else None

        def either(name: str, layer: int | None) -> Stored | np.ndarray:
            return in_codes(name, layer) if kind(name, layer) else read(name, layer)

        return place_rows(config, dtype, mesh, read, choose_held(quantization, read, kind, either))

    def _codes(self, name: str) -> Stored:
        """A tensor that is quantised."""
        assert self._scheme is not None
        scales = self._whole(self._scales[name])
        if not np.isfinite(scales.astype(np.float32)).all():
            raise UnsupportedModelError(f"{self._scales[name]} has scales that are no finite numbers")
        return self._scheme.stored(self._whole(name), scales)

    def _whole(self, name: str) -> np.ndarray:
        """A tensor, of a dtype that NumPy need not know."""
        stored = self._stored[name]
        return read_tensor(self._files[stored], stored)

    def _read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or of a half of one."""
        tensor = name.removesuffix(_GATE).removesuffix(_UP)
        if tensor in self._scales:
            return floats_of(self._codes(tensor))[rows]
        if tensor == name:
            return self._slice(tensor)[rows]
        gate, up = np.split(self._slice(tensor)[:], 2, axis=1)
        return gate if name.endswith(_GATE) else up


def _stored_names(files: Mapping[str, Path], *, with_pictures: bool) -> dict[str, str]:
    """The stored name of each tensor of the text model, by the name in a model of text alone."""
    if not with_pictures:
        return {name: name for name in files}
    prefixes = {prefix for prefix in _TEXT_MODEL if any(name.startswith(prefix) for name in files)}
    return {
        next((_TEXT_MODEL[each] + name.removeprefix(each) for each in prefixes if name.startswith(each)), name): name
        for name in files
        if not name.startswith(_PICTURES)
    }


def _with_halves(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with a gate and an up in place of each tensor that holds both. One that cannot be halved is left."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(_FUSED) and len(shape) == 3 and shape[1] % 2 == 0:
            out |= dict.fromkeys((name + _GATE, name + _UP), (shape[0], shape[1] // 2, shape[2]))
        else:
            out[name] = shape
    return out


def _names_in(stored: Collection[str]) -> Mapping[str, str]:
    """What the tensors are called in these files."""
    if any(_FUSED in name for name in stored):
        return FUSED_TENSORS
    return MIXTRAL_TENSORS if any(".block_sparse_moe." in name for name in stored) else TENSORS


def _refuse_adapter(directory: Path) -> None:
    if (directory / ADAPTER_CONFIG).is_file():
        raise UnsupportedModelError(
            f"{directory} holds an adapter ({ADAPTER_CONFIG}) beside the model, which transformers would add to it; "
            "load it as an adapter from a directory of its own, or merge it into the weights"
        )


def _together(experts: list[Stored]) -> Stored:
    """The codes of all experts as one."""
    parts = {name: np.stack([each.parts[name] for each in experts]) for name in experts[0].parts}
    return Stored(experts[0].kind, parts)


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
