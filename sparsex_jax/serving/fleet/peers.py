"""Gets blocks that a prompt lacks from another replica of the fleet, before the prompt is computed.

A replica that cannot be reached, is slow, or sends what is not whole costs a prompt some time, and never its answer:
what has not come by the deadline is computed as without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import logging
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from sparsex_jax.config.checks import Limit, NotNegative, Positive, checked, is_int
from sparsex_jax.device.link import HostBlock
from sparsex_jax.errors import SparsexError
from sparsex_jax.reuse.pace import Factor
from sparsex_jax.scheduler.peering import Lookup, Peering
from sparsex_jax.serving.fleet import peer_messages as messages
from sparsex_jax.serving.fleet.peer_counts import PeerCounts
from sparsex_jax.serving.fleet.preview import Prompt
from sparsex_jax.serving.fleet.seal import HEADER, Seal
from sparsex_jax.serving.worker import Worker
from sparsex_jax.tiers import block_file
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.index import Run

BYTES_PER_S = 1e9  # as expected before anything came
_BESIDE_PIECES = 1 << 18  # bytes of a block file
_PORT = Limit(lambda value: is_int(value) and 0 <= value < 1 << 16, "from 0 to 65535")
_AT_ONCE = 1 << 20  # bytes of a body that are read between two looks at the clock

log = logging.getLogger(__name__)


class PeerError(Exception):
    """A replica did not send what it was asked for: too late, not whole, or not sealed."""


class NotAskedError(Exception):
    """The deadline was over before a thread was free to ask."""


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """How replicas get blocks from each other.

    Attributes:
      host, port: where a replica listens for the others. None is an address of its machine that the others reach, or
        127.0.0.1 where that is not known; 0 is any free port.
      most_bytes: of blocks that are fetched for one prompt.
      most_s: a prompt waits for them so long at most, and never longer than computing them is expected to take.
      rest_s: a replica that failed is not asked for so long.
      threads: blocks that are on their way here at once.
    """

    host: str | None = None
    port: Annotated[int, _PORT] = 0
    most_bytes: Positive = 1 << 30
    most_s: NotNegative = 2.0
    rest_s: NotNegative = 5.0
    threads: Positive = 4

    def __post_init__(self) -> None:
        checked(type(self), vars(self))


class Peers:
    """The asking side of a replica. All methods belong to the thread of one event loop.

    Attributes:
      counts: what came of it so far.
    """

    def __init__(self, worker: Worker, peering: Peering, model: str, seal: Seal, config: PeerConfig) -> None:
        """
        Args:
          model: the digest of the engine's fingerprint.
        """
        self.counts = PeerCounts()
        self._worker, self._peering, self._model, self._seal = worker, peering, model, seal
        self._config, self._slower = config, Factor(known=False)
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="sparsex-peers")
        self._tasks: set[asyncio.Task[None]] = set()
        self._coming: dict[bytes, asyncio.Task[None]] = {}
        self._resting: dict[str, float] = {}  # until when, by `time.monotonic`

    @property
    def bytes_per_s(self) -> float:
        """How fast a block comes, as measured lately."""
        return BYTES_PER_S / self._slower.value

    async def bring(self, holder: str, prompt: Prompt) -> None:
        """Wait until what a prompt lacks has come from the replica at this address, as far as that pays.

        It raises nothing. What comes too late for the prompt is kept for others.
        """
        if self._resting.get(holder, 0.0) > time.monotonic():
            return
        task = asyncio.ensure_future(self._bring(holder, prompt))  # it goes on where the prompt's client leaves
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait([task], timeout=self._config.most_s)

    async def stop(self) -> None:
        """End all that is under way."""
        tasks = [*self._tasks, *self._coming.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def _bring(self, holder: str, prompt: Prompt) -> None:
        deadline = time.monotonic() + self._config.most_s
        try:
            lookup = await self._worker.call(self._lacking, prompt)
            if lookup is None:
                return
            self.counts.asked += 1
            told = await self._run(self._look_up, holder, lookup, deadline)
            about = lookup, told, self.bytes_per_s, self._config.most_bytes, self._config.threads
            if time.monotonic() >= deadline:  # the loop was busy, and the prompt does not wait any more
                return
            fetched, awaited, seconds = await self._worker.call(self._peering.choose, *about)
        except NotAskedError:
            return
        except Exception as error:
            return self._failed(holder, error)
        if told and not fetched and not awaited:
            self._slower.forget()
        deadline = min(deadline, time.monotonic() + seconds) if seconds is not None else deadline
        for block in fetched:
            self._begin(holder, block, deadline)
        coming = [self._coming[key] for key in (*awaited, *(each.key for each in fetched)) if key in self._coming]
        if coming:
            await asyncio.wait(coming, timeout=max(deadline - time.monotonic(), 0.0))

    def _lacking(self, prompt: Prompt) -> Lookup | None:
        """On the loop's thread. None too where the request is wrong, which its answer will say, or is of an adapter,
        whose KV is never sent."""
        engine = self._worker.engine
        if any(adapter.name == prompt.model for adapter in engine.admission.adapters):
            return None
        try:
            reuse = engine.reuse.updated(**prompt.reuse)
        except (SparsexError, TypeError):
            return None
        return self._peering.lacking(prompt.tokens, prompt.namespace, reuse)

    def _begin(self, holder: str, block: Block, deadline: float) -> None:
        task = asyncio.ensure_future(self._fetch(holder, block, deadline))
        self._coming[block.key] = task
        task.add_done_callback(lambda _: self._coming.pop(block.key, None))

    async def _fetch(self, holder: str, block: Block, deadline: float) -> None:
        try:
            kept, nbytes, seconds = await self._run(self._get, holder, block, deadline)
            self._slower.correct(nbytes / self.bytes_per_s, seconds)
            if await self._worker.call(self._peering.tiers.arrived, block.key, kept):
                self.counts.blocks += 1
                self.counts.nbytes += nbytes
        except Exception as error:
            if not isinstance(error, NotAskedError):
                self._failed(holder, error)
            with contextlib.suppress(SparsexError):
                await self._worker.call(self._peering.tiers.not_coming, block.key)

    def _failed(self, holder: str, error: Exception) -> None:
        log.warning("the replica at %s does not send blocks; what it has is computed: %s", holder, error)
        self.counts.failed += 1
        now = time.monotonic()
        self._resting = {each: until for each, until in self._resting.items() if until > now}
        self._resting[holder] = now + self._config.rest_s

    async def _run[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(function, *args, **kwargs))

    # On threads of its own ----------------------------------------------------------------------------------

    def _look_up(self, holder: str, lookup: Lookup, deadline: float) -> list[Run]:
        _require_time(deadline)
        body = messages.lookup_to_bytes(lookup, self._model)
        with _told_as_errors(), _Call(holder, messages.LOOKUP, body, self._seal, deadline) as call:
            told = bytearray(call.length(messages.MOST_TOLD_BYTES))
            call.read_into(memoryview(told))
            call.check(told)
            return messages.told_of(told)

    def _get(self, holder: str, block: Block, deadline: float) -> tuple[HostBlock, int, float]:
        """A block, if it is whole and the one that was asked for, its bytes, and the seconds that they took."""
        _require_time(deadline)
        began, tiers = time.monotonic(), self._peering.tiers
        body, most = messages.key_to_bytes(block.key, self._model), tiers.nbytes_of(block) + _BESIDE_PIECES
        with _told_as_errors(), _Call(holder, messages.BLOCK, body, self._seal, deadline) as call:
            nbytes = call.length(most)
            about: dict[str, Any] = {"most_header": _BESIDE_PIECES, "check": call.check}
            kept = tiers.host_block(block_file.receive(call.read_into, nbytes, block.key, self._model, **about))
        return kept, nbytes, time.monotonic() - began


def _require_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise NotAskedError


class _Call:
    """A request to a replica, and its response. It ends by the deadline, of `time.monotonic`."""

    def __init__(self, address: str, path: str, body: bytes, seal: Seal, deadline: float) -> None:
        self._seal, self._deadline = seal, deadline
        self._sealed = seal.of(path.encode(), body)
        netloc = urllib.parse.urlsplit(address).netloc
        self._connection = http.client.HTTPConnection(netloc, timeout=self._left())
        try:
            self._connection.connect()
            self._socket = self._connection.sock  # which the response reads on where the connection is closed
            self._connection.request("POST", path, body, {HEADER: self._sealed})
            self._wait_no_longer()
            self._response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def length(self, most: int) -> int:
        """Bytes of the body. Raises PeerError if it has more than `most`, or says an error."""
        length = self._response.length
        if self._response.status != 200:
            raise PeerError(f"it answers {self._response.status}: {self._response.read(300)!r}")
        if length is None or length > most:
            raise PeerError(f"it sends {length} bytes where at most {most} are due")
        return length

    def read_into(self, into: memoryview) -> None:
        """Fill this with what comes next of the body. Raises PeerError if there is less."""
        while into:
            self._wait_no_longer()
            num = self._response.readinto(into[:_AT_ONCE])
            if not num:
                raise PeerError(f"it stopped where {self._response.length} bytes were still due")
            into = into[num:]

    def check(self, sealed: bytes | bytearray) -> None:
        """Raises PeerError unless this is what the response's seal is of."""
        if not self._seal.is_of(self._response.headers.get(HEADER), self._sealed.encode(), sealed):
            raise PeerError("its response has no seal of this fleet")

    def _wait_no_longer(self) -> None:
        self._socket.settimeout(self._left())

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise PeerError("it is too late")
        return left


@contextlib.contextmanager
def _told_as_errors() -> Iterator[None]:
    """Within, whatever a network or a wrong message does is a PeerError."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
        raise PeerError(repr(error)) from error
