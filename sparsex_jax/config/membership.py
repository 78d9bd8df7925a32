"""Which process of how many this one is, and where process 0 can be reached."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from sparsex_jax.config.checks import is_number, require

SLURM = "slurm"  # in place of a coordinator's address: all is as Slurm's environment says
SECRET = "SPARSEX_GROUP_SECRET"
_LEAST_SECRET = 16
_MAX_PORT = 65534  # the channel of the group has the next one


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long processes wait for each other, in seconds.

    Attributes:
      join: for all to be there, from the first one's start on.
      silence: for a sign of life, which each process gives every tenth of it.
      stall: for a call to get anything done: to end, or to compile a program.
      farewell: for the others to end, when the group ends; and for one to fail as another has.
    """

    join: float = 300.0
    silence: float = 30.0
    stall: float = 300.0
    farewell: float = 10.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(is_number(value) and value > 0, f"{field.name}={value!r} must be a number of seconds above 0")


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process of a group.

    Attributes:
      coordinator: HOST:PORT of process 0, where JAX's coordination service listens. The next port is the group's own.
      num_processes: how many there are.
      process_id: from 0 on. Process 0 schedules and answers requests; it is the leader, and the others follow it.
      patience: how long it waits for the others.
    """

    coordinator: str
    num_processes: int
    process_id: int
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        found = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d{1,5})", self.coordinator)
        ok = found is not None and 1 <= int(found[2]) <= _MAX_PORT
        require(ok, f"coordinator={self.coordinator!r} must be HOST:PORT, with a port from 1 to {_MAX_PORT}")
        require(self.num_processes >= 1, f"num_processes={self.num_processes} must be at least 1")
        ok = 0 <= self.process_id < self.num_processes
        require(ok, f"process_id={self.process_id} must be from 0 to {self.num_processes - 1}, one for each process")

    @property
    def leads(self) -> bool:
        return self.process_id == 0

    @property
    def control(self) -> tuple[str, int]:
        """Host and port of the group's channel."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1

    @classmethod
    def of(
        cls,
        coordinator: str | None,
        num_processes: int | None,
        process_id: int | None,
        patience: Patience | None = None,
    ) -> Membership | None:
        """As options of a command say. None: there is one process.

        Args:
          coordinator: HOST:PORT, or `slurm`, where Slurm says the other two.

        Raises:
          InvalidRequestError: some are given and others are not, or one of them is wrong.
        """
        if coordinator is None:
            given = [name for name, value in _named(num_processes, process_id).items() if value is not None]
            require(not given, f"{' and '.join(given)}: coordinator must be given too, as HOST:PORT of process 0")
            return None
        patience = patience or Patience()
        if coordinator == SLURM:
            return dataclasses.replace(cls.of_slurm(os.environ), patience=patience)
        for name, value in _named(num_processes, process_id).items():
            require(value is not None, f"{name} must be given with coordinator={coordinator!r}")
        assert num_processes is not None
        assert process_id is not None
        return cls(coordinator, num_processes, process_id, patience)

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str]) -> Membership:
        """The task of a Slurm step that this process is. The first node of the step has process 0.

        The port is JAX_COORDINATOR_PORT, or one that the job's number gives, so that jobs on one node have others.

        Raises:
          InvalidRequestError: this is no task that `srun` started.
        """
        needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
        missing = [name for name in needed if name not in environment]
        require(not missing, f"coordinator='slurm' needs {', '.join(missing)}, which srun sets for each task")
        job, nodes, number, task = (environment[name] for name in needed)
        port = environment.get("JAX_COORDINATOR_PORT") or 49152 + 2 * (int(job) % 8000)
        return cls(f"{first_node(nodes)}:{port}", int(number), int(task))


def _named(num_processes: int | None, process_id: int | None) -> dict[str, int | None]:
    return {"num_processes": num_processes, "process_id": process_id}


def first_node(nodes: str) -> str:
    """The first host in a list as Slurm writes it.

    >>> first_node("gpu[003-007,12],login1"), first_node("alone"), first_node("a,b[1-2]")
    ('gpu003', 'alone', 'a')
    """
    prefix, bracket, rest = nodes.partition("[")
    if "," in prefix or not bracket:
        return prefix.split(",")[0]
    return prefix + re.split(r"[-,\]]", rest)[0]


def secret_of(environment: Mapping[str, str]) -> bytes:
    """What the processes of a group know and nobody else. Raises InvalidRequestError if it is not set, or short."""
    secret = environment.get(SECRET, "")
    require(
        len(secret) >= _LEAST_SECRET,
        f"{SECRET} must be set to the same {_LEAST_SECRET} or more characters in all processes of the group; it has "
        f"{len(secret)}",
    )
    return secret.encode()
