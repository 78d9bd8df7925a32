"""How processes find each other, before JAX knows of several: followers come to the leader, in any order.

Each says who it is and what it runs. The leader refuses the group if something differs that must not, and names it.
Only then does each process tell JAX (`jax.distributed.initialize`), which would say less, and later.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
import time
from collections.abc import Mapping

import jax

from sparsex_jax.config.membership import Membership
from sparsex_jax.distributed.channel import Channel, open_channel
from sparsex_jax.distributed.peer import Peer
from sparsex_jax.errors import GroupError

About = Mapping[str, str]  # what must be alike, by the name of the field

log = logging.getLogger(__name__)

_RETRY_S = 0.2
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def difference(own: About, other: About, who: str) -> str | None:
    """The first field that another process has otherwise than process 0, in words."""
    for name in dict.fromkeys((*own, *other)):
        if own.get(name) != other.get(name):
            return f"{name} is {other.get(name)} in {who} and {own.get(name)} in process 0; it must be the same in all"
    return None


def gather(membership: Membership, secret: bytes, about: About) -> list[Peer]:
    """Wait for all followers. Of process 0.

    Raises:
      GroupError: one runs something else, two have one number, or some did not come in time.
    """
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + membership.patience.join
    with _listening(membership) as listener:
        while missing := _missing(peers, membership.num_processes):
            channel = _accept(listener, secret, deadline, missing)
            if channel is not None:
                _greet(channel, membership, about, peers)
    for peer in peers.values():
        with contextlib.suppress(OSError):  # that it is gone is noticed soon
            peer.send("")
    return [peers[number] for number in sorted(peers)]


def _missing(peers: dict[int, Peer], num_processes: int) -> list[int]:
    """The numbers of those that have not come yet, or have ended since."""
    _drop_ended(peers)
    return sorted(set(range(1, num_processes)) - set(peers))


def _drop_ended(peers: dict[int, Peer]) -> None:
    """Free the places of those that came and have ended: they may come again."""
    for number in [number for number, peer in peers.items() if peer.is_gone]:
        gone = peers.pop(number)
        gone.close()
        log.warning("%s has ended while the others were waited for", gone)


def _listening(membership: Membership) -> socket.socket:
    """Where only this machine can reach it, if the coordinator's address is one that no other machine can reach."""
    host, port = membership.control
    try:
        if host in _LOOPBACK:
            return socket.create_server((host, port), family=socket.AF_INET6 if host == "::1" else socket.AF_INET)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        about = f"coordinator={membership.coordinator!r}: the group's channel, port {port}, cannot be listened at"
        raise GroupError(f"{about}: {error.strerror or error}") from error


def _accept(listener: socket.socket, secret: bytes, deadline: float, missing: list[int]) -> Channel | None:
    """The next follower's channel; None: it was none."""
    listener.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
        connected, address = listener.accept()
    except TimeoutError:
        named = ", ".join(map(str, missing))
        raise GroupError(f"process {named} did not come in time; is it started with the same coordinator?") from None
    try:
        return open_channel(connected, secret, leads=True)
    except GroupError as error:
        log.warning("a connection from %s is refused: %s", address[0], error)
        return None


def _greet(channel: Channel, membership: Membership, about: About, peers: dict[int, Peer]) -> None:
    patience = membership.patience
    try:
        number, host, theirs = channel.receive(patience.silence)
    except (OSError, EOFError) as error:
        channel.close()
        log.warning("a process that came ended, or hung, before it said which one it is: %s", error)
        return
    peer = Peer(number, host, channel, patience)
    wrong = difference(about, theirs, str(peer))
    _drop_ended(peers)
    if number in peers:
        wrong = f"process_id={number} is that of two processes, on {peers[number].host} and on {host}"
    elif not 0 < number < membership.num_processes:
        wrong = f"process_id={number} must be from 1 to {membership.num_processes - 1}"
    if wrong:
        for each in (*peers.values(), peer):
            with contextlib.suppress(OSError):
                each.send(wrong)
        raise GroupError(wrong)
    peers[number] = peer


def come(membership: Membership, secret: bytes, about: About) -> Peer:
    """Come to process 0, and wait until all are there.

    Raises:
      GroupError: it did not listen in time, has another secret, or refused the group.
    """
    channel = open_channel(_connected(membership), secret, leads=False)
    channel.send(membership.process_id, platform.node(), dict(about))
    try:
        (refusal,) = channel.receive(membership.patience.join)
    except (OSError, EOFError) as error:
        raise GroupError("process 0 ended, or waits in vain for other processes; its output says more") from error
    if refusal:
        raise GroupError(refusal)
    return Peer(0, membership.control[0], channel, membership.patience)


def _connected(membership: Membership) -> socket.socket:
    patience = membership.patience
    deadline = time.monotonic() + patience.join
    while True:
        try:
            return socket.create_connection(membership.control, timeout=max(deadline - time.monotonic(), 0.01))
        except OSError as error:
            if time.monotonic() + _RETRY_S > deadline:
                host, port = membership.control
                said = f"process 0 was not reached at {host}, port {port}, within join={patience.join:g} s"
                raise GroupError(f"{said}: {error.strerror or error}") from error
            time.sleep(_RETRY_S)


def tell_jax(membership: Membership) -> None:
    """Have JAX see the devices of all processes. Before its first use."""
    host, port = membership.coordinator.rpartition(":")[::2]
    patience = membership.patience
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        membership.coordinator,
        membership.num_processes,
        membership.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=int(patience.join),
        shutdown_timeout_seconds=max(int(patience.farewell), 1),
        coordinator_bind_address=f"{host}:{port}" if host.strip("[]") in _LOOPBACK else None,
    )
