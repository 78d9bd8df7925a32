"""Processes that compile a share of a server's programs.

Tracing and lowering is Python, of which a process does one thing at a time, and for the kernels of dozens of programs
that takes minutes. So a server whose programs are not on disk starts a few processes (`scheduler.helping`) that do the
same for their share, and leave what they compiled where the server looks for it (`device.kept_programs`):

    this process      misses a program, starts helpers     goes through all steps of the warm-up, one by one
    each helper       imports, starts its devices          goes through the step that nobody has taken, and again

Several steps need the same program. Whoever comes first claims it, and says what comes out of it once it is traced.
Others go on with that, and this process loads it from disk as soon as it is there.

Helpers have neither weights nor a store, but shapes: nothing runs there. They end with this process, whatever ends it.
What one of them fails to do is done here: that takes time, and is said in the log.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.config.checks import require
from sparsex_jax.device.ahead import Claims, Results
from sparsex_jax.device.compilation import num_processors
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.device.outlines import outline
from sparsex_jax.device.runner import Runner
from sparsex_jax.scheduler.loop import Loop

log = logging.getLogger(__name__)

NUMBER = "SPARSEX_COMPILE_PROCESSES"  # an environment variable: how many helpers there are. 0: none
_MOST, _PROCESSORS_EACH = 6, 4
_FEW_PROCESSORS = 8  # with fewer there are no helpers
# In which a helper has XLA compile, which has threads of its own beside these. It tries out products with matrices that
# it makes for that; the largest is the one that makes logits.
_THREADS = 2
_CONTEXT_BYTES = 1 << 30  # of a GPU that a helper takes beside such matrices
_PATIENCE = 300.0  # seconds in which any program is traced, or compiled: who has not done it by then hangs
_MOST_ASKED = 64  # that the environment may ask for
_MOMENT = 0.02  # seconds between two questions for a program that another process traces
_TO_END = 2.0  # seconds in which helpers that have nothing left to do may end by themselves
_MODULE = "sparsex_jax.scheduler.helping"
_SHARE_OF_MEMORY, _USUAL_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75  # JAX's, of what a process takes of a device

YOURS, BUSY = "yours", "busy"  # answers to a claim: nobody has claimed it, or who has still traces it
Answer = Results | str


class Share(NamedTuple):
    """What a helper works on. It travels as its outline.

    Attributes:
      root, directory: of `KeptPrograms`.
      num_steps: of the warm-up.
      threads: in which a helper has XLA compile.
    """

    root: Path
    directory: Path
    runner: Runner
    tokenizer: Any | None
    reuse: ReuseConfig
    usual: SamplingParams | None
    num_steps: int
    threads: int


def asked_number() -> int | None:
    """How many helpers the environment asks for. None: it does not say.

    Raises InvalidRequestError if it has something else.
    """
    asked = os.environ.get(NUMBER)
    if asked is None:
        return None
    is_number = asked.isdecimal() and len(asked) < 4 and int(asked) <= _MOST_ASKED
    require(is_number, f"{NUMBER}={asked!r:.60} must be an integer from 0 to {_MOST_ASKED}")
    return int(asked)


def num_helpers(platform: str, most: int = _MOST) -> int:
    """How many there are on this host: as the environment says, or as its processors suggest. A TPU is one process's.

    Args:
      most: if the environment does not say.

    Raises InvalidRequestError as `asked_number`.
    """
    asked, processors = asked_number(), num_processors()
    if platform == "tpu":
        return 0
    if asked is not None:
        return asked
    return min(processors // _PROCESSORS_EACH, _MOST, most) if processors >= _FEW_PROCESSORS else 0


def with_room(runner: Runner) -> int:
    """How many helpers fit into the memory of a device that this process leaves to others. `_MOST` if it does not say.

    With 0.9 of an H200 taken, 14 GB are left, which is room for 4 that compile an 8B model's programs.
    """
    limit = (runner.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return _MOST
    left = limit * (1 / float(os.environ.get(_SHARE_OF_MEMORY) or _USUAL_SHARE) - 1)
    return max(int(left // (_CONTEXT_BYTES + _THREADS * _head_bytes(runner))), 0)


def _head_bytes(runner: Runner) -> int:
    """Of the matrix that makes logits, on one device."""
    head = runner.params.embed if runner.params.lm_head is None else runner.params.lm_head
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(head))


class Helpers(Claims):
    """Helpers of this process, and what it and they claim: its `Claims`. They start when a program is first missed."""

    def __init__(
        self, number: int, loop: Loop, usual: SamplingParams | None, kept: KeptPrograms, num_steps: int
    ) -> None:
        """
        Args:
          usual: what requests ask for that say nothing of sampling.
          kept: where this process looks for programs.
          num_steps: how many steps of the warm-up there are to share.
        """
        self._number, self._board = number, Board(num_steps)
        self._settings = settings()  # now: where a program is missed, that thread may have a precision of its own
        about = loop.runner.outlined(), loop.requests.tokenizer, loop.requests.reuse, usual
        self._share = Share(kept.root, kept.directory, *about, num_steps, _THREADS)
        self._started = self._over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def claim(self, path: Path) -> Results | None:
        if not self._started:
            self._start()
        return claimed(lambda: self._board.claim(path.name, self), self._give_up)

    def traced(self, path: Path, results: Results) -> None:
        self._board.traced(path.name, results)

    def ended(self, path: Path) -> None:
        self._board.ended(path.name)

    def wait(self, path: Path) -> None:
        if not self._board.wait(path.name, _PATIENCE):
            self._give_up()
            self._board.wait(path.name)

    def _give_up(self) -> None:
        """Kill processes that hang. What they have claimed is this one's then."""
        log.warning("A program has not come for %d s. This process does what others compiled beside it", _PATIENCE)
        for process in self._processes:
            process.kill()

    def end(self, *, at_once: bool = False) -> None:
        """End the processes, at once or when nothing is left for them to do, and wait until they have ended."""
        self._over = True
        self._board.close()
        deadline = time.monotonic() + (0.0 if at_once else _TO_END)
        for process in self._processes:
            _end(process, deadline)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        self._started = True
        try:
            about = outline(self._settings), outline(self._share)
            for _ in range(self._number):
                self._start_one(*about)
        except Exception as error:
            log.warning("Only %d processes compile beside this one: %s", len(self._processes), error)
        log.info("%d processes compile beside this one", len(self._processes))

    def _start_one(self, *about: bytes) -> None:
        process, connection = _started()
        thread = threading.Thread(target=self._attend, args=(process, connection, about), daemon=True)
        self._processes.append(process)
        self._threads.append(thread)
        thread.start()

    def _attend(self, process: subprocess.Popen[bytes], connection: Connection, about: tuple[bytes, ...]) -> None:
        """Tell a helper what it is about, and answer it until it ends."""
        try:
            with connection:
                for each in about:
                    connection.send_bytes(each)
                while True:
                    self._answer(process, connection, connection.recv())
        except (EOFError, OSError):
            pass
        finally:
            self._board.lost(process)
        if (code := process.wait()) and not self._over:
            log.warning("A process that compiled beside this one ended with %d. This one does its share", code)

    def _answer(self, process: subprocess.Popen[bytes], connection: Connection, said: tuple[Any, ...]) -> None:
        match said:
            case "step", *_:
                connection.send(self._board.step())
            case "claim", name:
                connection.send(self._board.claim(name, process))
            case "traced", name, results:
                self._board.traced(name, results)
            case "ended", name:
                self._board.ended(name)


class Desk(Claims):
    """A helper's end of the connection: its `Claims`. All but `ended` belongs to one thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def step(self) -> int | None:
        """The number of a step that nobody has taken. None: all are taken."""
        return self._ask("step")

    def claim(self, path: Path) -> Results | None:
        return claimed(lambda: self._ask("claim", path.name))

    def traced(self, path: Path, results: Results) -> None:
        self._tell("traced", path.name, results)

    def ended(self, path: Path) -> None:
        self._tell("ended", path.name)

    def _ask(self, *question: Any) -> Any:
        self._tell(*question)
        return self._connection.recv()

    def _tell(self, *news: Any) -> None:
        with self._sending:
            self._connection.send(news)


@dataclasses.dataclass
class _Claimed:
    """A program that some process traces or compiles, or has compiled."""

    owner: object
    results: Results | None = None
    over: threading.Event = dataclasses.field(default_factory=threading.Event)


class Board:
    """Who does what: steps that are taken, and programs that are claimed. From any thread; nothing but `wait` waits."""

    def __init__(self, num_steps: int) -> None:
        self._steps, self._lock = deque(range(num_steps)), threading.Lock()
        self._claimed: dict[str, _Claimed] = {}

    def step(self) -> int | None:
        with self._lock:
            return self._steps.popleft() if self._steps else None

    def close(self) -> None:
        """No step is to be taken any more."""
        with self._lock:
            self._steps.clear()

    def claim(self, name: str, owner: object) -> Answer:
        with self._lock:
            found = self._claimed.setdefault(name, _Claimed(owner))
            return found.results or (YOURS if found.owner is owner else BUSY)

    def traced(self, name: str, results: Results) -> None:
        with self._lock:
            self._claimed[name].results = results

    def ended(self, name: str) -> None:
        """Its owner is done with it. What was not traced, another may claim."""
        with self._lock:
            self._end(name)

    def lost(self, owner: object) -> None:
        """Nothing more comes from an owner."""
        with self._lock:
            for name in [name for name, each in self._claimed.items() if each.owner is owner]:
                self._end(name)

    def wait(self, name: str, seconds: float | None = None) -> bool:
        """Until its owner is done with a program that it has traced, or so long. Whether it is."""
        return self._claimed[name].over.wait(seconds)

    def _end(self, name: str) -> None:
        if self._claimed[name].results is None:
            del self._claimed[name]
        else:
            self._claimed[name].over.set()


def claimed(ask: Callable[[], Answer], late: Callable[[], None] | None = None) -> Results | None:
    """Ask until the answer is not that another process is at it. None: it is the caller's.

    Args:
      late: called once, if that is still the answer after `_PATIENCE` seconds.
    """
    deadline = time.monotonic() + _PATIENCE
    while (answer := ask()) == BUSY:
        time.sleep(_MOMENT)
        if late is not None and time.monotonic() > deadline:
            late()
            late = None
    return answer if isinstance(answer, Results) else None


def settings() -> dict[str, Any]:
    """Of JAX, as this process has them. Processes with others have other programs."""
    return dict(jax.config.values)


def _started() -> tuple[subprocess.Popen[bytes], Connection]:
    """A helper, and how to talk to it. It ends when its standard input does."""
    ours, theirs = Pipe()
    about: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
    # Ctrl-C is for this process, which ends the others. With -P, modules of the working directory are not imported.
    command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())]
    with theirs:
        return subprocess.Popen(command, env=_environment(), start_new_session=True, **about), ours


def _environment() -> dict[str, str]:
    """That of this process, whose modules a helper finds. It takes memory of devices when it needs some, and little."""
    paths = os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))
    return {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Kill a process that runs on after this time of `time.monotonic()`."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        process.kill()
