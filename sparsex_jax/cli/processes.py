"""The processes of a command: one loads the engine and works with it, and the others, if there are any, follow it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.terminal import messages
from sparsex_jax.distributed import Follower, Leader, join, leave, secret_of
from sparsex_jax.engine import Engine
from sparsex_jax.errors import SparsexError


def follows(choice: EngineChoice) -> bool:
    """Whether another process has the requests."""
    return choice.membership is not None and not choice.membership.leads


@contextlib.contextmanager
def opened(choice: EngineChoice) -> Iterator[tuple[Engine, Leader | None]]:
    """The engine, once all processes have loaded it. Where there are several, they end together, with the block."""
    if choice.membership is None:
        yield choice.load(), None
        return
    leader = _joined(choice)
    assert isinstance(leader, Leader)
    with _ending(leader):
        engine = choice.load()
        leader.lead(engine.runner)
        yield engine, leader


def follow(choice: EngineChoice) -> None:
    """Load the engine and do what process 0 does, until it ends the group."""
    follower = _joined(choice)
    assert isinstance(follower, Follower)
    with _ending(follower):
        engine = choice.load()
        for number in (signal.SIGTERM, signal.SIGINT):  # what runs is finished first, as process 0 decides
            signal.signal(number, lambda *_: follower.ask_to_leave())
        follower.follow(engine.runner)


def _joined(choice: EngineChoice) -> Leader | Follower:
    _print_results_only()
    membership = choice.membership
    assert membership is not None
    secret = secret_of(os.environ)
    host, port = membership.control
    said = f"Process {membership.process_id} of {membership.num_processes}"
    messages().print(f"{said} waits for the others at {host}, port {port}", soft_wrap=True)
    return join(membership, secret, choice.in_words())


def _print_results_only() -> None:
    """Leave standard output to Python: what libraries print there of their connections goes to standard error."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
    os.dup2(2, 1)


@contextlib.contextmanager
def _ending(member: Leader | Follower) -> Iterator[None]:
    """Tell the others when this process ends, and why. With an error it ends at once, as `leave`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SparsexError):
            traceback.print_exc()
        member.close(f"{type(error).__name__}: {error}")
        leave(error)
    member.close()
