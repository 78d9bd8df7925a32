"""Files that say how to reuse a model's KV, as `sparsex calibrate` writes them or a user by hand.

Such a file is a JSON object: `method`, that method's options, and whatever `sparsex calibrate` says about how it found
them. Some come with this package, in `configs/calibrations`, for models that were measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.config.model import ModelConfig, config_dir
from sparsex_jax.errors import InvalidRequestError

CALIBRATED = "sparsex.json"  # its name in the model's directory

# What the file has beside the method and its options.
_ABOUT = (
    "model",
    "architecture",
    "holds_for",
    "in_company",
    "measured",
    "command",
    "device",
    "machine",
    "versions",
    "commit",
)
_ARCHITECTURE = ("num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a file says, not yet checked whether the method has these options.

    Attributes:
      path: the file.
      options: the method and its options.
      model: the name of the model that it was made for. None: it does not say.
      architecture: that model's sizes, as `architecture` gives them. None: it does not say.
      holds_for: the regimes, ways to store documents, in which these options met the target. None: it does not say.
      in_company: the method and options where donors are made in company. None: the same as elsewhere.
    """

    path: Path
    options: Mapping[str, Any]
    model: str | None = None
    architecture: Mapping[str, Any] | None = None
    holds_for: tuple[str, ...] | None = None
    in_company: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Calibrated:
        """
        Raises:
          InvalidRequestError: the file cannot be read, holds no JSON object, or has a field of a wrong type.
        """
        raw = _read_object(path)
        name, regimes = raw.get("model"), raw.get("holds_for")
        require(name is None or isinstance(name, str), f"{path}: model={name!r} must be a string")
        for field in ("architecture", "in_company"):
            is_object = isinstance(raw.get(field), dict | None)
            require(is_object, f"{path}: {field}={raw.get(field)!r} must be an object")
        strings = regimes is None or (isinstance(regimes, list) and all(isinstance(each, str) for each in regimes))
        require(strings, f"{path}: holds_for={regimes!r} must be a list of strings")
        options = {field: value for field, value in raw.items() if field not in _ABOUT}
        regimes = None if regimes is None else tuple(regimes)
        return cls(path, options, name, raw.get("architecture"), regimes, raw.get("in_company"))

    def options_for(self, *, company: bool) -> Mapping[str, Any]:
        """The method and its options where donors are made in company, or where they are made alone."""
        return self.in_company if company and self.in_company is not None else self.options

    def origin(self, *, company: bool) -> str:
        """Where these options are from, for people to read."""
        regimes = ("company",) if company and self.in_company is not None else self.holds_for
        made_for = f", calibrated for {self.model}" if self.model else ""
        holds = f", holds for donors in these regimes: {', '.join(regimes)}" if regimes else ""
        return f"from {self.path}{made_for}{holds}"

    def check_model(self, model: ModelConfig) -> None:
        """Raise InvalidRequestError if it was made for another architecture: its budgets mean nothing here."""
        has = architecture(model)
        for name, value in (self.architecture or {}).items():
            require(
                has.get(name) == value,
                f"{self.path} was calibrated for {self.model or 'another model'!r} with {name}={value!r}; "
                f"this model has {name}={has.get(name)!r}",
            )


def architecture(model: ModelConfig) -> dict[str, int]:
    """The sizes that tell a calibrated file's model from others, wherever the model is and whatever it is called."""
    return {name: getattr(model, name) for name in _ARCHITECTURE}


def shipped_for(model: ModelConfig, name: str = "") -> Calibrated | None:
    """The calibration that comes with this package for a model's architecture, if there is one.

    Models that differ in their weights alone share an architecture. Of their calibrations, that of the model with the
    longest name that is in `name` is taken, else the first by name. The result says for which model it was made.

    Args:
      name: of the file or directory that the model is in.
    """
    found = [Calibrated.read(path) for path in (config_dir() / "calibrations").glob("*.json")]
    fitting = sorted(
        (each for each in found if each.architecture == architecture(model)), key=lambda each: each.path.stem
    )
    known = [len(each.model) if each.model and each.model.lower() in name.lower() else 0 for each in fitting]
    return fitting[known.index(max(known))] if fitting else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {error}") from error
    require(isinstance(raw, dict), f"{path} must be a JSON object")
    return raw
