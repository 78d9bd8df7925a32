"""One place that chooses between an operation's implementations.

An implementation says that it cannot do a shape or dtype by raising `NotImplementedError` while it is traced; the
next one in the order of preference is tried then.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

# The switch: what is chosen unasked, by operation. A kernel enters once its `-m gpu` tests passed on a real device (an
# H100, for all of these); until then it runs only by name. Order does not matter here.
SEEN_RIGHT: Mapping[str, frozenset[str]] = {
    "paged_attention": frozenset({"hopper", "triton"}),
    "key_mass": frozenset({"hopper", "triton"}),
    "align_and_copy": frozenset({"hopper", "triton"}),
    "write_kv": frozenset({"hopper", "triton"}),
    "linear": frozenset({"hopper"}),
    "gated_linear": frozenset({"hopper"}),
}

_preferred: ContextVar[tuple[str, ...] | None] = ContextVar("preferred", default=None)


def choose(operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None) -> Callable[..., Any]:
    """The implementation called `name`; for None, one that tries those of `preference` in their order.

    Raises:
      ValueError: the operation has none of that name; the message lists those it has.
    """
    if name is None:
        return _first_able(operation, implementations)
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; it has: {', '.join(implementations)}")
    return implementations[name]


@contextlib.contextmanager
def prefer(*names: str) -> Iterator[None]:
    """Within this context, operations are traced with the first of `names` that they have and that is able.

    Without `xla` among them, what none of them can do raises. Already compiled functions are not traced again.
    The environment variable `SPARSEX_KERNELS`, names between commas, does the same for the whole process.
    """
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


def preference(operation: str) -> tuple[str, ...]:
    """Names of implementations in the order they are tried: by `prefer`, the environment, or the device."""
    if (names := _preferred.get()) is not None:
        return names
    if names := tuple(filter(None, os.environ.get("SPARSEX_KERNELS", "").split(","))):
        return names
    seen_right = SEEN_RIGHT.get(operation, frozenset())
    return (*(name for name in _made_for(jax.devices()[0]) if name in seen_right), "xla")


def _made_for(device: jax.Device) -> tuple[str, ...]:
    """The implementations made for a device, fastest first."""
    if device.platform == "tpu":
        return ("tpu",)
    if device.platform != "gpu":
        return ()
    capability = str(getattr(device, "compute_capability", ""))
    if capability.startswith("9."):
        return ("hopper", "triton")
    return ("triton",) if capability.startswith(("8.", "10.", "12.")) else ()


def _first_able(operation: str, implementations: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        reasons = []
        for name in preference(operation):
            if name in implementations:
                try:
                    return implementations[name](*args, **options)
                except NotImplementedError as error:
                    reasons.append(f"{name}: {error}")
        raise NotImplementedError(f"{operation} cannot be done: {'; '.join(reasons) or 'nothing preferred is there'}")

    return call
