"""`Fields` reads what a model's files say about it, and refuses a field that is missing or wrong by its name."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from sparsex_jax.config.checks import is_int, is_number
from sparsex_jax.errors import UnsupportedModelError

MAX_COUNT = 2**31 - 1  # sizes and ids are int32 on the devices


class Fields:
    """The fields of one object in a file. One that is null counts as missing.

    All methods raise UnsupportedModelError, whose message begins with the file and names the field.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        """
        Args:
          where: the file, and the object within it if it is not the whole file.
        """
        self.where, self.values = where, values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """An integer from 1 to `MAX_COUNT`. Without a default the field must be there."""
        value = self._required(name, default)
        if not is_int(value) or not 1 <= value <= MAX_COUNT:
            self.refuse(name, f"must be an integer from 1 to {MAX_COUNT}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0. Without a default the field must be there."""
        value = self._required(name, default)
        if not is_number(value) or not 0 < value < math.inf:
            self.refuse(name, "must be a finite number above 0")
        return _float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "must be text")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The ids of a field that has one, several or none. Those that no token can have, such as -1, are left out."""
        value = self.get(name, [])
        ids = value if isinstance(value, (list, tuple)) else [value]
        if not all(is_int(id_) for id_ in ids):
            self.refuse(name, "must be a token id or a list of them")
        return tuple(int(id_) for id_ in ids if 0 <= id_ <= MAX_COUNT)

    def object(self, name: str) -> Fields:
        """The fields of an object within this one; none if it is missing."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            self.refuse(name, "must be an object")
        return Fields(f"{self.where}: {name}", value)

    def refuse(self, name: str, says: str) -> NoReturn:
        """Raise an error that completes the sentence "file: name=value ..."."""
        raise UnsupportedModelError(f"{self.where}: {name}={reprlib.repr(self.values.get(name))} {says}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise UnsupportedModelError(f"{self.where} has no {name}, which is needed")
        return value


def _float(value: Any) -> float:
    """As float64; an integer beyond its range becomes infinite instead of an error."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
