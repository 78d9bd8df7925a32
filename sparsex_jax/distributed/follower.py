"""Every process but process 0: it makes the calls that the leader makes, in the same order, and decides nothing."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping
from typing import Any

from sparsex_jax.device.heartbeat import Heartbeat
from sparsex_jax.device.runner import Runner, relayed_methods
from sparsex_jax.distributed import kinds
from sparsex_jax.distributed.codec import Reference, kept_of, unpack
from sparsex_jax.distributed.joining import About
from sparsex_jax.distributed.likeness import of_runner
from sparsex_jax.distributed.peer import Peer
from sparsex_jax.errors import GroupError

log = logging.getLogger(__name__)


class Follower:
    """The group as one of the others has it.

    Attributes:
      on_end: called when the group ends otherwise than in `follow`, with the reason, on a thread of the group's. The
        main thread may never come back: it may wait on the devices for a process that is gone.
    """

    leads = False

    def __init__(self, leader: Peer, on_end: Callable[[GroupError], None]) -> None:
        self._leader, self._on_end = leader, on_end
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._kept: dict[Reference, Any] = {}
        self._outcomes: tuple[int, str, str] = (0, "", "")  # of the last call
        self._heartbeat, self._number = Heartbeat(), 0
        leader.start(self, lambda: (self._heartbeat.silent_s, self._number))

    # On the leader's threads --------------------------------------------------------------------------------

    def heard(self, peer: Peer, message: tuple[Any, ...]) -> None:
        if message[0] == kinds.BYE and message[1]:
            self._on_end(GroupError(message[1]))
        elif message[0] != kinds.ALIVE:
            self._inbox.put(message)

    def lost(self, peer: Peer, how: str) -> None:
        self._on_end(GroupError(f"{peer} {how}; it leads the group, which cannot go on without it"))

    # On the main thread -------------------------------------------------------------------------------------

    def ask_to_leave(self) -> None:
        """Ask the leader to end the group. From a signal handler too."""
        self._leader.send_soon(kinds.LEAVING)

    def agree(self, about: About) -> None:
        """As `Leader.agree`."""
        self._leader.send(kinds.ABOUT, dict(about))
        kind, *rest = self._inbox.get()
        wrong = rest[0] if kind == kinds.AGREED else f"the group ended before all had loaded: {kind} {rest}"
        if wrong:
            raise GroupError(wrong)

    def follow(self, runner: Runner) -> None:
        """Do what the leader's runner does, until the leader ends the group. Raises as `Leader.lead`."""
        self.agree(of_runner(runner))
        while True:
            self._heartbeat.rest()
            kind, *rest = self._inbox.get()
            self._heartbeat.beat()
            if kind == kinds.CALL:
                self._replay(runner, *rest)
            elif kind == kinds.ASK:
                self._leader.send(kinds.OUTCOME, *self._outcomes)
            elif kind == kinds.BYE:
                return

    def close(self, why: str = "") -> None:
        self._leader.say_bye(why)
        self._leader.close()

    def _replay(self, runner: Runner, number: int, name: str, content: bytes, dropped: list[list[int]]) -> None:
        self._number = number
        for each in dropped:
            self._kept.pop(Reference(*each), None)
        try:
            args, options = unpack(content, self._kept.__getitem__)
            result = _call(runner, name, args, options)
        except Exception as error:
            log.warning("call %d, %s, failed", number, name, exc_info=error)
            self._outcomes = number, type(error).__name__, str(error)
            self._leader.send(kinds.FAILED, *self._outcomes)
            return
        self._outcomes = number, "", repr(result) if isinstance(result, bool) else ""
        self._kept |= kept_of(number, result)


def _call(runner: Runner, name: str, args: list[Any], options: Mapping[str, Any]) -> Any:
    if name not in relayed_methods():
        raise GroupError(f"{name} is no method that processes make together")
    return getattr(runner, name)(*args, **options)
