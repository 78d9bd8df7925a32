"""What a request asks to be kept in the store for a time: `Pin`."""

from __future__ import annotations

import dataclasses
import math

from sparsex_jax.config.checks import is_number, require

MAX_PIN_KEY = 512  # characters
MAX_PIN_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Pin:
    """Keep the pages of a prompt and its answer on the devices until a time is over, or the pin is released.

    A later prompt of the same key and namespace moves the pin to its own pages once it is answered, and the time begins
    anew.

    Attributes:
      key: names the pin. None: the request's id does.
      ttl_s: for how many seconds, more than 0 and a day at most. None: as long as the key's pin was made for; if the
        key has none, nothing is pinned.
    """

    key: str | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequestError: a field is out of its limits, or both are None."""
        key, seconds = self.key, self.ttl_s
        is_name = key is None or (isinstance(key, str) and 0 < len(key) <= MAX_PIN_KEY)
        require(is_name, f"key={key!r:.60} must be a string of 1 to {MAX_PIN_KEY} characters, or None")
        is_time = seconds is None or (is_number(seconds) and math.isfinite(seconds) and 0 < seconds <= MAX_PIN_SECONDS)
        require(is_time, f"ttl_s={seconds!r:.60} must be more than 0 and at most {MAX_PIN_SECONDS} seconds, or None")
        require(key is not None or seconds is not None, "a pin needs a key or ttl_s")
        object.__setattr__(self, "ttl_s", seconds if seconds is None else float(seconds))
