"""Whether the server lives, and whether it takes requests: for probes, load balancers and systemd's watchdog.

    state       live    ready   what it means
    ok          yes     yes     requests are taken
    draining    yes     no      it ends soon: what runs is finished, and nothing new is taken
    hung        no      no      the loop has worked for longer than `Limits.hang_timeout` without getting anything done
    failed      no      no      the loop broke

A server that is not live does not recover, so it should be started again. While programs are compiled before it
listens, probes cannot connect.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from sparsex_jax.serving import schemas
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.faults import json_response
from sparsex_jax.serving.routing import ERRORS, Served
from sparsex_jax.serving.worker import Worker

LIVE, READY = ("ok", "draining"), ("ok",)  # the states in which it is

router = APIRouter(responses=ERRORS)


def state_of(worker: Worker, limits: Limits) -> str:
    """What `schemas.Health.status` says. From any thread."""
    if worker.failure is not None:
        return "failed"
    if worker.busy_s > limits.hang_timeout:
        return "hung"
    return "draining" if worker.draining else "ok"


@router.get("/health", response_model=schemas.Health)
async def health(service: Served) -> Response:
    """As `/health/ready`."""
    return _answer(service, READY)


@router.get("/health/live", response_model=schemas.Health)
async def live(service: Served) -> Response:
    """200 unless the server hangs or has failed, and must be started again."""
    return _answer(service, LIVE)


@router.get("/health/ready", response_model=schemas.Health)
async def ready(service: Served) -> Response:
    """200 while the server takes requests, 503 otherwise."""
    return _answer(service, READY)


def _answer(service: Served, good: tuple[str, ...]) -> Response:
    state = state_of(service.worker, service.limits)
    return json_response({"status": state}, 200 if state in good else 503)
