"""Mixtures of experts as a Hugging Face `config.json` describes them."""

from __future__ import annotations

from typing import Any

from sparsex_jax.config.checks import is_int
from sparsex_jax.config.fields import Fields
from sparsex_jax.errors import UnsupportedModelError

# The families that have experts, and whether the weights of a token's experts are divided by their sum. None: the file
# says it in norm_topk_prob.
_SUM_TO_ONE = {"mixtral": True, "olmoe": None, "qwen3_moe": None}
_NUMBERS = ("num_experts", "num_local_experts")  # two names of the same, both in use


def read_mlp(raw: Fields, model_type: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about what follows attention: an MLP's width, or the experts.

    Raises:
      UnsupportedModelError: some layers have experts and some do not, or what is computed differs in another way.
    """
    if model_type not in _SUM_TO_ONE:
        return {"intermediate_size": raw.count("intermediate_size")}
    if raw.get("clip_qkv") is not None:
        raw.refuse("clip_qkv", "is not supported: queries, keys and values are not clipped")
    if model_type == "qwen3_moe" and not _all_sparse(raw):
        return {"intermediate_size": raw.count("intermediate_size")}
    width = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    sum_to_one = _SUM_TO_ONE[model_type]
    return {
        "intermediate_size": raw.count(width),
        "num_experts": _num_experts(raw),
        "experts_per_token": raw.count("num_experts_per_tok"),
        "normalise_top_k": raw.flag("norm_topk_prob") if sum_to_one is None else sum_to_one,
    }


def check_experts(fields: Fields) -> None:
    """Refuse a `ModelConfig` whose fields about experts do not fit together."""
    if fields.get("num_experts") is None:
        if fields.get("experts_per_token") is not None or fields.flag("normalise_top_k"):
            raise UnsupportedModelError("experts_per_token and normalise_top_k need num_experts")
        return
    experts = fields.count("num_experts")
    if fields.count("experts_per_token") > experts:
        fields.refuse("experts_per_token", f"must be at most num_experts={experts}")


def _num_experts(raw: Fields) -> int:
    stated = {name: raw.count(name) for name in _NUMBERS if raw.get(name) is not None}
    if len(set(stated.values())) > 1:
        raw.refuse("num_experts", f"differs from num_local_experts={stated['num_local_experts']}")
    return next(iter(stated.values()), None) or raw.count("num_experts")


def _all_sparse(raw: Fields) -> bool:
    """Whether all layers have experts, and not none. transformers gives a layer an MLP that `mlp_only_layers` lists, or
    whose number, counted from 1, is no multiple of `decoder_sparse_step`."""
    layers, step = raw.count("num_hidden_layers"), raw.count("decoder_sparse_step", 1)
    listed = raw.get("mlp_only_layers", [])
    if not isinstance(listed, list) or not all(is_int(layer) for layer in listed):
        raw.refuse("mlp_only_layers", "must be a list of the numbers of layers")
    dense = {layer for layer in listed if 0 <= layer < layers}
    sparse = layers // step - sum((layer + 1) % step == 0 for layer in dense)
    if 0 < sparse < layers:
        name = "mlp_only_layers" if dense else "decoder_sparse_step"
        raw.refuse(name, f"is not supported: {sparse} of {layers} layers have experts; all must have them, or none")
    return sparse == layers
