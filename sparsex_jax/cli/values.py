"""What the texts of options mean that stand for more than themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsex_jax.config.checks import require


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """What each adapter is loaded from, by its name.

    >>> parse_adapters(["sql=adapters/sql", "chat=me/chat@main"])
    {'sql': 'adapters/sql', 'chat': 'me/chat@main'}
    """
    adapters: dict[str, str] = {}
    for text in texts:
        name, _, source = text.partition("=")
        require(bool(name and source), f"adapter={text!r} must be NAME=PATH, such as sql=adapters/sql")
        require(name not in adapters, f"adapter={text!r}: there is another adapter of the name {name!r}")
        adapters[name] = source
    return adapters


_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(name: str, text: str) -> int:
    """A number of bytes, with or without a unit.

    >>> parse_bytes("host_store", "1.5GiB")
    1610612736
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    ok = found is not None and (found[2] or "B") in _UNITS
    require(ok, f"{name}={text!r} must be a number with one of the units {', '.join(_UNITS)}")
    assert found is not None
    return int(float(found[1]) * _UNITS[found[2] or "B"])


def parse_disk_store(text: str) -> tuple[str, int]:
    """A path and a number of bytes.

    >>> parse_disk_store("kv:1KiB")
    ('kv', 1024)
    """
    path, colon, size = text.rpartition(":")
    require(bool(path and colon), f"disk_store={text!r} must be PATH:SIZE, such as kv:200GiB")
    return path, parse_bytes("disk_store", size)
