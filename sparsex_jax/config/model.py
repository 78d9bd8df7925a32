"""What a decoder is: `ModelConfig`, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import is_number
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.config.rotary import read_rotary
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
        fields = Fields("model", vars(self))
        for name in _COUNTS:
            fields.count(name)
        for name in ("rope_theta", "rms_norm_eps"):
            fields.number(name)
        for name in ("qkv_bias", "qk_norm", "tied_embeddings"):
            fields.flag(name)
        fields.token_ids("eos_token_ids")
        if self.num_q_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        if self.rope_factors is not None:
            _check_rope_factors(self.rope_factors, self.head_dim // 2)

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
        theta, factors = read_rotary(fields, head_dim)
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=fields.count("num_hidden_layers"),
            num_q_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=head_dim,
            max_position=_usable_positions(fields, model_type),
            rope_theta=theta,
            rope_factors=factors,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            tied_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )


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
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UnsupportedModelError(
            f"model_type={model_type!r} is not supported; supported: llama, mistral, qwen2, qwen3"
        )
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
    uses_window = fields.flag("use_sliding_window", model_type == "mistral")
    # transformers leaves the field out of a Mistral's file where it is 4096, and writes null where there is no window.
    if not uses_window or fields.values.get("sliding_window", 4096) is None:
        return limit
    return min(limit, fields.count("sliding_window", 4096))


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
