"""Rotary positions as a Hugging Face `config.json` describes them, by the rules of transformers' `modeling_rope_utils`.

A key in the store was rotated once, and may be rotated on to another position. So there is one table of frequencies for
all positions, and whatever depends on a length is fixed before anything is stored (`ModelConfig.for_context`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from sparsex_jax.config.checks import is_number
from sparsex_jax.config.fields import MAX_COUNT, Fields
from sparsex_jax.errors import UnsupportedModelError

DEFAULT_THETA = 10000.0
_SECTIONS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of older files
_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What rotary positions say of a model: fields of `ModelConfig` by the same names, which explains them."""

    max_position: int
    rope_theta: float
    rope_factors: tuple[float, ...] | None = None
    rotary_dim: int | None = None
    rope_attention_factor: float = 1.0
    rope_long_factors: tuple[float, ...] | None = None
    rope_original_length: int | None = None
    rope_dynamic_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class _Section:
    """One description of the rotation, and what stands around it.

    Attributes:
      rope: the section's own fields.
      raw: those of the whole configuration.
      dim: how many dimensions of a head are rotated.
    """

    rope: Fields
    raw: Fields
    theta: float
    dim: int

    @property
    def length(self) -> int:
        return self.raw.count("max_position_embeddings")

    def inv_freq(self) -> Float[np.ndarray, "pairs"]:
        return self.theta ** (-np.arange(0, self.dim, 2) / self.dim)

    def original_length(self) -> float:
        """Without the field it is the model's length, as transformers has it."""
        return _stated_once(_ORIGINAL, self.rope, self.raw, self.length)


def read_rotary(raw: Fields, head_dim: int, *, partial: bool = False, default_theta: float = DEFAULT_THETA) -> Rotary:
    """Rotary positions by either section of a `config.json`, or without one.

    Args:
      partial: models of this family may rotate a part of each head.
      default_theta: the base of a file that states none.

    Raises:
      UnsupportedModelError: a scaling that is not implemented, a field that is missing, or two statements that differ.
    """
    sections = {name: raw.object(name) for name in _SECTIONS if raw.get(name)}
    for fields in (raw, *sections.values()):
        if not partial and fields.get(_PARTIAL, 1) != 1:
            fields.refuse(_PARTIAL, "is not supported: every head is rotated whole")
    stated = {name: _rotary(section, raw, head_dim, default_theta) for name, section in sections.items()}
    if len(set(stated.values())) > 1:
        raise UnsupportedModelError(f"{raw.where}: {' and '.join(stated)} differ; one of them must go")
    return next(iter(stated.values()), None) or _rotary(Fields(raw.where, {}), raw, head_dim, default_theta)


def linear_factors(factor: float, dim: int) -> tuple[float, ...]:
    """All positions divided by a factor, for `dim` rotated dimensions."""
    return (float(factor),) * (dim // 2)


def dynamic_theta(theta: float, factor: float, length: int, trained: int, dim: int) -> float:
    """NTK scaling: the base with which positions up to `length` fit into what `trained` ones took (transformers'
    `_compute_dynamic_ntk_parameters`). Lengths up to `trained` leave it alone."""
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return float(theta * stretch ** (dim / (dim - 2)))


def longrope_attention_factor(factor: float, original_length: float) -> float:
    """What longrope multiplies queries and keys with, unless a file states another one (arXiv 2402.13753)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's recommendation (arXiv 2309.00071, equation 22) for what multiplies queries and keys."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_factors(
    theta: float,
    factor: float,
    original_length: float,
    dim: int,
    fast: float = 32,
    slow: float = 1,
    *,
    whole: bool = True,
) -> tuple[float, ...]:
    """YaRN's divisors: pairs that turn often over the original length are left alone, those that turn less than once
    are stretched by `factor`, and a ramp over the pairs' numbers leads from one to the other.

    Args:
      fast, slow: turns over the original length at which the ramp begins and ends.
      whole: it begins and ends at whole pairs.
    """

    def pair(turns: float) -> float:
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(fast), pair(slow)
    low, high = (math.floor(low), math.ceil(high)) if whole else (low, high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return tuple((1.0 / (ramp / factor + 1.0 - ramp)).tolist())


def _rotary(rope: Fields, raw: Fields, head_dim: int, default_theta: float) -> Rotary:
    for name, value in rope.values.items():
        if isinstance(value, Mapping):
            rope.refuse(name, "is not supported: all layers rotate alike")
    dim = _rotary_dim(rope, raw, head_dim)
    section = _Section(rope, raw, _stated_once("rope_theta", rope, raw, default_theta), dim)
    rotary = _KINDS[_kind(rope)](section)
    return rotary if dim == head_dim else dataclasses.replace(rotary, rotary_dim=dim)


def _rotary_dim(rope: Fields, raw: Fields, head_dim: int) -> int:
    """How many of a head's dimensions are rotated: all, or the first part."""
    part = _stated_once(_PARTIAL, rope, raw, 1.0)
    dim = int(head_dim * part)
    if not (part <= 1 and dim >= 2 and dim % 2 == 0):
        (rope if rope.get(_PARTIAL) is not None else raw).refuse(
            _PARTIAL, f"must leave an even number of dimensions from 2 to head_dim={head_dim}"
        )
    return dim


def _plain(section: _Section) -> Rotary:
    return Rotary(section.length, section.theta)


def _linear(section: _Section) -> Rotary:
    return Rotary(section.length, section.theta, linear_factors(section.rope.number("factor"), section.dim))


def _llama3(section: _Section) -> Rotary:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones are left alone, and those between are
    interpolated."""
    rope, factor = section.rope, section.rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor={low}")
    turns = section.original_length() * section.inv_freq() / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Rotary(section.length, section.theta, tuple((1.0 / ((1.0 - smooth) / factor + smooth)).tolist()))


def _yarn(section: _Section) -> Rotary:
    """The model takes `factor` times the original length, as vLLM has it: files often leave
    `max_position_embeddings` as it was."""
    rope, original = section.rope, section.original_length()
    factor = rope.number("factor", section.length / original)
    fast, slow = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    whole = rope.flag("truncate", True)
    return Rotary(
        max_position=min(max(section.length, int(original * factor)), MAX_COUNT),
        rope_theta=section.theta,
        rope_factors=yarn_factors(section.theta, factor, original, section.dim, fast, slow, whole=whole),
        rope_attention_factor=rope.number("attention_factor", _yarn_default(rope, factor)),
    )


def _yarn_default(rope: Fields, factor: float) -> float:
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return yarn_attention_factor(factor)
    ours, all_dims = (yarn_attention_factor(factor, rope.number(name)) for name in ("mscale", "mscale_all_dim"))
    return ours / all_dims


def _dynamic(section: _Section) -> Rotary:
    """Nothing is stretched up to the model's length; `for_context` says what longer contexts take."""
    if section.dim < 4:
        raise UnsupportedModelError(f"{section.rope.where}: rope_type='dynamic' needs 4 rotated dimensions or more")
    return Rotary(section.length, section.theta, rope_dynamic_factor=section.rope.number("factor"))


def _longrope(section: _Section) -> Rotary:
    rope, original = section.rope, section.original_length()
    factor = rope.number("factor", section.length / original)
    short, long = (_factors(rope, name, section.dim // 2) for name in ("short_factor", "long_factor"))
    default = longrope_attention_factor(factor, original)
    return Rotary(
        max_position=section.length,
        rope_theta=section.theta,
        rope_factors=short,
        rope_attention_factor=rope.number("attention_factor", default),
        rope_long_factors=long,
        rope_original_length=int(original),
    )


_KINDS: dict[str, Callable[[_Section], Rotary]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}


def _kind(rope: Fields) -> str:
    """`rope_type`, whose older name is `type`."""
    kind, older = rope.get("rope_type"), rope.get("type")
    if None not in (kind, older) and kind != older:
        rope.refuse("rope_type", f"differs from type={older!r}")
    kind = kind or older
    if kind is None and rope.get("factor", 1) != 1:
        rope.refuse("factor", "has no rope_type beside it")
    if kind is not None and kind not in _KINDS:
        raise UnsupportedModelError(
            f"{rope.where}: rope_type={kind!r} is not supported; supported: {', '.join(_KINDS)}"
        )
    return kind or "default"


def _factors(rope: Fields, name: str, pairs: int) -> tuple[float, ...]:
    """A list with a divisor for each rotated pair."""
    values = rope.get(name)
    if not isinstance(values, (list, tuple)) or len(values) != pairs:
        rope.refuse(name, f"must be a list of {pairs} numbers, one for each rotated pair")
    if not all(is_number(value) and 0 < value < math.inf for value in values):
        rope.refuse(name, "must have finite numbers above 0")
    return tuple(float(value) for value in values)


def _stated_once(name: str, rope: Fields, raw: Fields, default: float) -> float:
    """A number that stands in the section or beside it."""
    inner, outer = (fields.number(name, default) for fields in (rope, raw))
    if rope.get(name) is None:
        return outer
    if raw.get(name) is not None and inner != outer:
        rope.refuse(name, f"differs from {name}={outer} outside")
    return inner
