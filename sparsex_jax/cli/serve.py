"""`sparsex serve`: the OpenAI-compatible server."""

from __future__ import annotations

import dataclasses
import functools
import signal
import socket
import time
from collections.abc import Mapping, Sequence

from sparsex_jax.checkpoints.names import model_title
from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.processes import follow, follows, opened
from sparsex_jax.cli.serve_options import Callers, Operations
from sparsex_jax.cli.terminal import messages, progress
from sparsex_jax.config.checks import require
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.distributed import Leader, leave
from sparsex_jax.engine import Engine
from sparsex_jax.errors import GroupError
from sparsex_jax.scheduler import warmup
from sparsex_jax.scheduler.helpers import asked_number
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.methods import Cors
from sparsex_jax.serving.request_log import RequestLog
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.sockets import url_of
from sparsex_jax.serving.tracing import Tracing, is_wanted
from sparsex_jax.serving.worker import Worker
from sparsex_jax.text.thoughts import check_parser

_FAREWELL_S = 5.0  # in which clients hear that a process is lost, before this one ends
_SPARE_ADAPTERS = 8  # that can be loaded where requests may load them


def run(
    choice: EngineChoice,
    limits: Limits,
    callers: Callers,
    operations: Operations,
    *,
    sockets: Sequence[socket.socket],
    cors: Cors,
    reasoning_parser: str,
) -> None:
    """Serve at these bound sockets until SIGTERM or SIGINT; or, in all processes but process 0, compute for it."""
    check_parser(reasoning_parser)
    asked_number()  # whose error need not wait for the weights
    if callers.allow_adapter_updates and choice.max_adapters is None:
        choice = dataclasses.replace(choice, max_adapters=max(len(choice.adapters), _SPARE_ADAPTERS))
    if follows(choice):
        return follow(choice)
    access = Access.load(callers.api_keys, limits) if callers.api_keys else Access.open(limits)
    log = RequestLog.open(operations.request_log) if operations.request_log else None
    name = callers.name or model_title(choice.model)
    require(
        name not in choice.adapters, f"adapter={name!r} is the model's name too; requests could not tell them apart"
    )
    tracing = Tracing.start(operations.otlp_endpoint, name) if is_wanted(operations.otlp_endpoint) else None
    with opened(choice) as (engine, leader):
        if operations.warm_up:
            compile_all(engine)
        worker = Worker(engine)
        app = create_app(
            worker,
            model=name,
            access=access,
            limits=limits,
            request_log=log,
            tracing=tracing,
            allowed_origins=cors,
            reasoning_parser=reasoning_parser,
            adapters=choice.adapters,
            allow_adapter_updates=callers.allow_adapter_updates,
        )
        tell = functools.partial(_tell, engine, choice, name, sockets, everybody=callers.api_keys is None)
        server = Server(app, sockets=sockets, on_listening=tell)
        if leader is not None:
            _end_together(leader, server, worker)
        server.run()
        engine.close()


def _end_together(leader: Leader, server: Server, worker: Worker) -> None:
    """Drain when another process is told to end. When one is lost, tell all clients, and end soon after."""

    def lost(error: GroupError) -> None:
        worker.broke(error)
        time.sleep(_FAREWELL_S)
        leave(error)

    def leaving() -> None:
        if not worker.draining:
            server.handle_exit(signal.SIGTERM, None)

    leader.on_end, leader.on_leaving = lost, leaving


def _tell(
    engine: Engine, choice: EngineChoice, name: str, sockets: Sequence[socket.socket], *, everybody: bool
) -> None:
    """Say what is served, where and how.

    Args:
      everybody: requests need no key.
    """
    messages().print(str(choice.defaults(engine.model)), soft_wrap=True)
    if engine.sampling:
        said = ", ".join(f"{field}={value:g}" for field, value in engine.sampling.items())
        messages().print(f"Sampling by default: {said} (of the model; see --generation-config)", soft_wrap=True)
    if engine.adapters:
        messages().print(_adapters(engine, choice.adapters), soft_wrap=True)
    messages().print(_places(name, sockets), soft_wrap=True)
    if everybody:
        warning = "Without --api-keys, every client of this port can send requests, and all share what is stored."
        messages().print(warning, soft_wrap=True)


def _adapters(engine: Engine, sources: Mapping[str, str]) -> str:
    """Which are loaded."""
    said = (f"{name} of {sources[name]} (rank {each.rank})" for name, each in engine.adapters.items())
    return f"Adapters: {', '.join(said)}"


def _places(name: str, sockets: Sequence[socket.socket]) -> str:
    """Where the model is served."""
    urls = [url_of(each) for each in sockets]
    if sockets[0].family == socket.AF_UNIX:
        return f"Serving {name} at {urls[0]}"
    return f"Serving {name} at {', '.join(f'{url}/' for url in urls)} (the page) and {urls[0]}/v1"


def compile_all(engine: Engine) -> None:
    """Compile the programs that requests need, so that the first requests do not wait for the compiler."""
    before, started = num_compilations(), time.perf_counter()
    asked = engine.loop, engine.default_sampling()
    messages().print("Compiling, or loading what was compiled before, which takes seconds to minutes", soft_wrap=True)
    with progress() as bar:
        for step in bar.track([*warmup.steps_ahead(*asked), *warmup.steps(*asked)], description="Compiling"):
            step()
    number, seconds = num_compilations() - before, time.perf_counter() - started
    messages().print(
        f"Compiled or loaded {number} programs in {seconds:.0f} s; --no-warm-up compiles them at the first requests",
        soft_wrap=True,
    )
