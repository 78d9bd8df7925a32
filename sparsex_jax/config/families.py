"""The families of models: what each adds to the fields that all share, read from a Hugging Face `config.json`.

A family is a function that refuses what the decoder does not compute, and gives values of `ModelConfig`'s fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsex_jax.config.fields import Fields
from sparsex_jax.config.rotary import DEFAULT_THETA
from sparsex_jax.errors import UnsupportedModelError

_NULL_SAYS_SOMETHING = {"sliding_window"}
Windows = tuple[int | None, ...] | None
_KINDS = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular about the models of one `model_type`.

    Attributes:
      extra: the fields of `ModelConfig` that differ from their defaults.
      defaults: fields of the file that it may leave out, as transformers fills them in.
      rotary: the fields of the file with one description of the rotation, that of layers without a window.
      partial_rotary: whether a part of each head may be rotated.
      default_theta: the rotary base of a file that states none.
    """

    extra: Callable[[Fields], dict[str, Any]] = lambda _: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rotary: Callable[[Fields], Fields] = lambda fields: fields
    partial_rotary: bool = False
    default_theta: float = DEFAULT_THETA


def layer_windows(fields: Fields, size: int | None, is_sliding: Sequence[bool]) -> Windows:
    """The window of each layer, None where it sees all; None in place of all if no layer has one.

    Args:
      is_sliding: of each layer, where the file has no `layer_types`.
    """
    kinds = fields.get("layer_types", [_KINDS[each] for each in is_sliding])
    if not isinstance(kinds, (list, tuple)) or len(kinds) != len(is_sliding) or not set(kinds) <= set(_KINDS):
        fields.refuse("layer_types", f"must have one of {', '.join(_KINDS)} for each of {len(is_sliding)} layers")
    if size is None or _KINDS[1] not in kinds:
        return None
    return tuple(size if kind == _KINDS[1] else None for kind in kinds)


def _window(fields: Fields, default: int | None = None) -> int | None:
    """`sliding_window`; None where it is as long as the longest prompt, and hides nothing. A file may write null where
    there is none, which differs from leaving the field out."""
    if fields.values.get("sliding_window", default) is None:
        return None
    size = fields.count("sliding_window", default)
    return size if size < fields.count("max_position_embeddings") else None


def _refuse_biases(fields: Fields, *, attention: bool = True) -> None:
    if fields.flag("mlp_bias") or (attention and fields.flag("attention_bias")):
        raise UnsupportedModelError("mlp_bias and attention_bias are supported for no model_type but qwen2's QKV")


def _silu_only(fields: Fields) -> None:
    if fields.values.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "is not supported; supported: silu")


def _llama(fields: Fields) -> dict[str, Any]:
    _silu_only(fields)
    _refuse_biases(fields)
    return {}


def _mistral(fields: Fields) -> dict[str, Any]:
    """All layers have the window, which is 4096 where a file leaves the field out."""
    windows = layer_windows(fields, _window(fields, 4096), [True] * fields.count("num_hidden_layers"))
    return _llama(fields) | {"layer_windows": windows}


def _qwen(fields: Fields) -> Windows:
    """The upper layers have the window, if `use_sliding_window` says so."""
    layers = fields.count("num_hidden_layers")
    size = _window(fields, 4096) if fields.flag("use_sliding_window") else None
    first = fields.get("max_window_layers", 28)
    if size is not None and (not isinstance(first, int) or isinstance(first, bool) or first < 0):
        fields.refuse("max_window_layers", "must be an integer from 0 on")
    return layer_windows(fields, size, [size is not None and layer >= first for layer in range(layers)])


def _qwen2(fields: Fields) -> dict[str, Any]:
    _silu_only(fields)
    _refuse_biases(fields, attention=False)
    return {"qkv_bias": True, "layer_windows": _qwen(fields)}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {"qk_norm": True, "layer_windows": _qwen(fields)}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    """All layers have the window, if `use_sliding_window` says so."""
    size = _window(fields, 4096) if fields.flag("use_sliding_window") else None
    windows = layer_windows(fields, size, [True] * fields.count("num_hidden_layers"))
    return _llama(fields) | {"qk_norm": True, "layer_windows": windows}


def _olmoe(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {"wide_qk_norm": True}


def _all_windowed(fields: Fields) -> dict[str, Any]:
    windows = layer_windows(fields, _window(fields), [True] * fields.count("num_hidden_layers"))
    return _llama(fields) | {"layer_windows": windows}


def _phi3_rotary(fields: Fields) -> Fields:
    """Early files call longrope `su` or `yarn`."""
    sections = {name: fields.object(name).values for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    renamed = {name: {key: _phi3_kind(key, value) for key, value in each.items()} for name, each in sections.items()}
    return Fields(fields.where, {**fields.values, **renamed})


def _phi3_kind(key: str, value: Any) -> Any:
    return "longrope" if key in ("type", "rope_type") and value in ("su", "yarn") else value


def _gemma3(fields: Fields) -> dict[str, Any]:
    """Norms before and after, scaled embeddings, and five layers with a window and a short rotary base to one without.

    Norms multiply with one more than what is stored, which reading the weights adds.
    """
    if fields.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        fields.refuse("hidden_activation", "is not supported; supported: gelu_pytorch_tanh")
    _refuse_biases(fields)
    if fields.get("attn_logit_softcapping") is not None:
        fields.refuse("attn_logit_softcapping", "is not supported: no attention kernel caps its scores")
    if fields.flag("use_bidirectional_attention"):
        fields.refuse("use_bidirectional_attention", "is not supported: this decoder attends to earlier tokens only")
    every, layers = fields.count("sliding_window_pattern", 6), fields.count("num_hidden_layers")
    # A window that hides nothing still says which layers have the other rotary base.
    windows = layer_windows(fields, fields.count("sliding_window"), [(i + 1) % every > 0 for i in range(layers)])
    capped = fields.get("final_logit_softcapping") is not None
    return gemma3_fields(fields.count("hidden_size"), fields.number("query_pre_attn_scalar"), windows) | {
        "rope_local_theta": _local_theta(fields) if windows else None,
        "final_softcap": fields.number("final_logit_softcapping") if capped else None,
    }


def gemma3_fields(hidden_size: int, query_scalar: float, windows: Windows) -> dict[str, Any]:
    """What all Gemma 3 models have, whatever kind of file they are in."""
    return {
        "qk_norm": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": hidden_size**0.5,
        "query_scalar": query_scalar,
        "layer_windows": windows,
        "norm_dtype": "float32",
    }


def _local_theta(fields: Fields) -> float:
    """The rotary base of layers with a window: a field in old files, a section of its own in transformers 5."""
    section = fields.object("rope_parameters").values.get("sliding_attention")
    outer = fields.number("rope_local_base_freq", 10000.0)
    if section is None:
        return outer
    inner = Fields(f"{fields.where}: sliding_attention", section)
    if inner.get("rope_type", "default") != "default":
        inner.refuse("rope_type", "is not supported for layers with a window; supported: default")
    return inner.number("rope_theta", outer)


def _gemma3_rotary(fields: Fields) -> Fields:
    """That of layers without a window, whose base is 1,000,000 where no field says another."""
    values = {"rope_theta": 1e6} | {key: value for key, value in fields.values.items() if value is not None}
    section = fields.object("rope_parameters").object("full_attention").values
    if section:
        values |= {"rope_parameters": section, "rope_theta": section.get("rope_theta", values["rope_theta"])}
    return Fields(fields.where, values)


_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3, {"head_dim": 128}),
    "qwen3_moe": Family(_qwen3_moe),
    "mixtral": Family(_all_windowed, {"rms_norm_eps": 1e-5}, default_theta=1e6),
    "olmoe": Family(_olmoe, {"rms_norm_eps": 1e-5}),
    "phi3": Family(_all_windowed, {"rms_norm_eps": 1e-5}, _phi3_rotary, partial_rotary=True),
    "gemma3_text": Family(_gemma3, _GEMMA3_DEFAULTS, _gemma3_rotary),
}


def read_family(raw: Mapping[str, Any], where: str) -> tuple[Family, Fields]:
    """The family of a file, and its fields with what the family fills in.

    Raises:
      UnsupportedModelError: this decoder does not compute what transformers computes for `model_type`.
    """
    fields = Fields(where, raw)
    model_type = fields.get("model_type", "llama")
    if model_type == "gemma3":  # text and pictures; the text model stands in an object of its own
        text = fields.object("text_config").values
        if not text:
            raise UnsupportedModelError(f"{where} has no text_config, which is needed")
        outer = {name: raw[name] for name in ("eos_token_id", "tie_word_embeddings") if raw.get(name) is not None}
        fields, model_type = Fields(f"{where}: text_config", {**outer, **text}), "gemma3_text"
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type={model_type!r} is not supported; supported: {', '.join([*FAMILIES, 'gemma3'])}"
        )
    missing = {
        name for name in family.defaults if fields.get(name) is None
    } - _NULL_SAYS_SOMETHING & fields.values.keys()
    filled = {name: family.defaults[name] for name in missing}
    return family, Fields(fields.where, {**fields.values, **filled})
