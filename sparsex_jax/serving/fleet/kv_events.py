"""KV events in vLLM's format, so that routers made for vLLM can follow this store: msgpack over ZMQ.

A message has three frames: topic, number (8 bytes, big-endian, from 0 on), and a batch
[seconds since 1970, [event, ...], rank], whose events are maps with a `type` (vLLM from #42892 on; 0.26 has it):

    {"type": "BlockStored", "block_hashes": [..], "parent_block_hash": .., "token_ids": [..], "block_size": 64, ...}
    {"type": "BlockRemoved", "block_hashes": [..], "medium": "GPU"}
    {"type": "AllBlocksCleared"}

A block is a whole page with all that is before it, from position 0 on, since routers for vLLM know prefixes only. What
this store finds elsewhere in a prompt is not told here; digests are for that. Who missed a number sends the first one
that it wants to the replay endpoint, and gets (number, batch) for each that is kept, and an end with number -1. If one
is not kept any more, the subscriber must forget all, and knows again what comes from then on. `AllBlocksCleared` is
sent at the start, when the store is lost, and, with all that is stored behind it, when this could not keep up.

**These events have the tokens of all prompts in them.** Whoever can subscribe reads what every client wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Annotated, Any

import numpy as np

from sparsex_jax.config.checks import Limit, Positive, checked, require
from sparsex_jax.serving.fleet.pages import LEAST_MOST, Journal, Page

END = (-1).to_bytes(8, "big", signed=True)
_MEDIUM = "GPU"  # vLLM's word for what the devices hold; routers look for it
_PAUSE_MS = 20  # between looks at the journal, for replays to be served in

log = logging.getLogger(__name__)


def _is_endpoint(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"(tcp|ipc|inproc)://.", value))


_ENDPOINT = Limit(_is_endpoint, "an endpoint of ZMQ, such as tcp://*:5557")


@dataclasses.dataclass(frozen=True)
class KvEventsConfig:
    """Where events are published. The names are vLLM's.

    Attributes:
      endpoint: of the stream. It is bound.
      replay_endpoint: of requests for what was missed. None: there is none.
      topic: of all messages.
      buffer_steps: batches that are kept for replays.
      hwm: messages that may wait for a slow subscriber before it misses some.
    """

    endpoint: Annotated[str, _ENDPOINT] = "tcp://127.0.0.1:5557"
    replay_endpoint: Annotated[str, _ENDPOINT] | None = None
    topic: str = "kv-events"
    buffer_steps: Positive = 10_000
    hwm: Positive = 100_000

    def __post_init__(self) -> None:
        checked(type(self), vars(self))

    def of_rank(self, rank: int) -> KvEventsConfig:
        """Those of the replica of this rank: TCP ports other than 0 are so much larger, as vLLM has them."""
        replay = self.replay_endpoint and _of_rank(self.replay_endpoint, rank)
        return dataclasses.replace(self, endpoint=_of_rank(self.endpoint, rank), replay_endpoint=replay)


def _of_rank(endpoint: str, rank: int) -> str:
    return re.sub(r"(?<=:)[1-9]\d*$", lambda port: str(int(port[0]) + rank), endpoint)


class Blocks:
    """Turns pages that come and go into events. For one thread.

    A block's hash stands for its tokens, those before it, and its namespace. Where a store holds two copies of a block,
    as of exact and approximate KV, it is told of the first that comes and of the last that goes.
    """

    def __init__(self, page_size: int, vocab_size: int) -> None:
        self._page_size, self._vocab_size = page_size, vocab_size
        self._key = secrets.token_bytes(32)
        self._hashes: dict[Hashable, int] = {}
        self._copies: dict[int, int] = {}

    def clear(self) -> dict[str, Any]:
        self._hashes.clear()
        self._copies.clear()
        return {"type": "AllBlocksCleared"}

    def events(self, pages: list[Page]) -> Iterator[dict[str, Any]]:
        for page in pages:
            event = self._stored(page) if page.is_stored else self._removed(page)
            if event is not None:
                yield event

    def _stored(self, page: Page) -> dict[str, Any] | None:
        tokens, parent = np.frombuffer(page.tokens, np.int32), None
        if not page.is_in_prefix or len(tokens) < self._page_size or (tokens >= self._vocab_size).any():
            return None
        if page.parent is not None:
            parent = self._hashes.get(page.parent)
            if parent is None:  # the page before is of an adapter
                return None
        value = self._hash(page, parent)
        self._hashes[page.node], self._copies[value] = value, self._copies.get(value, 0) + 1
        return _stored(value, parent, tokens.tolist(), self._name(page.namespace)) if self._copies[value] == 1 else None

    def _removed(self, page: Page) -> dict[str, Any] | None:
        value = self._hashes.pop(page.node, None)
        if value is None:
            return None
        self._copies[value] -= 1
        if self._copies[value]:
            return None
        del self._copies[value]
        return {"type": "BlockRemoved", "block_hashes": [value], "medium": _MEDIUM}

    def _hash(self, page: Page, parent: int | None) -> int:
        said = b"" if parent is None else parent.to_bytes(8, "little")
        return self._digest(said + self._name(page.namespace).encode() + page.tokens)

    def _digest(self, data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, key=self._key, digest_size=8).digest(), "little")

    def _name(self, namespace: str) -> str:
        """Stands for a namespace, as vLLM's `cache_salt` does among the extra keys."""
        return f"{self._digest(namespace.encode()):016x}"


def _stored(value: int, parent: int | None, tokens: list[int], namespace: str) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": [value],
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": len(tokens),
        "lora_id": None,
        "medium": _MEDIUM,
        "lora_name": None,
        "extra_keys": [[namespace]],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


class KvEvents(Journal):
    """Publishes events from a thread of its own. The cache that it observes never waits for it."""

    def __init__(
        self,
        config: KvEventsConfig,
        *,
        page_size: int,
        vocab_size: int,
        num_pages: int,
        retell: Callable[[], None] = lambda: None,
        rank: int = 0,
    ) -> None:
        """
        Args:
          page_size, vocab_size, num_pages: of the store and the model.
          retell: has the cache tell everything again, behind `cleared`; called when this could not keep up.
          rank: what batches say as their data-parallel rank.

        Raises:
          InvalidRequestError: pyzmq or msgpack is missing, or an endpoint cannot be bound.
        """
        super().__init__(most=max(4 * num_pages, LEAST_MOST))
        self._zmq, self._pack = _libraries()
        self._blocks, self._retell, self._rank = Blocks(page_size, vocab_size), retell, rank
        self._topic, self._seq = config.topic.encode(), 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._context, self._stopping = self._zmq.Context(), threading.Event()
        self._stream = self._bound(self._zmq.PUB, config.endpoint, config.hwm)
        replay = config.replay_endpoint
        self._replay = self._bound(self._zmq.ROUTER, replay, config.hwm) if replay else None
        self._thread = threading.Thread(target=self._run, name="sparsex-kv-events", daemon=True)

    @property
    def endpoint(self) -> str:
        """Where the stream is, with the port that was found where 0 was asked."""
        return self._stream.getsockopt_string(self._zmq.LAST_ENDPOINT)

    @property
    def replay_endpoint(self) -> str | None:
        return self._replay.getsockopt_string(self._zmq.LAST_ENDPOINT) if self._replay else None

    @property
    def num_published(self) -> int:
        """Batches; the number that the next one gets."""
        return self._seq

    def start(self) -> KvEvents:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Publish what was taken down, and end. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._context.destroy(linger=1000)

    def _bound(self, kind: int, endpoint: str, hwm: int) -> Any:
        socket = self._context.socket(kind)
        socket.set_hwm(hwm)
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as error:
            self._context.destroy(linger=0)
            require(False, f"endpoint={endpoint!r} cannot be bound: {error}")
        return socket

    # On the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._publish([self._blocks.clear()])
        while not self._stopping.is_set():
            self._look()
            self._serve_replays()
        self._look()

    def _look(self) -> None:
        if self.is_lost:
            self._retell()
        is_cleared, pages = self.read()
        events = [self._blocks.clear()] if is_cleared else []
        events += self._blocks.events(pages)
        if events:
            self._publish(events)

    def _publish(self, events: list[dict[str, Any]]) -> None:
        batch = self._pack([time.time(), events, self._rank])
        self._kept.append((self._seq, batch))
        self._stream.send_multipart((self._topic, self._seq.to_bytes(8, "big"), batch))
        self._seq += 1

    def _serve_replays(self) -> None:
        if self._replay is None:
            self._stopping.wait(_PAUSE_MS / 1000)
        elif self._replay.poll(_PAUSE_MS):
            self._answer(self._replay, self._replay.recv_multipart())

    def _answer(self, replay: Any, frames: list[bytes]) -> None:
        """Frames: who asks, an empty one, and the first number that is wanted."""
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("a replay was asked for in %d frames, the last of %d bytes", len(frames), len(frames[-1]))
            return
        who, _, first = frames
        for seq, batch in self._kept:
            if seq >= int.from_bytes(first, "big"):
                replay.send_multipart((who, b"", seq.to_bytes(8, "big"), batch))
        replay.send_multipart((who, b"", END, b""))


def _libraries() -> tuple[Any, Callable[[Any], bytes]]:
    try:
        import msgpack
        import zmq
    except ImportError as error:
        require(False, f"KV events need pyzmq and msgpack, of the extra `ray`: {error}")
    return zmq, msgpack.packb
