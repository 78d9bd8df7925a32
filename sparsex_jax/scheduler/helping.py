"""A process that compiles a share of a server's programs: `scheduler.helpers` starts it, and says what it does."""

from __future__ import annotations

import logging
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import jax

from sparsex_jax.config.checks import require
from sparsex_jax.device.ahead import Share as Ahead
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.device.outlines import of_outline
from sparsex_jax.model.sharding import on_mesh
from sparsex_jax.scheduler import warmup
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.helpers import Desk, Share, settings
from sparsex_jax.scheduler.loop import Loop
from sparsex_jax.scheduler.mirroring import Mirroring

log = logging.getLogger(__name__)


def help_with(connection: Connection) -> None:
    """Compile what nobody else compiles yet, until all is taken."""
    _use(connection.recv())
    share: Share = of_outline(connection.recv_bytes())
    desk, kept = Desk(connection), KeptPrograms(share.root, share.runner.mesh)
    require(kept.directory == share.directory, "this process would leave programs where the other does not look")
    loop, ahead = _loop(share), Ahead(kept, desk, share.threads)
    programs = warmup.programs(loop, share.usual)
    require(len(programs) == share.num_steps, f"there are {len(programs)} steps here, and {share.num_steps} there")
    while (number := desk.step()) is not None:
        try:
            with loop.runner.compiling(ahead):
                programs[number]()
        except Exception:
            log.exception("a share of the programs is left to the other process")
    ahead.wait()


def _use(others: dict[str, Any]) -> None:
    """Settings of JAX of another process, before devices start."""
    here = settings()
    for name, value in others.items():
        if here[name] != value:
            jax.config.update(name, value)


def _loop(share: Share) -> Loop:
    """The server's, as far as programs depend on it. Its tiers have no part in what is compiled here."""
    runner = share.runner
    admission = Admission(on_mesh(runner.model, runner.mesh), runner.engine)
    if runner.engine.mirrors:
        admission.mirroring = Mirroring(runner)
    return Loop(runner, admission, share.tokenizer, share.reuse)


def _end_with_input() -> None:
    """End when the other process does, or closes this one's standard input."""
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    with Connection(int(sys.argv[1])) as connection:
        help_with(connection)
