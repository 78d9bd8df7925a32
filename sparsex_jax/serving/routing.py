"""What routes are made of: the key is checked before the body is read, and the body before the endpoint gets it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.responses import Response

from sparsex_jax.serving import schemas
from sparsex_jax.serving.access import Tenant
from sparsex_jax.serving.bodies import Checked
from sparsex_jax.serving.exchange import Exchange
from sparsex_jax.serving.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorResponse, "description": "The request is refused; the message says why."},
    "5XX": {"model": schemas.ErrorResponse, "description": "Overload, shutdown, a time limit or a fault."},
}


async def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


class Keyed(APIRoute):
    """A route that needs an API key. The key is checked before the body is read, and the body before FastAPI sees it,
    which would check it on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model: Any = self.body_field and self.body_field.field_info.annotation

        async def answer(request: Request) -> Response:
            service: Service = request.app.state.service
            tenant = service.access.tenant(request.headers.get("authorization"), request.headers.get("x-api-key"))
            request.state.tenant, Exchange.of(request.scope).key = tenant, tenant.name
            if model is None:
                return await handle(request)
            return await handle(Checked(request, await service.bodies.checked(request, model)))

        return answer


async def _tenant(request: Request, _: Annotated[Any, Security(HTTPBearer(auto_error=False))]) -> Tenant:
    return request.state.tenant


Caller = Annotated[Tenant, Depends(_tenant)]
Salt = Annotated[str | None, Query(min_length=1, description="As `cache_salt` of the request that stored it.")]


def keyed_router() -> APIRouter:
    """A router of endpoints that need an API key."""
    return APIRouter(responses=ERRORS, route_class=Keyed)
