"""What a decoder is: `ModelConfig`, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import is_number
from sparsex_jax.config.experts import check_experts, read_mlp
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.config.rotary import DEFAULT_THETA, read_rotary
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU or a mixture of such experts.

    Hashable, so that it can be a static argument of a jitted function.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP, or of each expert
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10000.0
    # Divides the rotary frequency of each pair (Llama-3 and linear scaling); None leaves them alone.
    rope_factors: tuple[float, ...] | None = None
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of Q and K, before the rotation
    wide_qk_norm: bool = False  # OLMoE: RMSNorm over all heads of Q together, and of K, before the rotation
    num_experts: int | None = None  # of every layer, in place of its MLP; None: there are no experts
    experts_per_token: int | None = None
    normalise_top_k: bool = False  # the weights of a token's experts are divided by their sum (Qwen3, Mixtral)
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fields = Fields("model", vars(self))
        for name in _COUNTS:
            fields.count(name)
        for name in ("rope_theta", "rms_norm_eps"):
            fields.number(name)
        for name in ("qkv_bias", "qk_norm", "wide_qk_norm", "normalise_top_k", "tied_embeddings"):
            fields.flag(name)
        fields.token_ids("eos_token_ids")
        check_experts(fields)
        if self.num_q_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        if self.rope_factors is not None:
            _check_rope_factors(self.rope_factors, self.head_dim // 2)

    @property
    def mlp_width(self) -> int:
        """The width of what an MLP or the experts of one token compute together."""
        return self.intermediate_size * (self.experts_per_token or 1)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the fields of a Hugging Face `config.json`, old style or transformers 5.

        Args:
          where: the file, for messages.

        Raises:
          UnsupportedModelError: another architecture, activation or rotary scaling than the family's, or a field is
            missing or of another type.
        """
        fields = Fields(where, raw)
        model_type = _family(fields)
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        head_dim = fields.count("head_dim", 128 if model_type == "qwen3" else max(1, hidden // heads))
        theta, factors = read_rotary(fields, head_dim, _DEFAULT_THETAS.get(model_type, DEFAULT_THETA))
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            num_layers=fields.count("num_hidden_layers"),
            num_q_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=head_dim,
            max_position=_usable_positions(fields, model_type),
            rope_theta=theta,
            rope_factors=factors,
            rms_norm_eps=fields.number("rms_norm_eps", _DEFAULT_EPSILONS.get(model_type, 1e-6)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            wide_qk_norm=model_type == "olmoe",
            tied_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            **read_mlp(fields, model_type),
        )


_FAMILIES = ("llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen3", "qwen3_moe")
# Of files that leave rope_theta or rms_norm_eps out.
_DEFAULT_THETAS = {"mixtral": 1e6}
_DEFAULT_EPSILONS = {"mixtral": 1e-5, "olmoe": 1e-5}

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)


def _check_rope_factors(factors: Any, pairs: int) -> None:
    if not isinstance(factors, tuple) or len(factors) != pairs:
        raise UnsupportedModelError(f"rope_factors={reprlib.repr(factors)} must have head_dim // 2 = {pairs} entries")
    if not all(is_number(factor) and 0 < factor < math.inf for factor in factors):
        raise UnsupportedModelError(f"rope_factors={reprlib.repr(factors)} must be finite numbers above 0")


def _family(fields: Fields) -> str:
    """`model_type`, if this decoder computes what transformers computes for it."""
    model_type = fields.get("model_type", "llama")
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(f"model_type={model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
    if fields.values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act={fields.get('hidden_act')!r} is not supported; supported: silu")
    if fields.flag("mlp_bias") or (fields.flag("attention_bias") and model_type != "qwen2"):
        raise UnsupportedModelError("mlp_bias and attention_bias are supported for no model_type but qwen2's QKV")
    return model_type


def _usable_positions(fields: Fields, model_type: str) -> int:
    """Positions up to which full causal attention is what the model was trained with.

    A sliding window changes nothing while the context fits into it, so it becomes the limit.
    """
    limit = fields.count("max_position_embeddings")
    uses_window = fields.flag("use_sliding_window", model_type in ("mistral", "mixtral"))
    # transformers leaves the field out of a Mistral's file where it is 4096, and writes null where there is no window.
    default = 4096 if model_type == "mistral" else None
    if not uses_window or fields.values.get("sliding_window", default) is None:
        return limit
    return min(limit, fields.count("sliding_window", default))


def config_dir() -> Path:
    """The folder of named configurations: inside the wheel, or at the top of a source checkout."""
    packaged = Path(__file__).parents[1] / "_configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def named_config(name: str) -> ModelConfig:
    """The model configuration `configs/models/{name}.json`, for instance `llama-3.1-8b`.

    Raises:
      UnknownModelError: no such file; the message lists those there are.
    """
    folder = config_dir() / "models"
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise UnknownModelError(f"no configuration is named {name!r}; there are: {', '.join(known)}")
    return ModelConfig.from_hf(read_json(folder / f"{name}.json"))
