"""What a decoder is: `ModelConfig`, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax.errors import UnknownModelError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Hashable, so that it can be a static argument of a jitted function.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
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
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            raise UnsupportedModelError(
                f"rope_factors has {len(self.rope_factors)} entries; it needs head_dim // 2 = {self.head_dim // 2}"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the fields of a Hugging Face `config.json`, old style or transformers 5.

        Raises:
          UnsupportedModelError: another architecture, activation or rotary scaling than the family's.
        """
        model_type = raw.get("model_type", "llama")
        if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            raise UnsupportedModelError(
                f"model_type={model_type!r} is not supported; supported: llama, mistral, qwen2, qwen3"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"hidden_act={raw['hidden_act']!r} is not supported; supported: silu")
        if raw.get("mlp_bias") or (model_type != "qwen2" and raw.get("attention_bias")):
            raise UnsupportedModelError("mlp_bias and attention_bias are supported for no model_type but qwen2's QKV")
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        rope = _rope_parameters(raw)
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_q_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=head_dim,
            max_position=_usable_positions(raw),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            rope_factors=rope_factors(rope, head_dim),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            tied_embeddings=raw.get("tie_word_embeddings", False),
            eos_token_ids=_as_tuple(raw.get("eos_token_id")),
        )


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps theta and scaling together as `rope_parameters`; older files apart."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _usable_positions(raw: Mapping[str, Any]) -> int:
    """Positions up to which full causal attention is what the model was trained with.

    A sliding window changes nothing while the context fits into it, so it becomes the limit.
    """
    limit = raw.get("max_position_embeddings", 2048)
    uses_window = raw.get("use_sliding_window", raw.get("model_type") == "mistral")
    window = raw.get("sliding_window") if uses_window else None
    return min(limit, window) if window else limit


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...] | None:
    """What each rotary frequency is divided by, `[head_dim // 2]`, or None for plain RoPE.

    Llama 3.1's rule (`rope_type: llama3`): long wavelengths are stretched by `factor`, short ones are
    left alone, and those between are interpolated.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type={kind!r} is not supported; supported: default, linear, llama3")
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope["original_max_position_embeddings"]
    inv_freq = float(rope["rope_theta"]) ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original * inv_freq / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / ((1.0 - smooth) / factor + smooth)).tolist())


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
    return ModelConfig.from_hf(json.loads((folder / f"{name}.json").read_text()))
