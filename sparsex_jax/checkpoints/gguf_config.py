"""The configuration of a model in a GGUF file: what llama.cpp's metadata says, as `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparsex_jax.checkpoints.gguf_file import GGUFModel
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.families import Windows, gemma3_fields
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.rotary import DEFAULT_THETA, Rotary, linear_factors, yarn_attention_factor, yarn_factors
from sparsex_jax.errors import UnsupportedModelError

EMBEDDING = "token_embd.weight"
ROTARY = "rope_freqs.weight"  # divisors of the rotary frequencies (Llama 3)
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # those of longrope (Phi-3)


def read_config(file: GGUFModel) -> ModelConfig:
    """The model's configuration.

    Raises:
      UnsupportedModelError: another architecture, a rotary scaling that is not implemented, or fields that are
        missing or wrong.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _EXTRA:
        raise UnsupportedModelError(
            f"general.architecture={architecture!r} is not supported; supported: {', '.join(_EXTRA)}"
        )
    fields = _fields(architecture, file)
    if not fields.flag("attention.causal", True):
        fields.refuse("attention.causal", "is not supported: this decoder attends to earlier tokens only")
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", max(1, hidden // heads))
    return ModelConfig(
        vocab_size=_vocabulary_size(file),
        hidden_size=hidden,
        num_layers=fields.count("block_count"),
        num_q_heads=heads,
        num_kv_heads=fields.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
        eos_token_ids=_eos_token_ids(file.metadata),
        **vars(_rotary(fields, head_dim, file, partial=architecture == "phi3")),
        **_mlp(fields, architecture),
        **_EXTRA[architecture](fields),
    )


def _mlp(fields: Fields, architecture: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about what follows attention: an MLP's width, or the experts."""
    if not fields.get("expert_count"):
        return {"intermediate_size": fields.count("feed_forward_length")}
    for name, plain in _PLAIN_EXPERTS.items():
        if fields.get(name, plain) != plain:
            fields.refuse(name, f"is not supported; supported: {plain}")
    width = fields.count("feed_forward_length") if architecture != "qwen3moe" else None
    return {
        "intermediate_size": fields.count("expert_feed_forward_length", width),
        "num_experts": fields.count("expert_count"),
        "experts_per_token": fields.count("expert_used_count"),
        "normalise_top_k": architecture != "olmoe",  # llama.cpp reads no field about it
    }


# Fields about experts that this decoder knows one value of. The gating function 1 is the softmax.
_PLAIN_EXPERTS = {
    "expert_gating_func": 1,
    "expert_group_count": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
}


def _all_windowed(fields: Fields) -> dict[str, Any]:
    """Every layer has the window, if there is one that hides anything."""
    size = fields.count("attention.sliding_window") if fields.get("attention.sliding_window") else None
    if size is None or size >= fields.count("context_length"):
        return {}
    return {"layer_windows": (size,) * fields.count("block_count")}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return {"qk_norm": True} | _all_windowed(fields)


_GEMMA3_27B = 62  # layers; llama.cpp tells the model by them, whose scores have another scale than the others'


def _gemma3(fields: Fields) -> dict[str, Any]:
    """Files store one more than the weights of norms, which is what multiplies."""
    if fields.get("attn_logit_softcapping") is not None:
        fields.refuse("attn_logit_softcapping", "is not supported: no attention kernel caps its scores")
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    is_27b = fields.count("block_count") == _GEMMA3_27B
    scalar = hidden / heads if is_27b else fields.count("attention.key_length", max(1, hidden // heads))
    capped = fields.get("final_logit_softcapping") is not None
    return gemma3_fields(hidden, scalar, _gemma3_windows(fields)) | {
        "rope_local_theta": fields.number("rope.freq_base_swa", DEFAULT_THETA),
        "final_softcap": fields.number("final_logit_softcapping") if capped else None,
    }


def _gemma3_windows(fields: Fields) -> Windows:
    """Five layers with a window to one without, unless the file says another number, or which layers they are."""
    size, layers = fields.count("attention.sliding_window"), fields.count("block_count")
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list) and len(pattern) == layers:
        is_sliding = [bool(each) for each in pattern]
    else:
        every = fields.count("attention.sliding_window_pattern", 6)
        is_sliding = [(layer + 1) % every > 0 for layer in range(layers)]
    return tuple(size if each else None for each in is_sliding)


def _olmoe(fields: Fields) -> dict[str, Any]:
    return {"wide_qk_norm": True} | _all_windowed(fields)


_EXTRA: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _all_windowed,  # Mistral's and Mixtral's files say so too
    "olmoe": _olmoe,
    "qwen2": _all_windowed,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3,
    "phi3": _all_windowed,
    "gemma3": _gemma3,
}


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
    tensor = file.tensors.get(EMBEDDING)
    if tensor is None:
        raise UnsupportedModelError(f"{file.path} has no tensor {EMBEDDING!r}")
    return tensor.shape[0]


def _rotary(fields: Fields, head_dim: int, file: GGUFModel, *, partial: bool) -> Rotary:
    """Rotary positions: by what scales them, and by the divisors that the file stores.

    Args:
      partial: models of this architecture may rotate a part of each head.
    """
    dim = fields.count("rope.dimension_count", head_dim)
    if dim != head_dim and not (partial and dim < head_dim and dim % 2 == 0):
        fields.refuse("rope.dimension_count", f"must be head_dim={head_dim}: partial rotation is not supported")
    longrope = LONG_FACTORS in file.tensors
    kind, factor = _scaling(fields, longrope=longrope)
    plain = Rotary(fields.count("context_length"), fields.number("rope.freq_base", DEFAULT_THETA))
    rotary = {"none": _unscaled, "linear": _linear, "yarn": _yarn, "longrope": _longrope}[kind](
        plain, fields, file, factor, dim
    )
    return dataclasses.replace(rotary, rotary_dim=dim if dim < head_dim else None)


def _unscaled(plain: Rotary, fields: Fields, file: GGUFModel, factor: float, dim: int) -> Rotary:
    return dataclasses.replace(plain, rope_factors=_stored(file, ROTARY))


def _linear(plain: Rotary, fields: Fields, file: GGUFModel, factor: float, dim: int) -> Rotary:
    """Stored divisors and the factor multiply."""
    stored, scaled = _stored(file, ROTARY), linear_factors(factor, dim)
    if stored is None or len(stored) != len(scaled):  # of the configuration's own check, which sees a wrong number
        return dataclasses.replace(plain, rope_factors=scaled if stored is None else stored)
    factors = tuple(one * other for one, other in zip(stored, scaled, strict=True))
    return dataclasses.replace(plain, rope_factors=factors)


def _yarn(plain: Rotary, fields: Fields, file: GGUFModel, factor: float, dim: int) -> Rotary:
    original = fields.count("rope.scaling.original_context_length", plain.max_position)
    return dataclasses.replace(
        plain,
        max_position=max(plain.max_position, int(original * factor)),
        rope_factors=yarn_factors(plain.rope_theta, factor, original, dim),
        rope_attention_factor=fields.number("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor),
    )


def _longrope(plain: Rotary, fields: Fields, file: GGUFModel, factor: float, dim: int) -> Rotary:
    return dataclasses.replace(
        plain,
        rope_factors=_stored(file, SHORT_FACTORS),
        rope_long_factors=_stored(file, LONG_FACTORS),
        rope_original_length=fields.count("rope.scaling.original_context_length"),
        rope_attention_factor=fields.number("rope.scaling.attn_factor", 1.0),
    )


def _stored(file: GGUFModel, name: str) -> tuple[float, ...] | None:
    return tuple(file.read(name).ravel().astype(float).tolist()) if name in file.tensors else None


# Fields of a scaling that say nothing new for any kind; `attn_factor` is read where queries and keys have a factor.
_SILENT_SCALING = ("type", "factor", "original_context_length", "finetuned")


def _scaling(fields: Fields, *, longrope: bool) -> tuple[str, float]:
    """The kind of scaling, and its factor. Old files name a factor and no type, or the factor by its old name: both are
    linear, as llama.cpp reads them."""
    names = ("rope.scaling.factor", "rope.scale_linear")
    factors = {name: fields.number(name) for name in names if fields.get(name) is not None}
    if len(set(factors.values())) > 1:
        fields.refuse("rope.scaling.factor", f"differs from rope.scale_linear={factors['rope.scale_linear']}")
    kind = "longrope" if longrope else fields.get("rope.scaling.type") or ("linear" if factors else "none")
    if kind not in ("none", "linear", "yarn") and not longrope:
        fields.refuse("rope.scaling.type", "is not supported; supported: none, linear, yarn")
    _refuse_scaling_fields(fields, has_factor=kind in ("yarn", "longrope"))
    if kind in ("linear", "yarn") and not factors:
        fields.refuse("rope.scaling.type", "has no rope.scaling.factor beside it")
    return kind, next(iter(factors.values()), 1.0)


def _refuse_scaling_fields(fields: Fields, *, has_factor: bool) -> None:
    for name, value in fields.values.items():
        scaling = name.removeprefix("rope.scaling.")
        is_factor = scaling == "attn_factor" and (has_factor or value == 1)
        if scaling != name and scaling not in _SILENT_SCALING and not is_factor:
            fields.refuse(name, "is not supported")


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    fields = Fields("tokenizer.ggml", metadata)
    ids = (id_ for name in ("eos", "eot", "eom") for id_ in fields.token_ids(f"tokenizer.ggml.{name}_token_id"))
    return tuple(dict.fromkeys(ids))
