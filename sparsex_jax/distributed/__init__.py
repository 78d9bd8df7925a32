"""Several processes that run one model: one schedules and answers, all compute. See README.md here."""

from __future__ import annotations

import os
import sys

from sparsex_jax.config.membership import SECRET, SLURM, Membership, Patience, secret_of
from sparsex_jax.distributed.follower import Follower
from sparsex_jax.distributed.joining import About, come, gather, tell_jax
from sparsex_jax.distributed.leader import Leader
from sparsex_jax.distributed.likeness import of_programs

__all__ = ["SECRET", "SLURM", "Follower", "Leader", "Membership", "Patience", "join", "leave", "secret_of"]


def leave(error: BaseException) -> None:
    """End this process at once, with exit code 1: a teardown would wait for processes that are gone."""
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(1)


def join(membership: Membership, secret: bytes, about: About) -> Leader | Follower:
    """Join the other processes, before JAX is used for the first time. Waits until all are there.

    Args:
      about: what must be the same in all processes beside the versions, by the names that an error says.

    Raises:
      GroupError: they did not all come in time, or differ in what must be the same.
    """
    about = of_programs() | {"num_processes": str(membership.num_processes)} | dict(about)
    member: Leader | Follower
    if membership.leads:
        member = Leader(gather(membership, secret, about), membership.patience, leave)
    else:
        member = Follower(come(membership, secret, about), leave)
    tell_jax(membership)
    return member
