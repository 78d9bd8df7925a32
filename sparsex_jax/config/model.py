"""What a decoder is: `ModelConfig`, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import is_int, is_number
from sparsex_jax.config.experts import check_experts, read_mlp
from sparsex_jax.config.families import read_family
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.config.rotary import dynamic_theta, read_rotary
from sparsex_jax.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

    Hashable, so that it can be a static argument of a jitted function. Fields with a default say what only some
    families have.

    Attributes:
      max_position: the most tokens that prompt and answer may have together.
      rope_theta: the rotary base.
      rope_factors: what each rotated pair's frequency is divided by; None: 1. Linear, llama3 and yarn scaling, and
        longrope for contexts up to its original length.
      rotary_dim: how many of a head's dimensions are rotated, the first ones in a checkpoint's order; None: all
        (Phi-4-mini: three quarters).
      rope_attention_factor: multiplies the rotated part of queries and keys (yarn, longrope). The decoder multiplies
        queries with its square and keys with nothing, so that a stored key can be rotated on.
      rope_long_factors, rope_original_length: longrope's divisors for contexts longer than the original length.
      rope_dynamic_factor: NTK scaling of contexts that are longer than `max_position`, up to so many times that.
      rope_local_theta: the base of layers with a window, whose frequencies are divided by nothing (Gemma 3). None:
        all layers rotate alike.
      layer_windows: for each layer, how many keys a row sees, its own included; None: all before it. None in place of
        all: no layer has a window.
      qkv_bias: queries, keys and values have biases (Qwen2).
      qk_norm: RMSNorm over each head of queries and keys, before the rotation (Qwen3, Gemma 3).
      wide_qk_norm: RMSNorm over all heads of queries together, and of keys, before the rotation (OLMoE).
      post_norms: RMSNorm after attention and after the MLP too, before the residual (Gemma 3).
      norm_dtype: of the scales of norms; None: the dtype of the other weights. With another one, a norm rounds once,
        after scaling.
      activation: of the MLP's gate: `silu`, or `gelu_tanh` (Gemma 3).
      num_experts: of every layer, in place of its MLP; `intermediate_size` is then the width of each. None: no experts.
      experts_per_token: how many of them compute a token.
      normalise_top_k: the weights of a token's experts are divided by their sum (Qwen3, Mixtral).
      embedding_scale: multiplies embeddings at the input (Gemma 3).
      query_scalar: scores are divided by its square root; None: head_dim.
      final_softcap: logits x become `tanh(x / cap) * cap`. None: they stay.
      tied_embeddings: the output projection is the embedding's transpose.
      eos_token_ids: tokens that end an answer.
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
    rope_factors: tuple[float, ...] | None = None
    rotary_dim: int | None = None
    rope_attention_factor: float = 1.0
    rope_long_factors: tuple[float, ...] | None = None
    rope_original_length: int | None = None
    rope_dynamic_factor: float | None = None
    rope_local_theta: float | None = None
    layer_windows: tuple[int | None, ...] | None = None
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    post_norms: bool = False
    norm_dtype: str | None = None
    activation: str = "silu"
    num_experts: int | None = None
    experts_per_token: int | None = None
    normalise_top_k: bool = False
    embedding_scale: float | None = None
    query_scalar: float | None = None
    final_softcap: float | None = None
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fields = Fields("model", vars(self))
        for name in _COUNTS:
            fields.count(name)
        for name in _NUMBERS:
            fields.number(name)
        for name in _OPTIONAL_NUMBERS:
            if getattr(self, name) is not None:
                fields.number(name)
        for name in _FLAGS:
            fields.flag(name)
        fields.token_ids("eos_token_ids")
        _check_choices(fields)
        check_experts(fields)
        _check_heads(self)
        _check_windows(self)

    @property
    def num_rotated_pairs(self) -> int:
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None where it sees all keys."""
        return self.layer_windows or (None,) * self.num_layers

    def for_context(self, length: int | None = None) -> ModelConfig:
        """The same model for prompts and answers of at most this many tokens together; None: `max_position`.

        transformers computes longrope's and dynamic frequencies anew as a text grows. Keys in a store are read by
        prompts of any length, so they are fixed here. longrope: its long factors if the context exceeds the original
        length, else its short ones. dynamic: the base that transformers has for a text of the whole context.

        Raises:
          InvalidRequestError: the model does not take so many tokens.
        """
        most = int(self.max_position * (self.rope_dynamic_factor or 1))
        length = self.max_position if length is None else length
        if not 1 <= length <= most:
            raise InvalidRequestError(f"max_context={length} must be from 1 to {most}, which the model takes")
        changes: dict[str, Any] = {"max_position": length}
        if self.rope_long_factors is not None and self.rope_original_length is not None:
            long = length > self.rope_original_length
            factors = self.rope_long_factors if long else self.rope_factors
            changes |= {"rope_factors": factors, "rope_long_factors": None, "rope_original_length": None}
        if self.rope_dynamic_factor is not None:
            about = self.rope_theta, self.rope_dynamic_factor, length, self.max_position
            theta = dynamic_theta(*about, 2 * self.num_rotated_pairs)
            changes |= {"rope_theta": theta, "rope_dynamic_factor": None}
        return dataclasses.replace(self, **changes)

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
        family, fields = read_family(raw, where)
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        head_dim = fields.count("head_dim", max(1, hidden // heads))
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            num_layers=fields.count("num_hidden_layers"),
            num_q_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            **vars(
                read_rotary(
                    family.rotary(fields), head_dim, partial=family.partial_rotary, default_theta=family.default_theta
                )
            ),
            **read_mlp(fields, fields.get("model_type", "llama")),
            **family.extra(fields),
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
_NUMBERS = ("rope_theta", "rms_norm_eps", "rope_attention_factor")
_OPTIONAL_NUMBERS = ("rope_local_theta", "rope_dynamic_factor", "embedding_scale", "query_scalar", "final_softcap")
_FLAGS = ("qkv_bias", "qk_norm", "wide_qk_norm", "post_norms", "normalise_top_k", "tied_embeddings")
ACTIVATIONS = ("silu", "gelu_tanh")


def _check_choices(fields: Fields) -> None:
    for name, known in (("activation", ACTIVATIONS), ("norm_dtype", (None, "float32"))):
        if fields.values[name] not in known:
            fields.refuse(name, f"is not supported; supported: {', '.join(map(str, known))}")


def _check_heads(config: ModelConfig) -> None:
    if config.num_q_heads % config.num_kv_heads:
        raise UnsupportedModelError(
            f"num_q_heads={config.num_q_heads} is not a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise UnsupportedModelError(f"head_dim={config.head_dim} is odd; rotary positions need pairs")
    dim = config.rotary_dim
    if dim is not None and not (is_int(dim) and 2 <= dim <= config.head_dim and dim % 2 == 0):
        raise UnsupportedModelError(f"rotary_dim={dim!r} must be an even number from 2 to head_dim={config.head_dim}")
    if config.rope_local_theta is not None and config.rope_attention_factor != 1:
        raise UnsupportedModelError("rope_attention_factor is not supported where layers rotate differently")
    for name in ("rope_factors", "rope_long_factors"):
        if getattr(config, name) is not None:
            _check_rope_factors(name, getattr(config, name), config.num_rotated_pairs)


def _check_rope_factors(name: str, factors: Any, pairs: int) -> None:
    if not isinstance(factors, tuple) or len(factors) != pairs:
        raise UnsupportedModelError(
            f"{name}={reprlib.repr(factors)} must have {pairs} entries, one for each rotated pair"
        )
    if not all(is_number(factor) and 0 < factor < math.inf for factor in factors):
        raise UnsupportedModelError(f"{name}={reprlib.repr(factors)} must be finite numbers above 0")


def _check_windows(config: ModelConfig) -> None:
    windows = config.layer_windows
    if windows is None:
        return
    if not isinstance(windows, tuple) or len(windows) != config.num_layers:
        raise UnsupportedModelError(
            f"layer_windows={reprlib.repr(windows)} must have num_layers={config.num_layers} entries"
        )
    if not all(window is None or (is_int(window) and window >= 1) for window in windows):
        raise UnsupportedModelError(f"layer_windows={reprlib.repr(windows)} must be integers from 1 on, or None")


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
