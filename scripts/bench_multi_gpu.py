"""Measures a model on 1, 2, 4 and 8 devices of one host: first tokens, decode, and what the all-reduces take of both.

    python scripts/bench_multi_gpu.py [--models llama-3.1-8b llama-3.3-70b] [--devices 1 2 4 8] [--resume] [--vllm]

The weights are random, in bfloat16, and each device makes its own share. For each model and number of devices, a
process of its own measures:

    TTFT, N tokens, 95% reused in 16   full recompute, and SparseX with l*=0 and with l* at a tenth of the layers
    TTFT, N tokens, 95% a prefix       the stored text is the prompt's beginning
    decode, R x N                      a step of R requests behind N tokens each, by `bench_decode.py`

Beside each figure stands the time of its all-reduces on the first GPU, as the profiler tells it. It has what they wait
for other devices, and nothing hides it today, so it is a share of the figure.

--tokens: models whose greedy answers on more devices are compared with those on one, in float32: `tokens equal` is the
share of tokens up to the first that differs. Those that a number of devices does not divide are left out.

--vllm runs `bench_vllm.py` beside each, where vLLM is installed. It writes a file of its own.

The bench leaves out what the devices have no memory for, and says so. The limit is what JAX may take of a device;
XLA_PYTHON_CLIENT_MEM_FRACTION raises it. If a process dies, the bench says which figure it was at, and starts another
process for the rest.

Each row is written as soon as it is there. --resume keeps the rows of the file and measures what it lacks, for machines
that are given for minutes. --only TEXT measures the works that have one of these texts in their names. Writes
`multi-gpu-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_decode import BESIDE, STEPS, Case, dispatch, kernel_times, state_of, step_milliseconds
from bench_e2e import (
    FULL,
    EvictedError,
    make_prompt,
    methods,
    prefix_and_prompt,
    prefix_work,
    remember_all,
    segments_work,
    time_to_first_token,
)

from sparsex_jax import Engine, InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import ModelConfig, named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import make_engine
from sparsex_jax.eval.results import rows_of_file, write_json
from sparsex_jax.model.sharding import check_mesh, make_mesh, on_mesh
from sparsex_jax.model.weights import abstract_params

RESULTS = Path(__file__).resolve().parent / "results"
SEGMENTS, REUSED = 16, 0.95
ANSWER = 64  # tokens that are compared
_BESIDE_BYTES = 6 << 30  # of a device: rows of a chunk, logits, and what the programs hold
_COLLECTIVES = ("nccl", "all-reduce", "all_reduce", "allreduce")
_BEGUN = "its process ended before the figure was there"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      devices: that worked together.
      figure: None: it was not measured, for the reason in `why`.
      all_reduces: milliseconds of the figure, on the first GPU. None: no GPU, or one alone.
    """

    work: str
    implementation: str
    devices: int
    figure: float | None
    unit: str
    all_reduces: float | None = None
    why: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.work, self.implementation, self.devices

    def __str__(self) -> str:
        figure = f"{self.figure:10.2f} {self.unit}" if self.figure is not None else f"not measured: {self.why}"
        beside = f"  all-reduces {self.all_reduces:.2f} ms" if self.all_reduces is not None else ""
        return f"{self.work:40}{self.implementation:22}{self.devices:3} devices{figure}{beside}"


# Memory -------------------------------------------------------------------------------------------------------


def bytes_needed(model: ModelConfig, dtype: str, devices: int, tokens: int) -> int:
    """What each device has to hold: its share of the weights, of the store, and some room."""
    mesh = make_mesh(devices)
    model = on_mesh(model, mesh)
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_params(model, dtype, mesh))
    )
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
    return weights + tokens * token // devices + _BESIDE_BYTES


def device_bytes() -> float:
    """What JAX may take of a device; infinite where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one process measures: a model on some devices.

    Attributes:
      only: texts of which a work's name must have one. None of them: all works.
      done: (work, implementation) of the rows that are there already.
    """

    model: str
    dtype: str
    devices: int
    lengths: Sequence[int]
    decode: Sequence[Case]
    runs: int
    only: Sequence[str] = ()
    done: Set[tuple[str, str]] = frozenset()

    @property
    def config(self) -> ModelConfig:
        return named_config(self.model)

    def fits(self, tokens: int) -> bool:
        return bytes_needed(self.config, self.dtype, self.devices, tokens) <= device_bytes()

    def lacks(self, work: str, implementation: str) -> bool:
        wanted = not self.only or any(text in work for text in self.only)
        return wanted and (work, implementation) not in self.done

    def row(self, work: str, implementation: str, figure: float | None, unit: str, **more: Any) -> Row:
        return Row(work, implementation, self.devices, figure, unit, **more)

    def begun(self, work: str, implementation: str, unit: str) -> Row:
        """What remains of a row if the process dies while it is measured. The figure takes its place."""
        return self.row(work, implementation, None, unit, why=_BEGUN)


def prefill_tokens(length: int) -> int:
    """Tokens of the store for a prompt of this length, its segments, its prefix, and those before it that may be
    evicted."""
    return 3 * length + 8192


def decode_tokens(case: Case) -> int:
    return case.requests * (case.context + BESIDE + 64)


# One model on some devices ------------------------------------------------------------------------------------


def rows_of(asked: Asked) -> Iterator[Row]:
    """Measure what fits, and tell of the rest. One engine has room for all that fits."""
    try:
        check_mesh(make_mesh(asked.devices), asked.config)
    except InvalidRequestError as error:
        yield asked.row("start", "", None, "s", why=str(error))
        return
    lengths = [length for length in asked.lengths if to_measure(asked, length)]
    cases = [case for case in asked.decode if asked.lacks(str(case), "decode")]
    fitting = [length for length in lengths if asked.fits(prefill_tokens(length))]
    fitting_cases = [case for case in cases if asked.fits(decode_tokens(case))]
    works = [segments_work(length, SEGMENTS, REUSED) for length in lengths if length not in fitting]
    works += [str(case) for case in cases if case not in fitting_cases]
    for work in works:
        yield asked.row(work, "", None, "ms", why=f"it does not fit into {device_bytes() / 1e9:.0f} GB a device")
    if fitting or fitting_cases:
        yield from measured(asked, load(asked, fitting, fitting_cases), fitting, fitting_cases)


def to_measure(asked: Asked, length: int) -> dict[tuple[str, str], ReuseConfig]:
    """(work, implementation) of the first tokens of this length that lack, and their methods."""
    reordered, prefix = segments_work(length, SEGMENTS, REUSED), prefix_work(length, REUSED)
    works = {(reordered, name): reuse for name, reuse in compared(asked.config.num_layers).items()}
    works[prefix, "prefix"] = ReuseConfig("prefix")
    return {named: reuse for named, reuse in works.items() if asked.lacks(*named)}


def load(asked: Asked, lengths: Sequence[int], cases: Sequence[Case]) -> Engine:
    room = max([*map(prefill_tokens, lengths), *map(decode_tokens, cases)])
    longest = max([*lengths, *(case.context + BESIDE for case in cases)])
    return make_engine(
        asked.model,
        tensor_parallel=asked.devices,
        dtype=asked.dtype,
        store_tokens=room,
        max_context=longest,
        max_num_seqs=max([1, *(case.requests for case in cases)]),
        decode_steps=STEPS,
        choose="always",  # whatever it costs, so that nothing has to be measured before
    )


def measured(asked: Asked, engine: Engine, lengths: Sequence[int], cases: Sequence[Case]) -> Iterator[Row]:
    for length in lengths:
        yield from first_tokens(asked, engine, length)
    for case in cases:
        yield asked.begun(str(case), "decode", "ms a step")
        yield decode(asked, engine, case)


def first_tokens(asked: Asked, engine: Engine, length: int) -> Iterator[Row]:
    """Of stored segments in another order, and of a stored prefix."""
    wanted = to_measure(asked, length)
    prompts = {work: stored_prompt(engine, length, work) for work in dict.fromkeys(work for work, _ in wanted)}
    for named, reuse in wanted.items():
        yield asked.begun(*named, "ms")
        yield first_token(asked, engine, prompts[named[0]], reuse, named)


def stored_prompt(engine: Engine, length: int, work: str) -> np.ndarray:
    """Store what the work reuses in a namespace of its name, and make its prompt."""
    if work != prefix_work(length, REUSED):
        return make_prompt(engine, length, SEGMENTS, REUSED, work)
    prefix, prompt = prefix_and_prompt(engine.model.vocab_size, length, REUSED, work)
    remember_all(engine, [prefix], work)
    return prompt


def compared(num_layers: int) -> dict[str, ReuseConfig]:
    """Full recompute, and SparseX with the choice at the first layer and behind a tenth of them."""
    names = FULL, "sparsex l*=0, 5 %", f"sparsex l*={round(num_layers / 10)}, 15 %"
    every = methods(num_layers)
    return {name: every[name] for name in names}


def first_token(asked: Asked, engine: Engine, prompt: np.ndarray, reuse: ReuseConfig, named: tuple[str, str]) -> Row:
    work, name = named
    try:
        milliseconds, _ = time_to_first_token(engine, prompt, reuse, work, asked.runs, REUSED)
    except EvictedError as error:
        return asked.row(work, name, None, "ms", why=str(error))
    run = functools.partial(engine.prefill, prompt, reuse=reuse, namespace=work, keep=False)
    return asked.row(work, name, milliseconds, "ms", all_reduces=all_reduce_milliseconds(asked, run))


def decode(asked: Asked, engine: Engine, case: Case) -> Row:
    state = state_of(engine, case, 0)
    step = step_milliseconds(engine, state, asked.runs)
    within = all_reduce_milliseconds(asked, functools.partial(dispatch, engine, state))
    within = None if within is None else within / STEPS
    return asked.row(str(case), "decode", step, "ms a step", all_reduces=within)


def all_reduce_milliseconds(asked: Asked, run: Callable[[], Any]) -> float | None:
    """What the first GPU spends in kernels of collectives while this runs, waiting for other devices included."""
    times = kernel_times(run) if asked.devices > 1 and jax.default_backend() == "gpu" else {}
    if not times:
        return None
    return sum(sum(taken) for name, taken in times.items() if any(each in name.lower() for each in _COLLECTIVES)) / 1e3


# Equal tokens -------------------------------------------------------------------------------------------------


def tokens_work(model: str) -> str:
    return f"tokens equal, {Path(model).name}"


def answers(model: str, devices: int) -> dict[str, tuple[int, ...]]:
    """The greedy tokens of a prompt with stored segments, by method, in float32."""
    engine = make_engine(model, tensor_parallel=devices, dtype="float32", store_tokens=8192, choose="always")
    prompt = make_prompt(engine, 2048, SEGMENTS, REUSED, "tokens")
    sampling = SamplingParams(ANSWER, 0.0, ignore_eos=True)
    ask = functools.partial(engine.generate, prompt, sampling, namespace="tokens", keep=False)
    return {name: ask(reuse=reuse).token_ids for name, reuse in compared(engine.model.num_layers).items()}


def equal_tokens(model: str, devices: Sequence[int]) -> Iterator[Row]:
    """On more devices as on one; of numbers that do not divide the model, the reason."""
    alone = answers(model, 1)
    for number in (each for each in devices if each > 1):
        work = tokens_work(model)
        try:
            there = answers(model, number)
        except InvalidRequestError as error:
            yield Row(work, "", number, None, "share", why=str(error))
            continue
        for name, tokens in there.items():
            equal = np.cumprod([one == other for one, other in zip(tokens, alone[name], strict=True)])
            yield Row(work, name, number, float(equal.mean()), "share")


# Processes ----------------------------------------------------------------------------------------------------


class ChildFailed(Exception):
    """A process ended before it had measured all."""


def in_a_process(*arguments: str) -> Iterator[Row]:
    """The rows that this script prints with these arguments, as they come. Raises ChildFailed behind them."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield Row(**json.loads(line))
        except BaseException:
            process.kill()  # it would go on without us, and hold the devices
            raise
    if process.returncode:
        raise ChildFailed(f"exit code {process.returncode}; its error is above")


def run_child(text: str) -> None:
    """Measure what a JSON text says, and print each row as a line of JSON."""
    told = json.loads(text)
    if "tokens" in told:
        rows = equal_tokens(told["tokens"], told["devices"])
    else:
        cases, done = [*map(Case.of, told.pop("decode"))], {*map(tuple, told.pop("done"))}
        rows = rows_of(Asked(decode=cases, done=done, **told))
    for row in rows:
        print(json.dumps(dataclasses.asdict(row)), flush=True)


class Results:
    """The rows of one model's file, written after each that is added."""

    def __init__(self, model: str, options: argparse.Namespace, folder: Path) -> None:
        settings = {"dtype": options.dtype, "runs": options.runs}
        self._content = {"bench": "multi-gpu", "model": model} | options.origin | {"settings": settings}
        self._folder = folder
        before = rows_of_file(self._content, folder) if options.resume else []
        self._rows = {row.key: row for row in (Row(**each) for each in before) if row.figure is not None}

    def done(self, devices: int) -> list[tuple[str, str]]:
        """(work, implementation) of the rows of this number of devices, measured or failed."""
        return [(work, name) for work, name, number in self._rows if number == devices]

    def add(self, row: Row) -> None:
        if row.why != _BEGUN:
            print(row, flush=True)
        self._rows[row.key] = row
        rows = [dataclasses.asdict(each) for each in self._rows.values()]
        write_json(self._content | {"rows": rows}, self._folder)


def measure(model: str, devices: int, options: argparse.Namespace, results: Results) -> None:
    """Measure one model on this number of devices, and vLLM on them too where --vllm asks for it."""
    told = {"model": model, "dtype": options.dtype, "devices": devices, "runs": options.runs, "only": options.only}
    told |= {"lengths": options.lengths, "decode": [f"{case.requests}x{case.context}" for case in options.decode]}
    collect(results, devices, lambda: told | {"done": results.done(devices)})
    if options.vllm:
        run_vllm(model, devices, options)


def compare_tokens(model: str, results: Results, options: argparse.Namespace) -> None:
    """The tokens of one model on the numbers of devices that lack."""

    def lacking() -> dict[str, Any]:
        numbers = [number for number in options.devices if number > 1 and not results.done(number)]
        return {"tokens": model, "devices": numbers}

    if lacking()["devices"]:
        collect(results, max(options.devices), lacking)


def collect(results: Results, devices: int, lacking: Callable[[], dict[str, Any]]) -> None:
    """Measure what lacks. Where a process dies another goes on with the rest, unless this one added nothing."""
    told = None
    while (now := lacking()) != told:
        told = now
        try:
            for row in in_a_process(json.dumps(told)):
                results.add(row)
        except ChildFailed as error:
            failed = error
        else:
            return
    results.add(Row("the process", "", devices, None, "", why=str(failed)))


def run_vllm(model: str, devices: int, options: argparse.Namespace) -> None:
    """`bench_vllm.py` once for each context to decode behind, the first time with the lengths."""
    contexts = list(dict.fromkeys(case.context for case in options.decode)) or [options.lengths[0]]
    command = [sys.executable, str(Path(__file__).with_name("bench_vllm.py")), "--model", model, "--add", "--no-agents"]
    command += ["--tensor-parallel", str(devices), "--runs", str(options.runs), "--dtype", options.dtype]
    for context in contexts:
        lengths = map(str, options.lengths if context == contexts[0] else [])
        requests = [str(case.requests) for case in options.decode if case.context == context]
        asked = ["--lengths", *lengths, "--context", str(context), "--decode", *requests]
        if subprocess.run([*command, *asked], check=False).returncode:
            print(f"vLLM failed on {devices} devices; its error is above", file=sys.stderr, flush=True)


def origin() -> dict[str, Any]:
    """How the figures are made. A process of its own asks for the device, since who asks holds its memory."""
    code = "import json; from sparsex_jax.eval.results import provenance; print(json.dumps(provenance()))"
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1])
    return found | {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="*", default=["llama-3.1-8b", "llama-3.3-70b"], help="named configurations")
    add("--dtype", default="bfloat16")
    add("--devices", type=count, nargs="+", default=[1, 2, 4, 8])
    add("--lengths", type=count, nargs="*", default=[8192, 16384, 32768, 65536])
    cases = [*map(Case.of, ("1x8192", "32x8192", "64x4096"))]
    add("--decode", type=Case.of, nargs="*", default=cases, metavar="REQUESTSxCONTEXT")
    add("--runs", type=count, default=3)
    add("--tokens", nargs="*", default=["llama-3.2-1b", "configs/ruler-tiny"], help="models whose tokens are compared")
    add("--only", nargs="*", default=[], metavar="TEXT", help="works whose names have one of these; tokens count too")
    add("--resume", action="store_true", help="keep the file's rows, and measure what it lacks")
    add("--vllm", action="store_true", help="run bench_vllm.py beside each")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.vllm and importlib.util.find_spec("vllm") is None:
        parser.error("--vllm: vLLM is not installed")
    return options


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    options = parse(arguments)
    if options.child:
        run_child(options.child)
        return
    options.origin = origin()
    for model in options.models:
        results = Results(model, options, folder)
        for devices in options.devices:
            measure(model, devices, options, results)
    for model in options.tokens:
        if not options.only or any(text in tokens_work(model) for text in options.only):
            compare_tokens(model, Results(Path(model).name, options, folder), options)


if __name__ == "__main__":
    run_script(main)
