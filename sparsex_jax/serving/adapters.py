"""Loads and unloads adapters while the server runs, as vLLM's endpoints do, if it was started so."""

from __future__ import annotations

import asyncio

from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from sparsex_jax.checkpoints.adapters import read_adapter
from sparsex_jax.errors import HubError, UnknownModelError, UnsupportedModelError
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.serving import extras
from sparsex_jax.serving.access import ForbiddenError, Tenant
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.routing import Caller, Served, keyed_router
from sparsex_jax.serving.schemas import Object, Text
from sparsex_jax.serving.service import Service

router = keyed_router()


class LoadRequest(Object):
    """An adapter to load: requests name it as their model from then on."""

    lora_name: Text
    lora_path: Text = Field(description="A directory on the server, or a name on the hub: OWNER/NAME[@REVISION].")


class UnloadRequest(Object):
    lora_name: Text


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadRequest, service: Served, tenant: Caller) -> Response:
    """Load an adapter in PEFT's format."""
    _check_permission(service, tenant)
    extras.forbid(body)
    name, source = body.lora_name, body.lora_path
    async with service.models.loading:
        service.models.check_new(name)
        weights = await asyncio.to_thread(_read, source, service)
        service.worker.require_open()
        await service.call(service.models.load, name, source, weights)
    service.metrics.expect_adapter(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadRequest, service: Served, tenant: Caller) -> Response:
    """Unload an adapter that no request uses, and forget what was computed under it."""
    _check_permission(service, tenant)
    extras.forbid(body)
    with service.models.leaving(body.lora_name):
        await service.call(service.models.unload, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


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
