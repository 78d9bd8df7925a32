"""Checks that every configuration makes of its fields."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from sparsex_jax.errors import InvalidRequestError

FLOATS = ("float32", "bfloat16", "float16")  # of weights that are not quantised, and of activations


def require(ok: bool, message: str) -> None:
    """Raise InvalidRequestError with this message unless it is ok."""
    if not ok:
        raise InvalidRequestError(message)


def counted(number: int, noun: str) -> str:
    """A number of things in words.

    >>> counted(1, "request"), counted(2, "request")
    ('1 request', '2 requests')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


class Limit(NamedTuple):
    """The values that a field may have, as metadata of its annotation: `ratio: Annotated[float, Limit(...)]`.

    Attributes:
      says: completes the sentence "ratio=2 must be ...".
    """

    accepts: Callable[[Any], bool]
    says: str


def at_least(least: int) -> Limit:
    return Limit(lambda value: is_int(value) and value >= least, f"an integer >= {least}")


def one_of(*choices: str) -> Limit:
    return Limit(lambda value: value in choices, f"one of {', '.join(choices)}")


Count = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
NotNegative = Annotated[float, Limit(lambda value: is_number(value) and value >= 0, "a number >= 0")]
AboveZero = Annotated[float, Limit(lambda value: is_number(value) and value > 0, "a number > 0")]
Share = Annotated[float, Limit(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")]
Flag = Annotated[bool, Limit(lambda value: isinstance(value, bool), "True or False")]


def checked(config: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for a dataclass, with plain numbers instead of NumPy's, since `json` can write only plain ones.

    Fields without a `Limit` are not checked. Those annotated `Count | None` may be None.

    Raises:
      InvalidRequestError: a value is outside its limit; the message begins with `field=value`.
    """
    limits = _limits(config)
    return {name: _checked(name, value, *limits[name]) if name in limits else value for name, value in options.items()}


def _checked(name: str, value: Any, kind: type, limit: Limit, optional: bool) -> Any:
    if optional and value is None:
        return None
    require(limit.accepts(value), f"{name}={value!r} must be {limit.says}{' or None' if optional else ''}")
    return kind(value)


@functools.cache
def _limits(config: type) -> dict[str, tuple[type, Limit, bool]]:
    """For each field that has a limit: the plain type, the limit, and whether it may be None."""
    hints = typing.get_type_hints(config, include_extras=True)
    found = {field.name: _limit_of(hints[field.name]) for field in dataclasses.fields(config)}
    return {name: limit for name, limit in found.items() if limit}


def _limit_of(hint: Any) -> tuple[type, Limit, bool] | None:
    alternatives = (hint,) if typing.get_origin(hint) is Annotated else typing.get_args(hint)
    for each in alternatives:
        if typing.get_origin(each) is Annotated and isinstance(each.__metadata__[0], Limit):
            return each.__origin__, each.__metadata__[0], type(None) in alternatives
    return None
