"""The fleet on Ray Serve: engines as replicas of one deployment, fronts as replicas of another.

    client -- Serve's HTTP proxy -- front -- handle of the engines, by `Addressed` -- a replica with an engine

Serve starts replicas, looks after their health, replaces those that die, scales and drains them. Which of them gets a
request is decided by the front's `Router`; the request router that Serve has us plug in only delivers it there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.config.checks import AboveZero, NotNegative, Positive, checked, require
from sparsex_jax.engine import Engine
from sparsex_jax.errors import AddressError
from sparsex_jax.routing import Policy, Position, Router, SegmentPolicy, Sketch
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.exchange import ID_HEADER
from sparsex_jax.serving.faults import ReplicaLostError
from sparsex_jax.serving.fleet import roster
from sparsex_jax.serving.fleet.addressed import Addressed
from sparsex_jax.serving.fleet.front import Front
from sparsex_jax.serving.fleet.kv_events import KvEventsConfig
from sparsex_jax.serving.fleet.peers import PeerConfig
from sparsex_jax.serving.fleet.preview import Preview
from sparsex_jax.serving.fleet.replica import Forwarded, Replica, Told
from sparsex_jax.serving.worker import Worker
from sparsex_jax.text.thoughts import AUTO

_NOBODY = ""  # the address of calls that any replica may take
_SPARE = 64  # calls beside requests that a replica takes at once
_TRIES = 3

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """What all replicas and fronts share. It travels to them by pickle.

    Attributes:
      model: what `load` loads; fronts read its tokenizer.
      name: the model's name in requests.
      load: makes an engine.
      prepare: is given the engine before it takes requests, to compile its programs. None: nothing is done.
      sketch: how digests are made.
      policy: how fronts choose. None: `SegmentPolicy` with its defaults.
      limits, api_keys, reasoning_parser: as for `create_app`. Limits of a key count at each replica.
      events: where replicas publish KV events; a TCP port is that of rank 0, and rank i has the one i later. None:
        nowhere.
      peers: how replicas get blocks from each other. None: they do not.
      period_s: fronts ask replicas for news so often.
    """

    model: str
    name: str
    load: Callable[[], Engine]
    sketch: Sketch
    prepare: Callable[[Engine], None] | None = None
    policy: Policy | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    api_keys: Path | None = None
    reasoning_parser: str = AUTO
    events: KvEventsConfig | None = None
    peers: PeerConfig | None = None
    period_s: float = 0.25

    def access(self) -> Access:
        return Access.load(self.api_keys, self.limits) if self.api_keys else Access.open(self.limits)


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """How many replicas there are, and what each takes of the cluster.

    Attributes:
      min_replicas, max_replicas: equal ones are a fixed number.
      target_ongoing_requests: Serve adds replicas above so many requests each, and removes them below.
      upscale_delay_s, downscale_delay_s: for how long it must be so. A replica that goes takes its store with it.
      num_cpus, num_gpus: of each replica.
      num_fronts: replicas of the front.
      health_period_s: replicas are asked so often whether they are well.
    """

    min_replicas: Positive = 2
    max_replicas: Positive = 2
    target_ongoing_requests: AboveZero = 8.0
    upscale_delay_s: NotNegative = 10.0
    downscale_delay_s: NotNegative = 600.0
    num_cpus: NotNegative = 1.0
    num_gpus: NotNegative = 0.0
    num_fronts: Positive = 1
    health_period_s: AboveZero = 5.0

    def __post_init__(self) -> None:
        checked(type(self), vars(self))
        require(self.min_replicas <= self.max_replicas, f"max_replicas={self.max_replicas} is less than min_replicas")

    def of_replicas(self) -> dict[str, Any]:
        """Serve's options for their number."""
        if self.min_replicas == self.max_replicas:
            return {"num_replicas": self.min_replicas}
        scaling = AutoscalingConfig(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            target_ongoing_requests=self.target_ongoing_requests,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
        )
        return {"autoscaling_config": scaling}


# Calls to one replica ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Address:
    """The first argument of each call to the engines: who is to take it. If that one is gone, anybody does."""

    replica: str = _NOBODY


class RayBackend:
    """Reaches engines through their deployment's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._name = handle, handle.deployment_name

    async def start(self) -> None:
        """Wait until a replica is there. This makes the handle's router, which all calls then share."""
        await self._handle.ready.remote(Address())
        self._answers = self._handle.options(stream=True)

    def replicas(self) -> list[str]:
        return roster.names_of(self._name)

    async def send(self, replica: str, request: Forwarded) -> AsyncGenerator[str | Message]:
        answer, is_over = self._answers.answer.remote(Address(replica), request), False
        try:
            async for message in answer:
                yield message
            is_over = True
        except RayTaskError:
            is_over = True
            raise
        except RayError as error:  # of the actor, its process or its node
            is_over = True
            said = f"replica {replica} was lost, and this request with it; others take requests"
            raise ReplicaLostError(said) from error
        finally:
            if not is_over:
                answer.cancel()

    async def tell(self, replica: str, position: Position) -> Told:
        teller, told = await self._handle.tell.remote(Address(replica), position)
        if teller != replica:
            raise ReplicaLostError(f"replica {replica} is gone")
        return told


# Deployments ------------------------------------------------------------------------------------------------


class EngineReplica:
    """A replica of the deployment of engines."""

    async def __init__(self, config: FleetConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        self._name, self._config = context.replica_id.unique_id, config
        engine = await asyncio.to_thread(config.load)
        if config.prepare is not None:
            await asyncio.to_thread(config.prepare, engine)
        worker = Worker(engine)
        about: dict[str, Any] = {"limits": config.limits, "reasoning_parser": config.reasoning_parser}
        app = create_app(worker, model=config.name, access=config.access(), **about)
        told: dict[str, Any] = {"events": config.events, "rank": context.rank.rank, "peers": _on_node(config.peers)}
        self._replica = Replica(app, worker, config.sketch, limits=config.limits, **told)
        await self._replica.__aenter__()

    async def answer(self, address: Address, request: Forwarded) -> AsyncGenerator[str | Message]:
        yield self._name
        async for message in self._replica.answer(request):
            yield message

    async def tell(self, address: Address, position: Position) -> tuple[str, Told]:
        return self._name, await self._replica.tell(position)

    async def ready(self, address: Address) -> str:
        return self._name

    async def check_health(self) -> None:
        if not self._replica.is_live():
            raise RuntimeError("the serving loop hangs or has failed")

    async def __del__(self) -> None:
        """Serve awaits this once all requests have ended, or their time to drain is over."""
        if hasattr(self, "_replica"):  # it could be made
            await self._replica.__aexit__()


def _on_node(peers: PeerConfig | None) -> PeerConfig | None:
    """At an address of this node, if none is given."""
    if peers is None or peers.host is not None:
        return peers
    return dataclasses.replace(peers, host=ray.util.get_node_ip_address())


class FrontReplica:
    """A replica of the deployment of fronts."""

    def __init__(self, config: FleetConfig, engines: DeploymentHandle) -> None:
        checkpoint = open_checkpoint(config.model)
        preview = Preview(checkpoint.tokenizer, checkpoint.config, config.sketch, config.reasoning_parser)
        router, access = Router(config.policy or SegmentPolicy()), config.access()
        about: dict[str, Any] = {"access": access, "limits": config.limits, "period_s": config.period_s}
        about["dropped"] = (ID_HEADER.encode(),)  # Serve's proxy adds it
        self._front = Front(router, preview, RayBackend(engines), **about)

    def __serve_build_asgi_app__(self) -> Front:
        return self._front


def connect(address: str | None = None, **options: Any) -> None:
    """Connect to a cluster, or start one on this machine, in several tries: Ray gives up after 30 s, and starting takes
    longer where other programs have the processors.

    Args:
      address: of a cluster. None: one is started.
      options: as of `ray.init`.

    Raises:
      AddressError: there is no cluster at the address, or none could be started.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            ray.init(address=address, include_dashboard=False, **options)
            return
        except Exception as error:  # Ray has no class for it
            ray.shutdown()
            if address is not None or not tries_left:
                raise AddressError(f"address={address!r}: Ray cannot be reached or started: {error}") from error
            log.warning("Ray could not be started, and is tried again: %s", error)


def application(config: FleetConfig, scale: ScaleConfig) -> serve.Application:
    """What `serve.run` takes."""
    most = config.limits.max_concurrent or 512
    engines = serve.deployment(
        EngineReplica,
        name="engines",
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=Addressed),
        max_ongoing_requests=most + _SPARE,
        health_check_period_s=scale.health_period_s,
        logging_config={"enable_access_log": False},  # fronts ask each replica several times a second
        graceful_shutdown_timeout_s=config.limits.drain_timeout,
        **scale.of_replicas(),
    )
    fronts = serve.deployment(
        serve.ingress()(FrontReplica),
        name="fronts",
        num_replicas=scale.num_fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,
    )
    return fronts.bind(config, engines.bind(config))
