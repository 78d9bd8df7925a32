"""JSON as a model or a client writes it, read so that what was read can be written again: no NaN, no infinities."""

from __future__ import annotations

import json
import math


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is beyond the range of floats")
    return value


DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
# Models write line breaks into strings as they are, so control characters are allowed.
LENIENT_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_finite)
