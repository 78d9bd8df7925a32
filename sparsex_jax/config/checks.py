"""Checks that every configuration makes of its fields."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsex_jax.errors import InvalidRequestError


def require(ok: bool, message: str) -> None:
    """Raise InvalidRequestError with this message unless it is ok."""
    if not ok:
        raise InvalidRequestError(message)


def is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
