"""One place that chooses between an operation's implementations."""

from collections.abc import Callable, Mapping
from typing import Any


def choose(operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None) -> Callable[..., Any]:
    """The implementation called `name`, or the portable `xla` one for None.

    Raises:
      ValueError: the operation has none of that name; the message lists those it has.
    """
    name = name or "xla"
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; it has: {', '.join(implementations)}")
    return implementations[name]
