"""Measures what it costs that several processes have the devices: host time of dispatches, and times of steps.

    JAX_NUM_CPU_DEVICES=2 python scripts/bench_processes.py --tensor-parallel 2          # in one process
    python scripts/bench_processes.py --tensor-parallel 2 --processes 2                  # the same in two

Prints a JSON object: medians in milliseconds, by what was timed. `dispatch` is until the call returns, and `done` until
the devices have done it. A decode step goes on from the state that is on the devices, but for `new state`, which comes
from the host. What a call sends to each other process is in `bytes`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from run_distributed import devices_of, free_ports

from sparsex_jax.cache import Match
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import SamplingParams
from sparsex_jax.config.membership import SECRET, Membership
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.state import BatchSlot, decode_state
from sparsex_jax.distributed import Follower, Leader, join, secret_of
from sparsex_jax.distributed.codec import pack
from sparsex_jax.engine import Engine
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import make_engine
from sparsex_jax.eval.results import provenance
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/ruler-tiny")
    parser.add_argument("--tensor-parallel", type=count, default=2)
    parser.add_argument("--processes", type=count, default=1)
    parser.add_argument("--process-id", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=count, default=8)
    parser.add_argument("--prompt", type=count, default=512, help="tokens that are prefilled")
    parser.add_argument("--calls", type=count, default=50)
    given = parser.parse_args()
    if given.tensor_parallel % given.processes:
        parser.error(f"--processes {given.processes} does not divide --tensor-parallel {given.tensor_parallel}")
    if given.processes > 1 and given.coordinator is None:
        sys.exit(start_all(given.processes, given.tensor_parallel // given.processes))
    member = joined(given)
    engine = make_engine(given.model, tensor_parallel=given.tensor_parallel, store_tokens=8192, choose="always")
    if isinstance(member, Follower):
        member.follow(engine.runner)
    else:
        if member is not None:
            member.lead(engine.runner)
        print(json.dumps(result(engine, given)))
    if member is not None:
        member.close()


def start_all(processes: int, devices: int) -> int:
    """This command in each of the processes. Returns the first exit code that is not 0."""
    common = [f"--coordinator=127.0.0.1:{free_ports()}", *sys.argv[1:]]
    secret = {SECRET: secrets.token_hex(32)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *common, f"--process-id={own}"],
            env=os.environ | secret | devices_of(own, devices),
        )
        for own in range(processes)
    ]
    return next((code for code in [process.wait() for process in started] if code), 0)


def joined(given: argparse.Namespace) -> Leader | Follower | None:
    if given.processes == 1:
        return None
    return join(Membership(given.coordinator, given.processes, given.process_id), secret_of(os.environ), {})


def result(engine: Engine, given: argparse.Namespace) -> dict[str, Any]:
    runner = engine.runner
    with engine.admission.lend(given.prompt + 1) as pages:
        plan = plan_of(given.prompt, pages)
        figures = dict([*prefills(runner, plan, given.calls), *decodes(runner, pages, given)])
    sizes = {"prefill": len(pack([plan])), "new state": len(pack(state_of(runner, pages, given.sequences)))}
    settings = {name: value for name, value in vars(given).items() if name not in ("process_id", "coordinator")}
    return provenance(given.tensor_parallel) | {"settings": settings, "ms": figures, "bytes": sizes}


def plan_of(tokens: int, pages: Any) -> RequestPlan:
    prompt = PromptMap.of(np.zeros(tokens, np.int32), Match.nothing())
    return RequestPlan(prompt, (Phase(0, prompt.fresh),), pages)


def state_of(runner: Runner, pages: Any, sequences: int) -> Any:
    slot = BatchSlot([0], [0], SamplingParams(max_new_tokens=4096), (-1,), pages)
    return decode_state([slot] * sequences, runner.shapes.max_pages, runner.model.vocab_size)


def median_ms(calls: int, before: Callable[[], Any], timed: Callable[[Any], Any], wait: bool) -> float:
    seconds = []
    for _ in range(calls + 3):  # the first compile
        given = before()
        began = time.perf_counter()
        made = timed(given)
        if wait:
            jax.block_until_ready(made)
        seconds.append(time.perf_counter() - began)
        jax.block_until_ready(made)
    return round(1e3 * float(np.median(seconds[3:])), 4)


def prefills(runner: Runner, plan: RequestPlan, calls: int) -> Iterator[tuple[str, float]]:
    def run(_: Any) -> Any:
        return runner.advance(runner.begin([plan]))

    for name, wait in (("prefill, dispatch", False), ("prefill, done", True)):
        yield name, median_ms(calls, lambda: jax.block_until_ready(runner.store), run, wait)


def decodes(runner: Runner, pages: Any, given: argparse.Namespace) -> Iterator[tuple[str, float]]:
    host = state_of(runner, pages, given.sequences)
    kept = [runner.start_decode(host, 1)[0]]

    def go_on(_: Any) -> Any:
        kept[0], sampled = runner.start_decode(kept[0], 1)
        return sampled

    def anew(_: Any) -> Any:
        return runner.start_decode(host, 1)[1]

    for name, wait in (("dispatch", False), ("done", True)):
        yield f"decode step, {name}", median_ms(given.calls, lambda: None, go_on, wait)
        yield f"decode step with a new state, {name}", median_ms(given.calls, lambda: None, anew, wait)


if __name__ == "__main__":
    run_script(main)
