"""Serves a model by several engines behind one OpenAI endpoint, on Ray Serve.

    uv sync --extra ray
    uv run python scripts/serve_ray.py --replicas 2                       # SmolLM2 at http://127.0.0.1:8000/v1
    uv run python scripts/serve_ray.py MODEL --min-replicas 2 --max-replicas 16 --gpus-per-replica 1 \\
        --ray-address auto --host 0.0.0.0 --api-keys keys.toml --store-tokens 262144

Each request goes to the replica that holds most of its prompt's segments, unless its queue is too long
(`sparsex_jax/routing/`). `GET /v1/replicas` says what each one holds and has to do; the response's header
`x-sparsex-replica` names the one that answered. On a cluster, every node needs the package, the model and the file of
keys at the same paths.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# Else Ray has each worker build an environment of its own when `uv run` starts this.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.names import model_title
from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.serve import compile_all
from sparsex_jax.cli.terminal import clear_errors
from sparsex_jax.cli.values import parse_bytes
from sparsex_jax.config import EngineConfig
from sparsex_jax.config.checks import require
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.routing import POLICIES, Sketch
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.fleet.kv_events import KvEventsConfig
from sparsex_jax.serving.fleet.peers import PeerConfig

if TYPE_CHECKING:
    from sparsex_jax.serving.fleet.on_ray import FleetConfig, ScaleConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", default="smollm2-135m-instruct", help="as `sparsex serve MODEL`")
    add("--name", help="the model's name in requests")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--api-keys", type=Path, help="a TOML file of API keys, as of `sparsex serve`")
    add("--fleet-key", type=Path, help="a file with the secret by which digests are made (default: a new one)")
    add("--replicas", type=int, help="a fixed number of engines")
    add("--min-replicas", type=int, default=2)
    add("--max-replicas", type=int, default=2)
    add("--target-requests", type=float, default=8.0, help="requests that each replica should have at once")
    add("--downscale-delay", type=float, default=600.0, help="seconds of too little work before a replica goes")
    add("--fronts", type=int, default=1, help="processes that route")
    add("--cpus-per-replica", type=float, default=1.0)
    add("--gpus-per-replica", type=int, default=0, help="also the engine's tensor parallelism, if there are several")
    add(
        "--policy", choices=POLICIES, default="segments", help="how a replica is chosen; the others are to compare with"
    )
    add("--sample", type=int, default=16, help="one of this many windows is in digests; a power of two")
    add("--dtype", default="auto")
    add("--store-tokens", type=int)
    add("--host-store", default="0", help="host memory below each store, as `sparsex serve --host-store`")
    add("--fetch", action="store_true", help="replicas get KV that they lack from each other; needs --host-store")
    add("--max-num-seqs", type=int)
    add("--max-tokens", type=int, default=4096)
    add("--kv-events", help="ZMQ endpoint of KV events in vLLM's format, such as tcp://*:5557; port + rank each")
    add("--kv-events-replay", help="endpoint for those who missed some")
    add("--ray-address", help="of a running cluster, or `auto`; by default one is started here")
    add("--no-warm-up", action="store_true", help="compile programs at the first requests")
    return parser.parse_args()


def fleet_key(file: Path | None) -> bytes:
    if file is None:
        return secrets.token_bytes(32)
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"fleet_key={str(file)!r} cannot be read: {error.strerror}") from error


def kv_events(args: argparse.Namespace) -> KvEventsConfig | None:
    require(args.kv_events or not args.kv_events_replay, "kv_events_replay needs kv_events")
    return KvEventsConfig(args.kv_events, args.kv_events_replay) if args.kv_events else None


def require_room(scale: ScaleConfig, there: Mapping[str, float]) -> None:
    """Raise InvalidRequestError if this machine cannot have the least number of replicas at once: Ray would wait for
    another machine.

    Args:
      there: what Ray found, by its names.
    """
    for name, each in (("CPU", scale.num_cpus), ("GPU", scale.num_gpus)):
        needed, found = scale.min_replicas * each, there.get(name, 0)
        said = f"{scale.min_replicas} replicas with {each:g} {name} each need {needed:g}, and Ray finds {found:g} here"
        require(needed <= found, f"{said}; see --replicas and --{name.lower()}s-per-replica")


def fleet_of(args: argparse.Namespace) -> FleetConfig:
    """What replicas and fronts are."""
    from sparsex_jax.serving.fleet.on_ray import FleetConfig

    config = EngineConfig(
        dtype=args.dtype,
        store_tokens=args.store_tokens,
        max_num_seqs=args.max_num_seqs,
        host_store_bytes=parse_bytes("host_store", args.host_store),
    )
    require(not args.fetch or config.host_store_bytes > 0, "fetch needs host_store above 0")
    choice = EngineChoice(args.model, config, max(args.gpus_per_replica, 1))
    return FleetConfig(
        args.model,
        args.name or model_title(args.model),
        choice.load,
        Sketch(fleet_key(args.fleet_key), args.sample),
        prepare=None if args.no_warm_up else compile_all,
        policy=POLICIES[args.policy](),
        limits=Limits(max_tokens=args.max_tokens),
        api_keys=args.api_keys and args.api_keys.absolute(),
        events=kv_events(args),
        peers=PeerConfig() if args.fetch else None,
    )


def scale_of(args: argparse.Namespace) -> ScaleConfig:
    """How many there are, and on what."""
    from sparsex_jax.serving.fleet.on_ray import ScaleConfig

    return ScaleConfig(
        args.min_replicas if args.replicas is None else args.replicas,
        args.max_replicas if args.replicas is None else args.replicas,
        args.target_requests,
        downscale_delay_s=args.downscale_delay,
        num_cpus=args.cpus_per_replica,
        num_gpus=args.gpus_per_replica,
        num_fronts=args.fronts,
    )


def serve_until_signalled(args: argparse.Namespace) -> None:
    require(importlib.util.find_spec("ray") is not None, "replicas need Ray, which comes with the extra `ray`")
    import ray
    from ray import serve

    from sparsex_jax.serving.fleet.on_ray import application, connect

    require(0 <= args.port <= 65535, f"port={args.port} must be from 0 to 65535")
    fleet, scale = fleet_of(args), scale_of(args)
    fleet.access()  # what is wrong in a file of keys, or with a model's name, is said before Ray starts
    open_checkpoint(args.model)
    stopped = threading.Event()
    connect(args.ray_address)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has handlers of its own, which end the process at once
        signal.signal(number, lambda *_: stopped.set())
    try:
        if args.ray_address is None:
            require_room(scale, ray.cluster_resources())
        serve.start(http_options={"host": args.host, "port": args.port})
        serve.run(application(fleet, scale), name="sparsex")
        print(f"Serving {fleet.name} at http://{args.host}:{args.port}/v1 by {scale.min_replicas} replicas", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    with clear_errors():
        serve_until_signalled(parse())


if __name__ == "__main__":
    main()
