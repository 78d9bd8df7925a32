"""A server on a free port of this machine, and a scripted loop in place of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import anthropic
import httpx
import openai
from conftest import TALKING, same_shapes

from sparsex_jax import Engine, EngineConfig
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.request_log import RequestLog
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.worker import Worker

MODEL = "tiny"
HELLO_EVENTS = [Event("Hel", (1,)), Event("lo", (2, 3), finish_reason="stop")]


@functools.cache
def _parts():
    """Weights and tokenizer. Engines share them, since neither changes."""
    return random_params(TALKING, "float32", make_mesh(), seed=0), open_checkpoint("smollm2-135m-instruct").tokenizer


DEVICE = EngineConfig(store_tokens=4096, max_num_seqs=4, healing=0.0)
_FOR_THE_HOST = {"store_tokens", "max_num_seqs", "max_waiting", "company_tokens", "healing"}


def make_engine(**options) -> Engine:
    """A small engine with fixed random weights, SmolLM2's tokenizer and a store of its own.

    Where it differs from others in what the host alone can tell, it runs their programs.
    """
    config, (params, tokenizer) = dataclasses.replace(DEVICE, **options), _parts()
    is_smaller = config.store_tokens <= DEVICE.store_tokens and config.max_num_seqs <= DEVICE.max_num_seqs
    if is_smaller and options.keys() <= _FOR_THE_HOST:
        return same_shapes(TALKING, params, DEVICE, tokenizer, **options)
    return Engine(TALKING, params, tokenizer, config=config)


@dataclasses.dataclass
class Live:
    """A running server, and clients of it."""

    url: str
    worker: Worker
    server: Server

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def anthropic(self, key: str = "none", **options) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, **options)

    def http(self, key: str = "none") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


@contextlib.contextmanager
def live_server(
    engine: Engine,
    *,
    loop: ScriptedLoop | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
    request_log: RequestLog | None = None,
    model: str = MODEL,
    **options,
) -> Iterator[Live]:
    worker = Worker(engine, loop)
    app = create_app(worker, model=model, access=access, limits=limits, request_log=request_log, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(app, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Live(f"http://127.0.0.1:{port}", worker, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), f"the server does not end:\n{stacks()}"


def stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(i)}\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class ScriptedLoop:
    """A loop without a model. A function gives the events of each request, and each step sends one of them.

    After an event of None, no more events come until the request is cancelled.

    Attributes:
      script: the function from a prompt to its events. If it raises, the request is refused.
      adapters: the one that each request asked for.
    """

    def __init__(self, script: Callable[[list[int]], list[Event | None]]) -> None:
        self.tickets: list[ScriptedTicket] = []
        self.broken: Exception | None = None
        self.holds = True
        self.script = script
        self.adapters: list[str | None] = []

    def submit(
        self,
        prompt,
        sampling=None,
        *,
        reuse=None,
        namespace="default",
        keep=True,
        turns=None,
        lent=None,
        pinning=None,
        member=None,
        adapter=None,
        sharing="isolated",
        delay_s=0.0,
        listener,
    ):
        self.adapters.append(adapter)
        ticket = ScriptedTicket(len(self.tickets), len(prompt), iter(self.script(list(prompt))), listener)
        self.tickets.append(ticket)
        return ticket

    def heal(self) -> None:
        """There is nothing to heal."""

    def hold_nobody(self) -> None:
        self.holds = False

    def step(self) -> bool:
        if self.broken is not None:
            raise self.broken
        moved = [ticket.step() for ticket in self.tickets if not ticket.done]
        return any(moved)

    @property
    def queued_tokens(self) -> int:
        return 0

    @property
    def stats(self):
        return dataclasses.make_dataclass("Stats", ["waiting", "running"])(0, sum(not t.done for t in self.tickets))


@dataclasses.dataclass
class ScriptedTicket:
    id: int
    prompt_tokens: int
    events: Iterator[Event | None]
    listener: Callable[[Event], None]
    done: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def step(self) -> bool:
        event = Event("", (), finish_reason="cancelled") if self.cancelled else next(self.events)
        if event is None:
            self.events = iter([None])
            return False
        self.done = event.finish_reason is not None
        self.listener(event)
        return True
