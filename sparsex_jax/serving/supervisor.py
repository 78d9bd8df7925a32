"""Tells systemd, or whoever else started the server with NOTIFY_SOCKET set, how it is: sd_notify(3) without libsystemd.

With `Type=notify` the unit is started once the server listens, and with `WatchdogSec` it is started again when no
`WATCHDOG=1` comes for so long.
"""

from __future__ import annotations

import contextlib
import os
import socket

READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"


class Supervisor:
    """The other end of NOTIFY_SOCKET; nobody, where that is not set."""

    def __init__(self, address: str | None = None) -> None:
        """
        Args:
          address: a path, or @ and the name of an abstract socket. None: as NOTIFY_SOCKET says.
        """
        address = os.environ.get("NOTIFY_SOCKET") if address is None else address
        self._address = address.replace("@", "\0", 1) if address and address[0] == "@" else address

    def tell(self, state: str) -> None:
        """Say it. Nothing happens if nobody listens: the server serves all the same."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setblocking(False)
            notify.sendto(state.encode(), self._address)
