"""Where operations run, and which of their implementations runs there.

An operation has several implementations, by name: `reference`, `xla`, `hopper`, `triton`, `tpu`. A `Backend` names the
device and, through it or through `prefer`, the order in which they are tried. An implementation that cannot do a shape
or dtype raises `NotImplementedError` while it is traced; the next one of the order is then tried.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

logger = logging.getLogger(__name__)

# The kernels that run without being asked for, by operation. A kernel is added once its tests (`pytest -m gpu`) have
# passed on a real device, an H100 or H200 for all of these. Until then it runs only where `prefer`,
# `implementation=` or `SPARSEX_KERNELS` names it. The `tpu` versions of linear layers are XLA's own products, and what
# moves Y is XLA's on all devices: it is a hundredth of what K and V are.
VALIDATED: Mapping[str, frozenset[str]] = {
    "paged_attention": frozenset({"hopper", "triton"}),
    "low_rank_attention": frozenset({"hopper"}),  # `paged_attention` with adapters
    "key_mass": frozenset({"hopper", "triton"}),
    "align_and_copy": frozenset({"hopper", "triton"}),
    "pack_rows": frozenset({"hopper"}),
    "write_kv": frozenset({"hopper", "triton"}),
    "write_low_rank": frozenset({"hopper", "triton", "tpu"}),
    "copy_low_rank": frozenset({"hopper", "triton", "tpu"}),
    "pack_low_rank": frozenset({"hopper", "triton", "tpu"}),
    "linear": frozenset({"hopper", "tpu"}),
    "gated_linear": frozenset({"hopper", "tpu"}),
    "grouped_linear": frozenset({"hopper", "tpu"}),
    "gated_grouped_linear": frozenset({"hopper", "tpu"}),
    "add_norm": frozenset({"hopper"}),
    "rotate_and_write": frozenset({"hopper"}),
}

# Operations whose versions in XLA do the same work in more launches. That XLA does them is no reason to warn.
FUSIONS = frozenset({"add_norm", "rotate_and_write"})

Implementations = Mapping[str, Callable[..., Any]]

_preferred: ContextVar[tuple[str, ...] | None] = ContextVar("preferred", default=None)


class FallbackWarning(UserWarning):
    """An operation runs in plain XLA on a GPU or TPU, because no kernel made for the device can do it."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """The device that operations are traced for, and the implementations to try on it.

    Hashable, so that it can be a static argument of a jitted step: steps for two backends are compiled apart.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      capability: the CUDA compute capability of a GPU, such as `9.0`; else empty.
      preferred: names of implementations, tried in this order in every operation that has them. None: the kernels
        made for the device that are `VALIDATED`, fastest first, then `xla`.
      spared: multiprocessors of a GPU that products of many rows leave to what runs beside them, such as collectives.
    """

    platform: str
    capability: str = ""
    preferred: tuple[str, ...] | None = None
    spared: int = 0

    @classmethod
    def of(cls, device: jax.Device) -> "Backend":
        """The backend of a device, with what `prefer` or the environment variable `SPARSEX_KERNELS` says now."""
        capability = str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
        return cls(device.platform, capability, _preferred_now())

    @property
    def interpreted(self) -> bool:
        """Whether kernels made for GPUs are interpreted rather than compiled: wherever there is no GPU."""
        return self.platform == "cpu"

    @property
    def kernels(self) -> tuple[str, ...]:
        """The implementations that are made for the device, fastest first, validated or not."""
        if self.platform == "tpu":
            return ("tpu",)
        if self.platform == "gpu" and self.capability.startswith("9."):
            return ("hopper", "triton")
        if self.platform == "gpu" and self.capability.startswith(("8.", "10.", "12.")):
            return ("triton",)
        return ()

    def order(self, operation: str) -> tuple[str, ...]:
        """Names of implementations in the order in which they are tried."""
        if self.preferred is not None:
            more = operation in FUSIONS and "xla" not in self.preferred
            return (*self.preferred, "xla") if more else self.preferred
        return (*(name for name in self.kernels if name in VALIDATED[operation]), "xla")

    def passed_over(self, operation: str) -> tuple[str, ...]:
        """Why kernels made for the device are not in the order, one reason each."""
        if self.preferred is not None or self.platform == "cpu":
            return ()
        if not self.kernels:
            return (f"no kernels are made for {self}",)
        missing = [name for name in self.kernels if name not in VALIDATED[operation]]
        return tuple(f"{name}: no version of it has been validated on a device" for name in missing)

    def __str__(self) -> str:
        return f"{self.platform} {self.capability}".strip()


def default_backend() -> Backend:
    """The backend of JAX's first device: what a direct call of an operation assumes unless it is given another."""
    return Backend.of(jax.devices()[0])


@contextlib.contextmanager
def prefer(*names: str) -> Iterator[None]:
    """A `Backend` made within this context tries the implementations `names`, in their order, and no others.

    Operations that are called without a backend make theirs when they are traced; an engine makes its own once, when
    it is created, and does not look here again. Where `xla` is not among the names, an operation that none of them can
    do raises `NotImplementedError`, unless it is one of the `FUSIONS`. The environment variable `SPARSEX_KERNELS`,
    names between commas, does the same for the whole process.
    """
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


def _preferred_now() -> tuple[str, ...] | None:
    if (names := _preferred.get()) is not None:
        return names
    return tuple(filter(None, os.environ.get("SPARSEX_KERNELS", "").split(","))) or None


def late(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at its first call: to import the kernels of devices that a process does
    not have, and their compilers, takes half a second.

    Args:
      module: such as `sparsex_kernels.key_mass.hopper`.
    """

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return call


def run(operation: str, implementations: Implementations, name: str | None, args: Any, **options: Any) -> Any:
    """Trace the implementation called `name`, or for None the first of the backend's order that can do it.

    Args:
      args: the operation's arguments, a record that has the `backend`.

    Raises:
      ValueError: the operation has no implementation of that name; the message lists those it has.
      NotImplementedError: no implementation that may run can do this shape or dtype; the message says why.
    """
    if name is None:
        return _run_first_able(operation, implementations, args, **options)
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; it has: {', '.join(implementations)}")
    return implementations[name](args, **options)


def _run_first_able(operation: str, implementations: Implementations, args: Any, **options: Any) -> Any:
    backend: Backend = args.backend
    reasons = list(backend.passed_over(operation))
    for name in filter(implementations.__contains__, backend.order(operation)):
        try:
            result = implementations[name](args, **options)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
        else:
            report_choice(operation, name, backend, tuple(reasons))
            return result
    raise NotImplementedError(
        f"{operation} cannot be done: {'; '.join(reasons) or 'it has no implementation that is preferred'}"
    )


@functools.cache  # so that each choice is told once
def report_choice(operation: str, name: str, backend: Backend, reasons: tuple[str, ...]) -> None:
    """Log which implementation runs, and warn if it is XLA's on an accelerator for lack of a kernel."""
    logger.info("%s runs its implementation %r on %s", operation, name, backend)
    if name == "xla" and reasons and backend.platform != "cpu" and operation not in FUSIONS:
        message = f"{operation} runs in plain XLA on {backend}, not in a kernel: {'; '.join(reasons)}"
        warnings.warn(message, FallbackWarning, stacklevel=2)
