"""Process 0: it decides, and tells the others of each call before it makes the call itself.

All processes then dispatch the same programs in the same order, as collectives need it. What a call returned and what
lives on the devices is known by the call's number in all of them; once nobody here has it any more, the others let go
of it too.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsex_jax.config.membership import Patience
from sparsex_jax.device.runner import Runner
from sparsex_jax.distributed import kinds
from sparsex_jax.distributed.codec import Reference, is_kept, kept_of, pack
from sparsex_jax.distributed.joining import About, difference
from sparsex_jax.distributed.likeness import of_runner
from sparsex_jax.distributed.peer import Peer
from sparsex_jax.errors import GroupError

log = logging.getLogger(__name__)


class Leader:
    """The group as process 0 has it, and the relay of its runner (`Runner.relay`).

    Attributes:
      leads: that it is not a `Follower`.
      failure: why the group cannot go on. From any thread.
      on_end: called with that once it is known, on any thread. The thread that runs the model may never come back: it
        may wait on the devices for a process that is gone.
      on_leaving: called when a follower was told to end and the group should end; on a thread of the group's.
    """

    leads = True

    def __init__(self, peers: Sequence[Peer], patience: Patience, on_end: Callable[[GroupError], None]) -> None:
        self.failure: GroupError | None = None
        self.on_end = on_end
        self.on_leaving: Callable[[], None] = lambda: None
        self._peers, self._patience = peers, patience
        self._news = threading.Condition()
        self._abouts: dict[int, Mapping[str, str]] = {}
        self._outcomes: dict[tuple[int, int], tuple[str, str]] = {}  # by process and call
        self._numbers = itertools.count(1)
        self._within = False
        self._own_failures: set[int] = set()
        self._kept: dict[int, tuple[weakref.ref[Any], Reference]] = {}  # by the object's id
        self._dropped: collections.deque[Reference] = collections.deque()
        self._closing = False
        for peer in peers:
            peer.start(self, lambda: (0.0, 0))

    # Ends and faults ----------------------------------------------------------------------------------------

    def require_whole(self) -> None:
        """Raises GroupError if the group cannot go on."""
        if self.failure is not None:
            raise GroupError(str(self.failure))

    def fail(self, error: GroupError) -> None:
        """The group cannot go on. From any thread; only the first reason counts."""
        with self._news:
            if self.failure is not None:
                return
            self.failure = error
            self._news.notify_all()
        log.error("the group of %d processes ends: %s", len(self._peers) + 1, error)
        for peer in self._peers:  # one that stands still would have the others wait
            threading.Thread(target=peer.say_bye, args=(str(error),), daemon=True).start()
        self.on_end(error)

    def close(self, why: str = "") -> None:
        """End the group: the followers end too, with exit code 0 unless there is a reason."""
        self._closing = True
        for peer in self._peers:
            peer.say_bye(why)
        deadline = time.monotonic() + self._patience.farewell
        for peer in self._peers:
            if not peer.wait_until_gone(max(deadline - time.monotonic(), 0.0)):
                log.warning("%s has not ended after %g s", peer, self._patience.farewell)
            peer.close()

    # On the peers' threads ----------------------------------------------------------------------------------

    def heard(self, peer: Peer, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == kinds.ALIVE:
            self._look(peer, *rest)
        elif kind == kinds.ABOUT:
            self._note(self._abouts, peer.number, rest[0])
        elif kind in (kinds.OUTCOME, kinds.FAILED):
            number, name, text = rest
            self._note(self._outcomes, (peer.number, number), (name, text))
            if kind == kinds.FAILED:
                self._wait_for_own(peer, number, f"{name}: {text}")
        elif kind == kinds.LEAVING:
            self.on_leaving()
        elif kind == kinds.BYE and not self._closing:
            self.fail(GroupError(f"{peer} has ended: {rest[0] or 'it gives no reason'}"))

    def lost(self, peer: Peer, how: str) -> None:
        self.fail(GroupError(f"{peer} {how}; without it the others cannot go on"))

    def _note[Key, Value](self, notes: dict[Key, Value], key: Key, value: Value) -> None:
        with self._news:
            notes[key] = value
            self._news.notify_all()

    def _look(self, peer: Peer, silent_s: float, number: int) -> None:
        if silent_s > self._patience.stall:
            self.fail(GroupError(f"{peer} hangs: call {number} has got nothing done for {silent_s:.0f} s"))

    def _wait_for_own(self, peer: Peer, number: int, error: str) -> None:
        """A follower failed. Where that is the request's fault, this process fails as well, and the group goes on."""

        def judge() -> None:
            if number not in self._own_failures:
                self.fail(GroupError(f"{peer} failed alone, in call {number}: {error}"))

        timer = threading.Timer(self._patience.silence, judge)
        timer.daemon = True
        timer.start()

    # What must be alike -------------------------------------------------------------------------------------

    def agree(self, about: About) -> None:
        """Compare what all processes know by now. Each calls it at the same time.

        Raises:
          GroupError: a field differs, and which one; or a process ended meanwhile.
        """
        self._await(lambda: len(self._abouts) == len(self._peers), None)
        compared = (difference(about, self._abouts[peer.number], str(peer)) for peer in self._peers)
        wrong = next((each for each in compared if each), "")
        self._abouts.clear()
        for peer in self._peers:
            peer.send(kinds.AGREED, wrong)
        if wrong:
            raise GroupError(wrong)

    def _await(self, done: Callable[[], bool], seconds: float | None) -> bool:
        """Whether it became true in time. Raises GroupError if the group fails before."""
        with self._news:
            in_time = self._news.wait_for(lambda: done() or self.failure is not None, seconds)
        self.require_whole()
        return in_time

    # Calls --------------------------------------------------------------------------------------------------

    def lead(self, runner: Runner) -> None:
        """From now on the followers do what this runner does. Raises as `agree`, of what `likeness` compares."""
        self.agree(of_runner(runner))
        runner.relay = self

    def __call__[Result](
        self, method: Callable[..., Result], runner: Runner, args: Sequence[Any], options: Mapping[str, Any]
    ) -> Result:
        """Make a call here and in all other processes. On the thread that steps.

        Raises:
          GroupError: the group cannot go on.
          Exception: what the call raised, if it did in all processes.
        """
        if self._within:  # a call within a call: each process makes it by itself
            return method(runner, *args, **options)
        self.require_whole()
        number = next(self._numbers)
        self._tell(number, method.__name__, args, options)
        self._within = True
        try:
            result = method(runner, *args, **options)
        except Exception as error:
            self._require_all(number, type(error).__name__, error)
            raise
        finally:
            self._within = False
        if isinstance(result, bool):
            self._require_all(number, "", result)
        self._keep(number, result)
        return result

    def _tell(self, number: int, name: str, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        content = pack([list(args), dict(options)], self._refer)
        dropped = [list(self._dropped.popleft()) for _ in range(len(self._dropped))]
        message = pack((kinds.CALL, number, name, content, dropped))
        for peer in self._peers:
            try:
                peer.send_packed(message)
            except OSError:
                self.lost(peer, "has ended")
        self.require_whole()

    def _require_all(self, number: int, name: str, said: object) -> None:
        """That the same came of a call in all processes: the same error, or the same result.

        Raises:
          GroupError: it did not, or one does not say in time, for instance since it waits for this one.
        """
        self._own_failures.add(number)
        for peer in self._peers:
            peer.send(kinds.ASK, number)
        keys = [(peer.number, number) for peer in self._peers]
        self._await(lambda: all(key in self._outcomes for key in keys), self._patience.silence)
        for peer, key in zip(self._peers, keys, strict=True):
            theirs = self._outcomes.pop(key, None)
            if theirs is None or theirs[0] != name or (not name and theirs[1] != repr(said)):
                self._disagree(peer, number, theirs, f"{name}: {said}" if name else repr(said))

    def _disagree(self, peer: Peer, number: int, theirs: tuple[str, str] | None, own: str) -> None:
        other = _in_words(theirs)
        self.fail(GroupError(f"of call {number}, process 0 has {own}, and {peer} {other}; they cannot go on together"))
        self.require_whole()

    # What lives on the devices ------------------------------------------------------------------------------

    def _keep(self, number: int, result: Any) -> None:
        for reference, part in kept_of(number, result).items():
            self._name(part, reference)

    def _name(self, part: Any, reference: Reference) -> None:
        key = id(part)
        if key in self._kept:  # an earlier call returned it too
            self._dropped.append(reference)
            return

        def gone(_: Any) -> None:
            self._kept.pop(key, None)
            self._dropped.append(reference)

        self._kept[key] = weakref.ref(part, gone), reference

    def _refer(self, value: Any) -> Reference | None:
        found = self._kept.get(id(value)) if is_kept(value) else None
        return None if found is None else found[1]


def _in_words(outcome: tuple[str, str] | None) -> str:
    """What came of a call in another process: its error, or what it returned."""
    if outcome is None:
        return "does not say what it has"
    error, said = outcome
    return f"has {error}: {said}" if error else f"has {said or 'not failed'}"
