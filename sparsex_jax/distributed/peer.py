"""Another process of the group: a thread hears it, another tells it again and again that this process lives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from sparsex_jax.config.membership import Patience
from sparsex_jax.distributed import kinds
from sparsex_jax.distributed.channel import Channel


class Ears(Protocol):
    """Who hears of a peer. On a thread of the peer's."""

    def heard(self, peer: Peer, message: tuple[Any, ...]) -> None:
        """A message came, which is none of `ALIVE` from a leader."""

    def lost(self, peer: Peer, how: str) -> None:
        """There will be no more messages, though the peer did not say that it ends."""


class Peer:
    """A process of the group as another one sees it.

    Attributes:
      number: its process id.
      host: the machine that it runs on, by its own words.
      left: it said that it ends, or this process ends.
    """

    def __init__(self, number: int, host: str, channel: Channel, patience: Patience) -> None:
        self.number, self.host, self._channel, self._patience = number, host, channel, patience
        self.left = False
        self._wake, self._closed = threading.Event(), threading.Event()
        self._wishes: list[tuple[Any, ...]] = []

    def __str__(self) -> str:
        return f"process {self.number} ({self.host})"

    @property
    def is_gone(self) -> bool:
        """It hung up. Before `start`, while it waits and says nothing."""
        return self._channel.is_gone()

    def start(self, ears: Ears, sign: Callable[[], tuple[Any, ...]]) -> None:
        """
        Args:
          sign: gives what each sign of life says.
        """
        for name, run in (("hears", lambda: self._hear(ears)), ("tells", lambda: self._tell(sign))):
            threading.Thread(target=run, name=f"sparsex-{name}-{self.number}", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Raises OSError if it is gone."""
        self._channel.send(*message)

    def send_packed(self, message: bytes) -> None:
        self._channel.send_packed(message)

    def send_soon(self, *message: Any) -> None:
        """For signal handlers, which must not wait for a lock that the thread they interrupt may hold."""
        self._wishes.append(message)
        self._wake.set()

    def say_bye(self, why: str) -> None:
        """The last message. What it then says is heard, and that it hangs up is right."""
        self.left = True
        with contextlib.suppress(OSError):
            self.send(kinds.BYE, why)

    def wait_until_gone(self, seconds: float) -> bool:
        return self._closed.wait(seconds)

    def close(self) -> None:
        self.left = True
        self._channel.close()
        self._wake.set()

    def _hear(self, ears: Ears) -> None:
        how = "has ended"
        try:
            while True:
                message = self._channel.receive(self._patience.silence)
                self.left = self.left or message[0] == kinds.BYE
                ears.heard(self, message)
        except TimeoutError:
            how = f"has given no sign of life for {self._patience.silence:g} s"
        except (EOFError, OSError):
            pass
        except (ValueError, KeyError, TypeError, IndexError) as error:
            how = f"sent what is no message: {error!r:.200}"
        finally:
            self._closed.set()
        if not self.left:
            ears.lost(self, how)

    def _tell(self, sign: Callable[[], tuple[Any, ...]]) -> None:
        with contextlib.suppress(OSError):  # who hears it notices
            while not self._closed.is_set():
                self._wake.wait(self._patience.silence / 10)
                self._wake.clear()
                wishes, self._wishes = self._wishes, []
                for message in (*wishes, (kinds.ALIVE, *sign())):
                    self.send(*message)
