"""Runs a command of `sparsex` in several processes, which compute together and answer as one.

    python scripts/run_distributed.py --processes 2 --devices 2 -- serve MODEL --tensor-parallel 4
    srun python scripts/run_distributed.py -- serve MODEL --tensor-parallel 16       # a task of a Slurm job

On one machine it starts the processes and gives each its devices: CUDA's, or as many parts of the processor. What
process 0 prints is printed as it is, and lines of the others with their number in front. SIGTERM and SIGINT go to
process 0, which has all end once running requests are done. The exit code is the first that is not 0.

As a task of Slurm it becomes one of the processes. SPARSEX_GROUP_SECRET must be set in the job then; here it is made.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from sparsex_jax.config.membership import SECRET, SLURM

_COMMAND = (sys.executable, "-c", "from sparsex_jax.cli import app; app()")
_COMMANDS = ("serve", "generate")
_END_S = 60.0  # for the others to end once one has, with what they finish first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="to start here; Slurm says it otherwise")
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("command", nargs="+", help="of sparsex, behind --")
    given = parser.parse_args()
    if given.command[0] not in _COMMANDS:
        parser.error(
            f"{given.command[0]} is none of the commands that run in several processes: {', '.join(_COMMANDS)}"
        )
    if "SLURM_PROCID" in os.environ:
        os.execv(_COMMAND[0], [*_COMMAND, *given.command, "--coordinator", SLURM])
    if given.processes < 1 or given.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    return run(given.command, given.processes, given.devices)


def run(command: Sequence[str], processes: int, devices: int) -> int:
    """Start them, pass on signals, and wait for all."""
    secret = secrets.token_hex(32)
    group = [f"--coordinator=127.0.0.1:{free_ports()}", f"--num-processes={processes}"]
    started = [
        subprocess.Popen(
            [*_COMMAND, *command, *group, f"--process-id={own}"],
            env=os.environ | {SECRET: secret} | devices_of(own, devices),
            stdout=None if own == 0 else subprocess.PIPE,
            stderr=None if own == 0 else subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes here, and goes to process 0 only
        )
        for own in range(processes)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: started[0].send_signal(number))
    for own, process in enumerate(started[1:], start=1):
        threading.Thread(target=copy, args=(process.stdout, own), daemon=True).start()
    return wait_for_all(started)


def free_ports() -> int:
    """A port that is free, as the next one is."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except (OSError, OverflowError):
                continue


def devices_of(own: int, devices: int) -> dict[str, str]:
    """What gives a process its devices. JAX_PLATFORMS=cpu takes parts of the processor where there are GPUs too."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or shutil.which("nvidia-smi") is None:
        return {"JAX_NUM_CPU_DEVICES": str(devices)}
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(own * devices + number) for number in range(devices))}


def copy(lines: IO[bytes] | None, own: int) -> None:
    for line in lines or ():
        sys.stderr.write(f"[{own}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait_for_all(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first exit code that is not 0. Once one has ended, the others end by themselves, or are killed."""
    codes = []
    ended = threading.Event()
    for process in started:
        threading.Thread(target=lambda process=process: (process.wait(), ended.set()), daemon=True).start()
    while not ended.wait(1.0):
        pass
    for process in started:
        try:
            codes.append(process.wait(_END_S))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
