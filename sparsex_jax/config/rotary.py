"""Rotary positions as a Hugging Face `config.json` describes them: the base frequency, and how others are stretched."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sparsex_jax.config.fields import Fields
from sparsex_jax.errors import UnsupportedModelError

Rotary = tuple[float, tuple[float, ...] | None]
"""rope_theta, and what each rotary frequency is divided by, `[head_dim // 2]`; None for plain RoPE."""

DEFAULT_THETA = 10000.0
_SECTIONS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of older files


def read_rotary(raw: Fields, head_dim: int, default_theta: float = DEFAULT_THETA) -> Rotary:
    """Rotary positions by either section of a `config.json`, or without one.

    Args:
      default_theta: the base frequency of a file that states none.

    Raises:
      UnsupportedModelError: a scaling that is not implemented, a field that is missing, or two statements that differ.
    """
    if raw.get("partial_rotary_factor", 1) != 1:
        raw.refuse("partial_rotary_factor", "is not supported: every head is rotated whole")
    stated = {name: _rotary(raw.object(name), raw, head_dim, default_theta) for name in _SECTIONS if raw.get(name)}
    if len(set(stated.values())) > 1:
        raise UnsupportedModelError(f"{raw.where}: {' and '.join(stated)} differ; one of them must go")
    return next(iter(stated.values()), None) or _rotary(Fields(raw.where, {}), raw, head_dim, default_theta)


def linear_factors(factor: float, head_dim: int) -> tuple[float, ...]:
    """All positions divided by a factor."""
    return (float(factor),) * (head_dim // 2)


def _rotary(rope: Fields, raw: Fields, head_dim: int, default_theta: float) -> Rotary:
    _refuse_what_is_not_read(rope)
    theta = _stated_once("rope_theta", rope, raw, default_theta)
    kind = _kind(rope)
    if kind == "default":
        return theta, None
    factor = rope.number("factor")
    if kind == "linear":
        return theta, linear_factors(factor, head_dim)
    return theta, _llama3_factors(rope, factor, theta, _original_length(rope, raw), head_dim)


def _refuse_what_is_not_read(rope: Fields) -> None:
    if rope.get("partial_rotary_factor", 1) != 1:
        rope.refuse("partial_rotary_factor", "is not supported: every head is rotated whole")
    for name, value in rope.values.items():
        if isinstance(value, Mapping):
            rope.refuse(name, "is not supported: all layers rotate alike")


def _kind(rope: Fields) -> str:
    """`rope_type`, whose older name is `type`."""
    kind, older = rope.get("rope_type"), rope.get("type")
    if None not in (kind, older) and kind != older:
        rope.refuse("rope_type", f"differs from type={older!r}")
    kind = kind or older
    if kind is None and rope.get("factor", 1) != 1:
        rope.refuse("factor", "has no rope_type beside it")
    if kind not in (None, "default", "linear", "llama3"):
        raise UnsupportedModelError(
            f"{rope.where}: rope_type={kind!r} is not supported; supported: default, linear, llama3"
        )
    return kind or "default"


def _stated_once(name: str, rope: Fields, raw: Fields, default: float) -> float:
    """A number that stands in the section or beside it."""
    inner, outer = (fields.number(name, default) for fields in (rope, raw))
    if rope.get(name) is None:
        return outer
    if raw.get(name) is not None and inner != outer:
        rope.refuse(name, f"differs from {name}={outer} outside")
    return inner


def _original_length(rope: Fields, raw: Fields) -> float:
    """Without the field it is the model's length, as transformers has it."""
    return _stated_once("original_max_position_embeddings", rope, raw, raw.count("max_position_embeddings"))


def _llama3_factors(
    rope: Fields, factor: float, theta: float, original_length: float, head_dim: int
) -> tuple[float, ...]:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones are left alone, and those between are
    interpolated."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor={low}")
    inv_freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_length * inv_freq / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / ((1.0 - smooth) / factor + smooth)).tolist())
