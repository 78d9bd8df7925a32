"""Loads and unloads adapters while the server runs, as vLLM's endpoints do, if it was started so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from sparsex_jax.checkpoints.adapters import read_adapter
from sparsex_jax.config.checks import counted
from sparsex_jax.errors import (
    AdapterInUseError,
    HubError,
    InvalidRequestError,
    UnknownModelError,
    UnsupportedModelError,
)
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.serving import extras
from sparsex_jax.serving.access import ForbiddenError, Tenant
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.routing import Caller, Served, keyed_router
from sparsex_jax.serving.schemas import Object, Text
from sparsex_jax.serving.service import Service

router = keyed_router()

_WAIT_S = 30.0  # for the requests of an adapter that is to be unloaded
_MOST_S = 3600.0
_MOMENT_S = 0.05  # between two looks at whether they have ended


class LoadRequest(Object):
    """An adapter to load: requests name it as their model from then on."""

    lora_name: Text
    lora_path: Text = Field(description="A directory on the server, or a name on the hub: OWNER/NAME[@REVISION].")


class UnloadRequest(Object):
    """An adapter to unload: no request can name it from then on, and those that are under way are answered first."""

    lora_name: Text
    timeout_s: float | None = Field(
        None, ge=0, le=_MOST_S, allow_inf_nan=False, description="For how many seconds at most; by default 30."
    )


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadRequest, service: Served, tenant: Caller) -> Response:
    """Load an adapter in PEFT's format."""
    _check_permission(service, tenant)
    extras.forbid(body)
    name, source = body.lora_name, body.lora_path
    async with service.models.loading:
        with _about("lora_name"):
            service.models.check_new(name)
        weights = await asyncio.to_thread(_read, source, service)
        service.worker.require_open()
        with _about("lora_path"):
            await service.call(service.models.load, name, source, weights)
    service.metrics.expect_adapter(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadRequest, service: Served, tenant: Caller) -> Response:
    """Unload an adapter once its requests have ended, and forget what was computed under it."""
    _check_permission(service, tenant)
    extras.forbid(body)
    with service.models.leaving(body.lora_name):
        await _unload(body.lora_name, _WAIT_S if body.timeout_s is None else body.timeout_s, service)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _unload(name: str, timeout_s: float, service: Service) -> None:
    """Raises AdapterInUseError if requests with it are still under way then, and DrainingError if the server stops."""
    until = time.monotonic() + timeout_s
    while not await _is_unloaded(name, service):
        service.worker.require_open()
        if time.monotonic() >= until:
            left = counted(max(service.models.num_requests(name), 1), "request")
            raise AdapterInUseError(
                f"adapter {name!r} cannot be unloaded: {left} with it did not end within timeout_s={timeout_s:g}. "
                f"It takes requests again"
            )
        await asyncio.sleep(_MOMENT_S)


async def _is_unloaded(name: str, service: Service) -> bool:
    """Unload it if nothing uses it. The loop may still have what a request left behind that ended."""
    if service.models.num_requests(name):
        return False
    try:
        await service.call(service.models.unload, name)
    except AdapterInUseError:
        return False
    return True


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """What is refused within is refused because of this field."""
    try:
        yield
    except InvalidRequestError as error:
        raise RequestError(str(error), param=field, code="invalid_value") from error


def _read(source: str, service: Service) -> AdapterWeights:
    """Raises RequestError if it cannot be read, or does not fit the model."""
    try:
        return read_adapter(source, service.worker.engine.model, base=service.model)
    except (UnknownModelError, UnsupportedModelError, HubError) as error:
        code, status = _CODES[type(error)]
        raise RequestError(str(error), param="lora_path", code=code, status=status) from error


_CODES: dict[type[Exception], tuple[str, int]] = {
    UnknownModelError: ("adapter_not_found", 404),
    UnsupportedModelError: ("unsupported_adapter", 400),
    HubError: ("hub_unavailable", 502),
}


def _check_permission(service: Service, tenant: Tenant) -> None:
    """Raises ForbiddenError."""
    if not service.allow_adapter_updates:
        raise ForbiddenError(
            "this server neither loads nor unloads adapters while it runs: it was started without "
            "--allow-adapter-updates"
        )
    if not tenant.adapters:
        raise ForbiddenError("this key may not load and unload adapters; its entry needs adapters = true")
