"""The replicas of a deployment, as the request router of this process sees them.

Serve sends the class of a request router to other processes by value, with a copy of its module's variables. So this
cannot be a variable of that module: it would be another one than the front reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

_NAMES_OF: dict[str, Callable[[], Iterable[str]]] = {}


def enroll(deployment: str, names: Callable[[], Iterable[str]]) -> None:
    """This function gives the names of the replicas that take requests now."""
    _NAMES_OF[deployment] = names


def names_of(deployment: str) -> list[str]:
    """The names of those that take requests now; none if nothing was enrolled yet."""
    return list(_NAMES_OF.get(deployment, list)())
