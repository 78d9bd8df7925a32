"""Configuration as frozen dataclasses, checked where it is made.

`ModelConfig` says what the decoder is, `ReuseConfig` how a request reuses KV, `SamplingParams` how its
tokens are chosen, and `EngineConfig` how much memory and which shapes the engine uses.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
_DTYPES = ("float32", "bfloat16", "float16")
CALIBRATED = "sparsex.json"  # the file beside a model's own that says how to reuse its KV


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidRequestError(message)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


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
    packaged = Path(__file__).parent / "_configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


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


@dataclasses.dataclass(frozen=True)
class ReuseConfig:
    """How a request uses the KV that is in the store (DESIGN.md, section 3).

    Attributes:
      method: a name in `sparsex_jax.methods.METHODS`: full, prefix, naive, epic, cacheblend, sparsex, random,
        prophetkv, focus.
      boundary_layer: `l*`; layers before it compute every non-prefix token. None takes 1/6 of the layers
        (cacheblend: layer 1). 0 scores with layer 0 and runs all layers sparse; the number of layers is full
        recompute.
      recompute_ratio: key tokens that the method's signal chooses, as a share of the reused tokens. 0 to 1.
      overflow_tokens: reused tokens recomputed on both sides of every fresh interval.
      tail_tokens: length of the tail fallback, where the prompt ends in reused tokens.
      second_boundary: from this layer on only fresh tokens run. None: the active ones run to the end.
      min_segment_tokens: shorter runs are not worth pasting and are computed. At least 16: the index
        finds every run of 15 tokens, and not every shorter one.
      only_if_faster: recompute what was found where that takes less time, by `sparsex_jax.cost`, on devices that it
        knows. The answer is full recompute's then.

    Options beyond the paper. They combine; a method refuses those that mean nothing to it.

      coverage: choose key tokens, best first, until the tokens computed hold this share of the fresh queries'
        attention on reused tokens, in (0, 1]. `recompute_ratio` is the upper bound then. None: always all of it.
      focus: sparsex and prophetkv score by the fourth powers of the attention instead of the attention itself: by the
        heads that look firmly at something. The method focus always does.
      head_tokens: the first so many tokens of each segment are recomputed too. None: 8 for epic, otherwise 0.
      per_segment: each segment gets its share of the key tokens, instead of the best of all.
      pool_tokens: key tokens are chosen in blocks of so many, counted from each segment's first, by their mean score; a
        block that is begun is finished, also where that exceeds the budget. None: 128 for focus, otherwise 1.
      sum_layers: sparsex scores by the key mass of all layers up to the boundary, instead of the boundary's.
    """

    method: str = "sparsex"
    boundary_layer: int | None = None
    recompute_ratio: float = 0.15
    overflow_tokens: int = 16
    tail_tokens: int = 64
    second_boundary: int | None = None
    min_segment_tokens: int = 16
    coverage: float | None = None
    focus: bool = False
    head_tokens: int | None = None
    per_segment: bool = False
    pool_tokens: int | None = None
    sum_layers: bool = False
    only_if_faster: bool = False

    def __post_init__(self) -> None:
        _require(isinstance(self.method, str), f"method={self.method!r} must be a string")
        for name in ("boundary_layer", "second_boundary", "head_tokens"):
            value = getattr(self, name)
            _require(
                value is None or (_is_int(value) and value >= 0), f"{name}={value!r} must be an integer >= 0 or None"
            )
        pool = self.pool_tokens
        _require(pool is None or (_is_int(pool) and pool >= 1), f"pool_tokens={pool!r} must be an integer >= 1 or None")
        ratio = self.recompute_ratio
        _require(_is_number(ratio) and 0.0 <= ratio <= 1.0, f"recompute_ratio={ratio!r} must be a number from 0 to 1")
        part = self.coverage
        _require(
            part is None or (_is_number(part) and 0.0 < part <= 1.0),
            f"coverage={part!r} must be a number in (0, 1] or None",
        )
        limits = {"overflow_tokens": 0, "tail_tokens": 0, "min_segment_tokens": 16}
        for name, least in limits.items():
            value = getattr(self, name)
            _require(_is_int(value) and value >= least, f"{name}={value!r} must be an integer >= {least}")
        for name in ("focus", "per_segment", "sum_layers", "only_if_faster"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name}={value!r} must be True or False")

    def updated(self, **given: Any) -> ReuseConfig:
        """These fields instead. Under another method the others mean something else, so they start from defaults."""
        base = ReuseConfig() if given.get("method", self.method) != self.method else self
        return dataclasses.replace(base, **given)

    @classmethod
    def load(cls, path: str | Path, model: ModelConfig | None = None) -> ReuseConfig:
        """Read a JSON object of these fields, as `sparsex calibrate` writes it or by hand; the rest are defaults.

        Args:
          model: what it is to be used with. Checked against the file's `architecture`, if it has one: layers and
            budgets mean nothing in another model.

        Raises:
          InvalidRequestError: no such file or no JSON object; a field is unknown, wrong or of another model.
        """
        raw = _read_object(Path(path))
        names = {field.name for field in dataclasses.fields(cls)}
        for name in raw:
            _require(name in names or name in _ABOUT, f"{path}: {name!r} is unknown; there are: {', '.join(names)}")
        if model is not None and "architecture" in raw:
            _check_architecture(path, raw, model)
        try:
            return cls(**{name: value for name, value in raw.items() if name in names})
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{path}: {error}") from error


# What a calibrated file has beside the fields of `ReuseConfig`.
_ABOUT = ("model", "architecture", "measured", "command", "device", "machine", "versions", "commit")
_SHAPE = ("num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size")


def architecture(model: ModelConfig) -> dict[str, int]:
    """What tells a calibrated file's model from others, wherever it lies and whatever it is called."""
    return {name: getattr(model, name) for name in _SHAPE}


def _check_architecture(path: str | Path, raw: Mapping[str, Any], model: ModelConfig) -> None:
    known, has = raw["architecture"], architecture(model)
    _require(isinstance(known, dict), f"{path}: architecture={known!r} must be an object")
    for name, value in known.items():
        _require(
            has.get(name) == value,
            f"{path} was calibrated for {raw.get('model', 'another model')!r} with {name}={value!r}; "
            f"this model has {name}={has.get(name)!r}",
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {error}") from error
    _require(isinstance(raw, dict), f"{path} must be a JSON object")
    return raw


def default_reuse(source: str | Path, model: ModelConfig, reuse: ReuseConfig | str | Path | None = None) -> ReuseConfig:
    """How a model's KV is reused where a request does not say: as given, or as a file says that is given.

    None takes `sparsex.json` in the model's directory, and the defaults where there is none. Errors as
    `ReuseConfig.load`.
    """
    if isinstance(reuse, ReuseConfig):
        return reuse
    beside = Path(source).expanduser() / CALIBRATED
    path = reuse or (beside if beside.is_file() else None)
    return ReuseConfig.load(path, model) if path else ReuseConfig()


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How new tokens are chosen and when to stop.

    Attributes:
      max_new_tokens: at most this many are generated, at least 1.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: nucleus, in (0, 1]; 1 keeps all.
      top_k: keep the k most probable tokens; 0 keeps all.
      seed: of the request's own random stream; a batch-mate changes nothing.
      stop: strings that end the text; they are not part of it.
      ignore_eos: go on past the model's end tokens.
      min_p: keep tokens at least this share as probable as the most probable one, in [0, 1]; 0 keeps all.
      repetition_penalty: divides positive logits of tokens that are in the prompt or the answer, and multiplies
        negative ones; above 0, 1 changes nothing.
      presence_penalty: taken from the logits of tokens that are in the answer, in [-2, 2].
      frequency_penalty: taken from them once for each time that they are, in [-2, 2].
      logit_bias: what is added to the logits of these token ids, in [-100, 100]; at most 1024 of them.
      logprobs: report the log-probability of each new token and of so many most probable ones, 0 to 20. They are the
        model's own, before anything above changes them. None reports nothing.

    Temperature and filters come after bias and penalties, in the order min_p, top_k, top_p; each sees what the one
    before it left. This is what vLLM does.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens={self.max_new_tokens!r} must be an integer >= 1",
        )
        _require(
            _is_number(self.temperature) and math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature={self.temperature!r} must be a finite number >= 0",
        )
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, f"top_p={self.top_p!r} must be in (0, 1]")
        _require(_is_int(self.top_k) and self.top_k >= 0, f"top_k={self.top_k!r} must be an integer >= 0")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**32, f"seed={self.seed!r} must be an integer in [0, 2**32)")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        _require(all(isinstance(s, str) and s for s in stop), f"stop={self.stop!r} must be non-empty strings")
        object.__setattr__(self, "stop", stop)
        self._check_logits()

    def _check_logits(self) -> None:
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, f"min_p={self.min_p!r} must be in [0, 1]")
        repetition = self.repetition_penalty
        _require(
            _is_number(repetition) and math.isfinite(repetition) and repetition > 0,
            f"repetition_penalty={repetition!r} must be a finite number > 0",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, f"{name}={value!r} must be in [-2, 2]")
        _require(isinstance(self.logit_bias, Mapping), f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}",
        )
        for token, bias in self.logit_bias.items():
            _require(_is_int(token) and token >= 0, f"logit_bias has the key {token!r}; it must be a token id")
            _require(
                _is_number(bias) and -100 <= bias <= 100,
                f"logit_bias of token {token} is {bias!r}; it must be in [-100, 100]",
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        number = self.logprobs
        _require(
            number is None or (_is_int(number) and 0 <= number <= MAX_LOGPROBS),
            f"logprobs={number!r} must be an integer from 0 to {MAX_LOGPROBS}, or None",
        )

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits themselves, which takes an array of the vocabulary on the device."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequestError if `logit_bias` names a token that a model of this vocabulary has not."""
        beyond = max(self.logit_bias, default=0)
        _require(beyond < vocab_size, f"logit_bias has token id {beyond}; ids must be from 0 to {vocab_size - 1}")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Memory and shapes of an engine.

    Attributes:
      store_tokens: token slots of the KV store; a multiple of page_size, rounded up.
      page_size: tokens a page; a multiple of 8 (the index hashes windows of 8 tokens).
      dtype: of weights, activations and the KV store.
      max_batch: requests in one plan.
      chunk_rows: rows that go through a layer at a time; None takes what suits the platform.
      decode_steps: tokens generated per dispatch before the host looks.
      frozen_limit: share of the store that pinned and frozen pages may fill before frozen entries go.
    """

    store_tokens: int = 16384
    page_size: int = 64
    dtype: str = "float32"
    max_batch: int = 8
    chunk_rows: int | None = None
    decode_steps: int = 16
    frozen_limit: float = 0.9

    def __post_init__(self) -> None:
        _require(self.dtype in _DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(_DTYPES)}")
        for name in ("store_tokens", "page_size", "max_batch", "decode_steps"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, f"{name}={value!r} must be an integer >= 1")
        _require(self.page_size % 8 == 0, f"page_size={self.page_size} must be a multiple of 8")
        _require(
            self.chunk_rows is None or (_is_int(self.chunk_rows) and self.chunk_rows >= 8),
            f"chunk_rows={self.chunk_rows!r} must be an integer >= 8 or None",
        )
        _require(0 < self.frozen_limit <= 1, f"frozen_limit={self.frozen_limit!r} must be in (0, 1]")

    @property
    def num_pages(self) -> int:
        return -(-self.store_tokens // self.page_size)
