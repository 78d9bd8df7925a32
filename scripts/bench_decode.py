"""Measures a decode step on the devices alone: no prefill, no serving loop, and few programs to compile.

    python scripts/bench_decode.py [--model llama-3.1-8b] [--cases 1x8192 32x8192] [--adapters 8] [--tensor-parallel 2]

A case is REQUESTS x CONTEXT. The weights are random and the store is empty, so what comes out means nothing, but reads
what it would read. Requests get 16 tokens in a dispatch. Told is the median of the steps of --runs dispatches, beside
the time that its bytes take at the bandwidth of a copy (`bound`).

--adapters N: the engine has N adapters of rank 16 on all matrices. Each case is measured with requests that use them in
turn, and with requests of the base model beside them.

--profile: prints the kernels of the first case, those that take most of a step first.

Writes `decode-<model>-<device>.json`.
"""

import argparse
import collections
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from bench_adapters import ALL_TARGETS, RANK, random_adapter
from bench_e2e import copy_rate, decode_bytes

from sparsex_jax import Engine, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.state import BatchSlot, state_in
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.reuse.adapters import NO_SLOT

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 16  # of a dispatch
BESIDE = 512  # tokens that a request may get


class Case(NamedTuple):
    """Requests that decode together, and the tokens that each has before."""

    requests: int
    context: int

    @classmethod
    def of(cls, text: str) -> "Case":
        requests, times, context = text.partition("x")
        if not times or not requests.isdigit() or not context.isdigit() or "0" in (requests, context):
            raise argparse.ArgumentTypeError(f"{text!r} must be REQUESTSxCONTEXT, such as 32x8192")
        return cls(int(requests), int(context))

    def __str__(self) -> str:
        return f"decode, {self.requests} x {self.context}"


def load(options: argparse.Namespace) -> Engine:
    """An engine whose store holds the largest case."""
    room = max(case.requests * (case.context + BESIDE + 64) for case in options.cases)
    about = {"store_tokens": room, "max_num_seqs": max(case.requests for case in options.cases)}
    about |= {"max_context": max(case.context for case in options.cases) + BESIDE, "decode_steps": STEPS}
    adapters = {"max_adapters": options.adapters, "max_adapter_rank": RANK} if options.adapters else {}
    about |= {"dtype": options.dtype, "choose": "always", "tensor_parallel": options.tensor_parallel}
    engine = make_engine(options.model, **about, **adapters)
    weights = random_adapter(engine.model, 0, ALL_TARGETS) if options.adapters else None
    for number in range(options.adapters):
        engine.load_adapter(f"adapter {number}", weights)
    return engine


def state_of(engine: Engine, case: Case, adapters: int) -> DecodeState:
    """Requests at the case's context, each with pages of its own; of the first adapters in turn, if there are any."""
    each, rng = -(-(case.context + BESIDE) // engine.config.page_size), np.random.default_rng(0)
    slots = [
        BatchSlot(
            prompt=rng.integers(1, engine.model.vocab_size, case.context),
            answer=[1],
            sampling=SamplingParams(BESIDE, temperature=0.0, ignore_eos=True),
            end_tokens=(-1,),
            pages=range(1 + number * each, 1 + (number + 1) * each),
            adapter=number % adapters if adapters else NO_SLOT,
        )
        for number in range(case.requests)
    ]
    return state_in(slots, engine.runner.shapes, engine.model.vocab_size)


def dispatch(engine: Engine, state: DecodeState) -> DecodeState:
    """One dispatch, to its end."""
    state, sampled = engine.runner.start_decode(state, STEPS)
    jax.block_until_ready(sampled.token)
    return state


def step_milliseconds(engine: Engine, state: DecodeState, runs: int) -> float:
    """The median over `runs` dispatches; two before them compile and warm up."""
    state, taken = dispatch(engine, dispatch(engine, state)), []
    for _ in range(runs):
        begin = time.perf_counter()
        state = dispatch(engine, state)
        taken.append(1e3 * (time.perf_counter() - begin) / STEPS)
    return float(np.median(taken))


def kernel_times(run: Callable[[], Any]) -> dict[str, list[float]]:
    """The microseconds of each launch on the first GPU while something runs, by the kernel's name; none on others."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = [*Path(folder).rglob("*.xplane.pb")]
        profiles = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
        planes = [plane for profile in profiles for plane in profile.planes if "GPU:0" in plane.name]
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for line in (line for plane in planes for line in plane.lines if line.name.startswith("Stream")):
        for event in line.events:
            taken[event.name].append(event.duration_ns / 1e3)
    return taken


def print_profile(engine: Engine, state: DecodeState) -> None:
    """The kernels of one dispatch on the first GPU: time of a step, launches of a step, time of a launch."""
    dispatch(engine, state)
    for name, times in sorted(kernel_times(lambda: dispatch(engine, state)).items(), key=lambda item: -sum(item[1])):
        print(
            f"{sum(times) / STEPS:10.1f} us a step {len(times) / STEPS:8.1f} launches {np.mean(times):8.2f} us  {name}"
        )


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    engine, rate = load(options), copy_rate()
    for case in options.cases:
        kinds = {"base model": 0} | ({f"{options.adapters} adapters": options.adapters} if options.adapters else {})
        for kind, adapters in kinds.items():
            step = step_milliseconds(engine, state_of(engine, case, adapters), options.runs)
            tokens = case.requests * case.context
            bound = 1e3 * decode_bytes(engine, tokens) / rate / options.tensor_parallel
            print(f"{case}, {kind}: {step:.3f} ms a step, its bytes take {bound:.3f}")
            yield {"work": str(case), "implementation": kind, "figure": step, "unit": "ms a step", "bound": bound}
    if options.profile:
        print_profile(engine, state_of(engine, options.cases[0], options.adapters))


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct" if small else "llama-3.1-8b")
    add("--dtype", default="float32" if small else "bfloat16")
    cases = ["1x256"] if small else ["1x8192", "32x8192"]
    add("--cases", nargs="+", type=Case.of, default=[*map(Case.of, cases)], metavar="REQUESTSxCONTEXT")
    add("--adapters", type=int, default=0, help="how many adapters the engine has")
    add_tensor_parallel(parser)
    add("--runs", type=count, default=8, help="dispatches that are timed")
    add("--profile", action="store_true")
    options = parser.parse_args(arguments)
    settings = {"adapters": options.adapters, "tensor_parallel": options.tensor_parallel, "runs": options.runs}
    about = {"bench": "decode", "model": options.model} | provenance(options.tensor_parallel) | {"settings": settings}
    print(write_rows(about, measure(options), folder))


if __name__ == "__main__":
    run_script(main)
