"""The thread that steps the loop, and the way to it from asyncio.

    event loop's thread                        worker's thread
    -------------------                        ---------------
    stream(jobs) -> loop.submit                while True:
                                                   calls between steps: forget, entries, stats
    async for number, event in stream  <------     loop.step() -> listener -> call_soon_threadsafe

Engine and cache serve one thread at a time, and that is the worker's. What needs them elsewhere goes through `call`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.device.heartbeat import Heartbeat
from sparsex_jax.engine import Engine
from sparsex_jax.errors import GroupError, SparsexError
from sparsex_jax.scheduler.lending import Lent
from sparsex_jax.scheduler.loop import Event, Listener, Loop, Ticket
from sparsex_jax.scheduler.pinning import Pinning
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.scheduler.sequence import DEFAULT_NAMESPACE

_IDLE_S = 1.0  # everything that gives the thread work also wakes it
_FAREWELL_S = 5.0  # for cancelled requests to hear of it

log = logging.getLogger(__name__)


class DrainingError(SparsexError):
    """The server takes no new requests, since it is about to stop."""


class WorkerError(SparsexError):
    """The serving loop itself broke, which no request can do: it is a fault of the program or the device."""


class TimeLimitError(SparsexError):
    """A request took longer than the server allows."""


class Submission(Protocol):
    """What can be submitted to a loop."""

    def submit(self, loop: Loop, listener: Listener) -> Ticket:
        """Put it in line; the listener gets its events. Raises as `Loop.submit`."""


class Watcher(Protocol):
    """Hears of the jobs of a stream until each had its last event, also when nobody reads them any more."""

    def submitted(self, ticket: Ticket, opened_s: float) -> None:
        """A job was submitted, to a stream that was opened then on `time.perf_counter`'s clock."""

    def heard(self, number: int, event: Event) -> None:
        """An event of the job of this number came. On the event loop's thread.

        The last one has the finish reason `timeout` if the stream took too long, and `error` if the loop broke.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prompt to continue: the arguments of `Loop.submit`."""

    prompt: np.ndarray
    sampling: SamplingParams
    reuse: ReuseConfig | None = None
    namespace: str = DEFAULT_NAMESPACE
    keep: bool = True
    turns: frozenset[bytes] = frozenset()
    lent: Lent | None = None
    pinning: Pinning | None = None
    member: Member | None = None
    adapter: str | None = None
    sharing: str = "isolated"
    delay_s: float = 0.0

    def submit(self, loop: Loop, listener: Listener) -> Ticket:
        return loop.submit(
            self.prompt,
            self.sampling,
            reuse=self.reuse,
            namespace=self.namespace,
            keep=self.keep,
            turns=self.turns,
            lent=self.lent,
            pinning=self.pinning,
            member=self.member,
            adapter=self.adapter,
            sharing=self.sharing,
            delay_s=self.delay_s,
            listener=listener,
        )


class Worker:
    """Steps a loop on a thread of its own. All methods but `start` and `stop` are for one event loop's thread."""

    def __init__(self, engine: Engine, loop: Loop | None = None) -> None:
        """
        Args:
          loop: None: the engine's.
        """
        self.engine, self.loop = engine, loop or engine.loop
        self.draining = False
        self.failure: BaseException | None = None
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._heal_at = 0.0  # a call such as one for metrics wakes the thread, and must not cut its rest short
        self._heartbeat = Heartbeat()
        self._thread = threading.Thread(target=self._run, name="sparsex-loop", daemon=True)

    def start(self) -> Worker:
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread after the step it is in. Idempotent; calls still waiting fail with WorkerError."""
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        self._wake.set()

    @property
    def busy_s(self) -> float:
        """Seconds since the thread last got something done; 0 while it waits for work. From any thread.

        A round that ended counts, and so does a program that was compiled, since a round may compile several.
        """
        return self._heartbeat.silent_s

    # From asyncio -------------------------------------------------------------------------------------------

    def stream(
        self, jobs: Sequence[Submission], *, limit_s: float | None = None, watcher: Watcher | None = None
    ) -> Stream:
        """Submit jobs, all or none. Use as `async with worker.stream(jobs) as stream: async for ... in stream`.

        An open stream is under way: draining waits for it, even if its jobs are submitted only later.

        Args:
          limit_s: seconds from now after which reading raises TimeLimitError.
          watcher: hears of the jobs too.

        Raises:
          InvalidRequestError, OverloadedError: as `Loop.submit`.
          DrainingError, WorkerError: nothing new is taken (any more).
        """
        stream = Stream(self, limit_s, watcher)
        try:
            self.require_open()  # behind its registration, so that a loop that breaks now finds it
            stream.submit(*jobs)
        except BaseException:
            stream.close()
            raise
        return stream

    async def call[T](self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a function on the loop's thread, between two steps. Cancelled before it began, it never runs.

        Raises WorkerError if the loop broke, and whatever the function raises.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, functools.partial(function, *args, **kwargs)))
        if self.failure is not None:
            self._refuse_calls()
        self.wake()
        return await asyncio.wrap_future(future)

    def require_open(self) -> None:
        """Raises DrainingError, or WorkerError or GroupError, if nothing new is taken (any more)."""
        if self.failure is not None:
            raise _failed(self.failure) from self.failure
        if self.draining:
            raise DrainingError("the server is shutting down and takes no new requests")

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new, let what runs finish for `deadline_s` seconds, and cancel the rest."""
        self.draining = True
        self.loop.hold_nobody()
        self.wake()
        if not await self._empty(deadline_s):
            for stream in list(self._streams):
                stream.cancel()
            await self._empty(_FAREWELL_S)

    async def _empty(self, deadline_s: float) -> bool:
        """Wait until no stream is open, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._streams:
                    await asyncio.sleep(0.02)
        return not self._streams

    def opened(self, stream: Stream) -> None:
        self._streams.add(stream)

    def closed(self, stream: Stream) -> None:
        self._streams.discard(stream)

    def broke(self, error: BaseException) -> None:
        """The loop cannot go on, though its thread does not say so: it may wait for what will never come. From any
        thread; everybody who waits hears that there will be no answer."""
        self._fail(error)

    # On the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException = WorkerError("the worker was stopped")
        try:
            while not self._stopping:
                self._wake.clear()
                self._heartbeat.beat()
                self._run_calls()
                if not self.loop.step():
                    rest = self._heal()
                    self._heartbeat.rest()
                    self._wake.wait(rest)
        except GroupError as lost:  # which the group has logged
            error = lost
        except BaseException as broken:  # the loop answers for its requests; this is something else
            log.exception("the serving loop failed")
            error = broken
        self._fail(error)

    def _heal(self) -> float:
        """Heal a chunk if it is time to. Returns for how many seconds the thread may sleep."""
        if time.monotonic() >= self._heal_at:
            rest = self.engine.loop.heal()
            self._heal_at = time.monotonic() + (_IDLE_S if rest is None else rest)
        return max(self._heal_at - time.monotonic(), 0.0)

    def _run_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, function = self._calls.get_nowait()
                if future.set_running_or_notify_cancel():
                    _complete(future, function)

    def _fail(self, error: BaseException) -> None:
        """Everybody who waits hears that there will be no answer."""
        self.failure = error
        self._heartbeat.rest()
        for stream in list(self._streams):
            stream.broke(error)
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, _ = self._calls.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(_failed(self.failure))


class Stream:
    """What becomes of a few jobs: (number of the job, event) as they come, until each had its last event.

    Leaving it, for whatever reason, cancels what is not done. The worker knows it until that is done too.

    Attributes:
      opened_s: when it was opened, on `time.perf_counter`'s clock.
    """

    def __init__(self, worker: Worker, limit_s: float | None = None, watcher: Watcher | None = None) -> None:
        self.tickets: list[Ticket] = []
        self.opened_s = time.perf_counter()
        self._worker, self._watcher = worker, watcher
        self._open: set[int] = set()  # the jobs whose last event has not come
        self._is_closed = self._timed_out = False
        self._asyncio = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | BaseException] = asyncio.Queue()
        self._unfinished: set[int] = set()  # the jobs whose last event was not read
        self._limit_s = limit_s
        self._deadline = None if limit_s is None else self._asyncio.time() + limit_s
        self._awaiting: asyncio.Task[Any] | None = None
        self._given_up = False
        worker.opened(self)

    def submit(self, *jobs: Submission) -> None:
        """Add jobs. Also from the worker's thread, in a call that the event loop's thread awaits; where that has left
        meanwhile, they are cancelled."""
        for job in jobs:
            number = len(self.tickets)
            ticket = job.submit(self._worker.loop, functools.partial(self._post, self._hear, number))
            self.tickets.append(ticket)
            self._unfinished.add(number)
            self._open.add(number)
            if self._is_closed:
                ticket.cancel()
            if self._watcher is not None:
                self._watcher.submitted(ticket, self.opened_s)
        self._worker.wake()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """Raises TimeLimitError, or WorkerError if the loop broke."""
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._next()
        if isinstance(item, BaseException):
            raise _failed(item) from item
        number, event = item
        if event.finish_reason is not None:
            self._unfinished.discard(number)
        return number, event

    async def _next(self) -> tuple[int, Event] | BaseException:
        return await self._in_time(self._queue.get())

    async def before_jobs[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Await what comes before the jobs are submitted.

        Raises:
          TimeLimitError: the stream's time is over.
          DrainingError: the stream was cancelled meanwhile.
        """
        self._awaiting = asyncio.ensure_future(work)
        try:
            return await self._in_time(self._awaiting)
        except asyncio.CancelledError:
            if self._given_up:
                raise DrainingError("the server is shutting down and gave this request up") from None
            raise
        finally:
            self._awaiting.cancel()
            self._awaiting = None

    async def _in_time[T](self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError as error:
            self._timed_out = True
            raise TimeLimitError(f"the request took longer than the limit of {self._limit_s:g} s") from error

    def cancel(self) -> None:
        """Cancel what is not done; its last events still come. What was not submitted yet never is."""
        for number in list(self._unfinished):
            self.tickets[number].cancel()
        if self._awaiting is not None:
            self._given_up = self._awaiting.cancel()
        self._worker.wake()

    def close(self) -> None:
        self._is_closed = True  # first: another thread may be about to submit
        self.cancel()
        self._unfinished.clear()
        self._leave_if_done()

    def broke(self, error: BaseException) -> None:
        """The loop broke. From the worker's thread."""
        self._post(self._hear_of_the_end, error)

    def _post(self, hear: Callable[..., None], *args: Any) -> None:
        """From any thread. Once the event loop is closed there is no reader any more."""
        with contextlib.suppress(RuntimeError):
            self._asyncio.call_soon_threadsafe(hear, *args)

    def _hear(self, number: int, event: Event) -> None:
        if event.finish_reason == "cancelled" and self._timed_out:
            event = dataclasses.replace(event, finish_reason="timeout")
        self._queue.put_nowait((number, event))
        self._watch(number, event)

    def _hear_of_the_end(self, error: BaseException) -> None:
        self._queue.put_nowait(error)
        for number in sorted(self._open):
            self._watch(number, Event("", (), finish_reason="error"))

    def _watch(self, number: int, event: Event) -> None:
        if event.finish_reason is not None:
            self._open.discard(number)
        if self._watcher is not None:
            self._watcher.heard(number, event)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._is_closed and not self._open:
            self._worker.closed(self)


def _failed(error: BaseException | None) -> SparsexError:
    """What clients hear of a loop that failed: that a process is lost, if that is why."""
    return GroupError(str(error)) if isinstance(error, GroupError) else WorkerError("the serving loop has failed")


def _complete(future: concurrent.futures.Future[Any], function: Callable[[], Any]) -> None:
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
