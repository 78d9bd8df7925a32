"""The pin that a request asks for, by OpenAI's names for what is to stay in a cache, and the pins that there are."""

from __future__ import annotations

import re
from typing import Any

from sparsex_jax.cache import PinState
from sparsex_jax.config import Pin
from sparsex_jax.config.pins import MAX_PIN_KEY, MAX_PIN_SECONDS
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.scheduler.pinning import Pinning, PinRefused, PinShare
from sparsex_jax.serving import schemas
from sparsex_jax.serving.faults import RequestError

_UNITS = {"s": 1, "m": 60, "h": 3600}
_TTL = "prompt_cache_options.ttl"
DAY = "24h"


def pinning_of(request: schemas.Generate, share: PinShare) -> Pinning | None:
    """What pins the answers to a request. None: it asks for nothing of the kind.

    Args:
      share: of the key that asks.

    Raises:
      RequestError: a field is wrong, or the request asks to keep nothing.
    """
    key, options = request.prompt_cache_key or None, request.prompt_cache_options
    ttl_s = _seconds(options.ttl) if options else None
    if ttl_s is not None and request.keep is False:
        raise RequestError(f"{_TTL} and keep: false exclude each other: what is not kept cannot stay", param=_TTL)
    if ttl_s is None and key is not None and request.prompt_cache_retention == DAY:
        ttl_s = _seconds(DAY)
    if (key is None and ttl_s is None) or request.keep is False:
        return None
    return Pinning(_pin(key, ttl_s), share)


def _pin(key: str | None, ttl_s: float | None) -> Pin:
    if key is not None and len(key) > MAX_PIN_KEY:
        said = f"prompt_cache_key has {len(key)} characters; the limit is {MAX_PIN_KEY}"
        raise RequestError(said, param="prompt_cache_key", code="invalid_value")
    return Pin(key, ttl_s)


def _seconds(ttl: float | str | None) -> float | None:
    """Raises RequestError unless this is a time that a pin can have."""
    if ttl is None:
        return None
    written = re.fullmatch(r"(\d{1,9})([smh])", ttl, re.ASCII) if isinstance(ttl, str) else None
    seconds = int(written[1]) * _UNITS[written[2]] if written else ttl
    try:
        return Pin(ttl_s=seconds).ttl_s  # type: ignore[arg-type]
    except InvalidRequestError:
        said = f"{_TTL}={ttl!r:.60} must be seconds, or a time such as 30m or 24h: more than 0, and at most"
        raise RequestError(f"{said} {MAX_PIN_SECONDS} seconds", param=_TTL, code="invalid_value") from None


def pin_fields(pin: PinState | PinRefused) -> dict[str, Any]:
    """What a reply says of a pin."""
    if isinstance(pin, PinRefused):
        return {"pinned": False, "key": pin.key, "why": pin.why}
    return {"pinned": True} | entry_of(pin).model_dump(exclude={"object"})


def entry_of(pin: PinState) -> schemas.PinEntry:
    return schemas.PinEntry(
        key=pin.key, num_tokens=pin.num_tokens, pages=pin.num_pages, seconds_left=round(pin.seconds_left, 3)
    )
