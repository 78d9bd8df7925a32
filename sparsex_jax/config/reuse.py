"""How a request reuses KV: `ReuseConfig`, and the files that hold one beside a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import is_int, is_number, require
from sparsex_jax.config.model import ModelConfig
from sparsex_jax.errors import InvalidRequestError

CALIBRATED = "sparsex.json"  # the file beside a model's own that says how to reuse its KV


@dataclasses.dataclass(frozen=True)
class ReuseConfig:
    """How a request uses the KV that is in the store (DESIGN.md, section 3).

    Attributes:
      method: a name in `sparsex_jax.reuse.methods.METHODS`: full, prefix, naive, epic, cacheblend, sparsex, random,
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
      only_if_faster: recompute what was found where that takes less time, by `sparsex_jax.reuse.cost`, on devices
        that it knows. The answer is full recompute's then.

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
        require(isinstance(self.method, str), f"method={self.method!r} must be a string")
        for name in ("boundary_layer", "second_boundary", "head_tokens"):
            value = getattr(self, name)
            require(
                value is None or (is_int(value) and value >= 0), f"{name}={value!r} must be an integer >= 0 or None"
            )
        pool = self.pool_tokens
        require(pool is None or (is_int(pool) and pool >= 1), f"pool_tokens={pool!r} must be an integer >= 1 or None")
        ratio = self.recompute_ratio
        require(is_number(ratio) and 0.0 <= ratio <= 1.0, f"recompute_ratio={ratio!r} must be a number from 0 to 1")
        part = self.coverage
        require(
            part is None or (is_number(part) and 0.0 < part <= 1.0),
            f"coverage={part!r} must be a number in (0, 1] or None",
        )
        limits = {"overflow_tokens": 0, "tail_tokens": 0, "min_segment_tokens": 16}
        for name, least in limits.items():
            value = getattr(self, name)
            require(is_int(value) and value >= least, f"{name}={value!r} must be an integer >= {least}")
        for name in ("focus", "per_segment", "sum_layers", "only_if_faster"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name}={value!r} must be True or False")

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
            require(name in names or name in _ABOUT, f"{path}: {name!r} is unknown; there are: {', '.join(names)}")
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
    require(isinstance(known, dict), f"{path}: architecture={known!r} must be an object")
    for name, value in known.items():
        require(
            has.get(name) == value,
            f"{path} was calibrated for {raw.get('model', 'another model')!r} with {name}={value!r}; "
            f"this model has {name}={has.get(name)!r}",
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {error}") from error
    require(isinstance(raw, dict), f"{path} must be a JSON object")
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
