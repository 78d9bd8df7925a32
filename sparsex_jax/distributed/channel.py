"""Whole messages over TCP, between two processes that proved to each other that they know the group's secret.

    leader                                  follower
      <- 32 random bytes                      <- 32 random bytes
      <- HMAC(secret, "follower", both)                              checked by the leader, who hangs up if it is wrong
                                              <- HMAC(secret, "leader", both)
    then frames: 4 bytes of length, the message

What follows is neither encrypted nor signed: the network between the processes is one that others cannot write to, as
it must be for JAX's own traffic.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import struct
import threading
from typing import Any

from sparsex_jax.distributed.codec import pack, unpack
from sparsex_jax.errors import GroupError

_LENGTH = struct.Struct(">I")
_NONCE, _PROOF = 32, 32
_HANDSHAKE_S = 10.0


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        """Raises OSError if the other end is gone."""
        self.send_packed(pack(message))

    def send_packed(self, message: bytes) -> None:
        """As `send`, of what `pack` made of the tuple."""
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, silence_s: float | None) -> Any:
        """The next message.

        Args:
          silence_s: how long nothing at all may come. None: any time.

        Raises:
          TimeoutError: nothing came for so long.
          EOFError, OSError: the other end is gone.
          ValueError, KeyError, TypeError: what came is no message.
        """
        self._socket.settimeout(silence_s)
        (length,) = _LENGTH.unpack(_exactly(self._socket, _LENGTH.size))
        return unpack(_exactly(self._socket, length))

    def is_gone(self) -> bool:
        """Whether the other end hung up, where nothing it sent waits to be received. Does not wait."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _exactly(connected: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    at = 0
    while at < size:
        count = connected.recv_into(memoryview(data)[at:])
        if count == 0:
            raise EOFError("the connection was closed")
        at += count
    return bytes(data)


def open_channel(connected: socket.socket, secret: bytes, *, leads: bool) -> Channel:
    """A channel over a connected socket, once both ends have proved that they know the secret.

    Raises:
      GroupError: the other end does not, or hung up, which it does where this one does not.
    """
    own, other = ("leader", "follower") if leads else ("follower", "leader")
    connected.settimeout(_HANDSHAKE_S)
    try:
        nonce = secrets.token_bytes(_NONCE)
        connected.sendall(nonce)
        theirs = _exactly(connected, _NONCE)
        nonces = nonce + theirs if leads else theirs + nonce
        if not leads:
            connected.sendall(_proof(secret, own, nonces))
        proved = hmac.compare_digest(_exactly(connected, _PROOF), _proof(secret, other, nonces))
        if leads and proved:
            connected.sendall(_proof(secret, own, nonces))
    except (OSError, EOFError) as error:
        connected.close()
        raise GroupError(f"the {other} hung up; if it runs, its group secret is another one") from error
    if not proved:
        connected.close()
        raise GroupError(f"the {other} does not know the group secret")
    connected.settimeout(None)
    return Channel(connected)


def _proof(secret: bytes, role: str, nonces: bytes) -> bytes:
    return hmac.digest(secret, role.encode() + nonces, "sha256")
