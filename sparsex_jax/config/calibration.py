"""The file beside a model that says how to reuse its KV, as `sparsex calibrate` writes it or a user by hand.

It is a JSON object: `method`, that method's options, and whatever `sparsex calibrate` says about how it found them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.config.model import ModelConfig
from sparsex_jax.errors import InvalidRequestError

CALIBRATED = "sparsex.json"  # its name in the model's directory

# What the file has beside the method and its options.
_ABOUT = ("model", "architecture", "measured", "command", "device", "machine", "versions", "commit")
_ARCHITECTURE = ("num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size")


def read_calibration(path: Path, model: ModelConfig | None = None) -> dict[str, Any]:
    """The method and its options in a file, not yet checked.

    Args:
      model: the model they are to be used with. It must be the file's `architecture`, if the file has one: layers and
        budgets found for another model mean nothing.

    Raises:
      InvalidRequestError: the file cannot be read, holds no JSON object or was made for another model.
    """
    raw = _read_object(path)
    if model is not None and "architecture" in raw:
        _check_architecture(path, raw, model)
    return {name: value for name, value in raw.items() if name not in _ABOUT}


def architecture(model: ModelConfig) -> dict[str, int]:
    """The sizes that tell a calibrated file's model from others, wherever the model is and whatever it is called."""
    return {name: getattr(model, name) for name in _ARCHITECTURE}


def _check_architecture(path: Path, raw: Mapping[str, Any], model: ModelConfig) -> None:
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
