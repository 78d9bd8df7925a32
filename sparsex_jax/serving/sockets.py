"""The sockets that the server listens at. They are bound before a model is loaded, so a port in use is told at once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from sparsex_jax.errors import AddressError

_SEND_BYTES = 256 << 10  # that the kernel buffers for a client that does not read; by itself it takes up to 4 MiB


@contextlib.contextmanager
def bound(host: str, port: int, uds: Path | None = None) -> Iterator[list[socket.socket]]:
    """Sockets for all addresses of a host name, or for a path. They are bound, and refuse clients until they listen.

    Args:
      host: a name, an IPv4 or an IPv6 address; empty for all addresses of this machine.
      port: 0 takes any free one, the same at all addresses.
      uds: the path of a Unix domain socket, in place of host and port.

    Raises:
      AddressError: an address is in use, not known, or not permitted.
    """
    with contextlib.ExitStack() as held:
        if uds is not None:
            sockets = [held.enter_context(_bound_path(uds))]
            held.callback(uds.unlink, missing_ok=True)
            yield sockets
        else:
            yield [held.enter_context(each) for each in _bound_addresses(host.strip("[]"), port)]


def free_port() -> int:
    """A port of this machine that is free now, for a server that another process or thread starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def url_of(bound: socket.socket) -> str:
    """As clients write it."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def make_ready(bound: socket.socket) -> None:
    """Set what connections take over from the socket that accepts them. For bound sockets, before they listen."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    if bound.family != socket.AF_UNIX:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # clients that vanish are noticed
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a later server can bind at once


def _bound_addresses(host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"host={host!r} is not known: {error}") from error
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, address in dict.fromkeys((each[0], each[4]) for each in found):
        if port == 0 and sockets:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_bound_address(family, address))
        except OSError as error:
            failed = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # else a family this machine lacks
                sockets = _closed(sockets)
                break
    if not sockets:
        raise AddressError(f"host={host!r}, port={port} cannot be listened at: {_reason(failed)}") from failed
    return sockets


def _bound_address(family: int, address: tuple) -> socket.socket:
    """Bound for this process alone if possible: with SO_REUSEADDR, two that do not listen yet could have one port.

    Connections of a server that just ended keep a port from being bound so; then only a server that listens does.
    """
    try:
        return _try_to_bind(family, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return _try_to_bind(family, address, reuse=True)


def _try_to_bind(family: int, address: tuple, *, reuse: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _bound_path(path: Path) -> socket.socket:
    _remove_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(str(path))
    except OSError as error:
        made.close()
        raise AddressError(f"uds={str(path)!r} cannot be listened at: {_reason(error)}") from error
    return made


def _remove_stale(path: Path) -> None:
    """Remove the socket that a server left which was killed. Raises AddressError if a server answers there."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise AddressError(f"uds={str(path)!r} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.settimeout(1)
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise AddressError(f"uds={str(path)!r} cannot be listened at: {_reason(error)}") from error
        else:
            raise AddressError(f"uds={str(path)!r} is in use by another server")


def _closed(sockets: list[socket.socket]) -> list[socket.socket]:
    for each in sockets:
        each.close()
    return []


def _reason(error: OSError | None) -> str:
    if error is not None and error.errno == errno.EADDRINUSE:
        return "it is in use by another program"
    return "no such address on this machine" if error is None else (error.strerror or str(error)).lower()
