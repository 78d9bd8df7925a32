"""Measures servers under load over HTTP: requests arrive at random, and count if they are answered in time.

    python scripts/bench_serving.py --device-model llama-3.1-8b [--server vllm] [--rates 1 2 4 8] [--workloads rag]

The server is this package's, or vLLM's with prefix caching (--server vllm), or what a command starts, in which {model}
is a directory with a `config.json`, {port} the port and {length} the tokens of the longest request. Weights are random
and there is no tokenizer: prompts and answers are token ids. All servers get the same prompts at the same times.

Three workloads, each of sessions of some turns that are interleaved at random:

    chat     [system | question 1 | answer 1 | ... | question n]
    rag      [system | documents of this turn, in some order | questions and answers so far | question n]
    agents   [an agent's own system text | what all agents said so far, in an order of its own | ask], by turns

Answers in prompts are scripted, so that prompts do not depend on a server. Requests are sent when they are due,
whatever became of those before (an open loop, Poisson). A request is good if its first token came within --ttft-limit
and its tokens came within --itl-limit each, on average. Goodput is the rate of good ones, from the first that was due
until the last token. Writes `load-<model>-<device>.json` to `scripts/results`, after each pass; rows of other servers
are kept.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench_serving import PERCENTILES, Timeline
from bench_vllm import write_model

from sparsex_jax import Engine
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.serve import compile_all
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import named_config
from sparsex_jax.device.compilation import keep_on_disk
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.results import provenance, rows_of_file, write_json
from sparsex_jax.scheduler.sequence import Event
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.sockets import bound, free_port
from sparsex_jax.serving.worker import Worker

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "model"  # in requests
OURS, VLLM = "sparsex", "vllm"
COMMANDS = {
    OURS: f"{shlex.quote(sys.executable)} {shlex.quote(__file__)} --serve --port {{port}}",
    VLLM: f"{shlex.quote(sys.executable)} -m vllm.entrypoints.cli.main serve {{model}} --load-format dummy "
    "--skip-tokenizer-init --enable-prefix-caching --dtype bfloat16 --max-model-len {length} --port {port} "
    f"--served-model-name {NAME}",
}
WARM_UP = 8  # requests before the first pass


# Workloads ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the parts of prompts, and how many parts there are."""

    system: int = 256
    question: int = 192
    answer: int = 64
    document: int = 512
    documents: int = 12  # of a turn
    library: int = 48  # that they are chosen from
    agents: int = 8
    said: int = 1024  # by an agent in a turn


class Texts:
    """Random token ids."""

    def __init__(self, vocabulary: int, seed: Sequence[int]) -> None:
        self.rng, self._vocabulary = np.random.default_rng(seed), vocabulary

    def one(self, length: int) -> np.ndarray:
        return self.rng.integers(1, self._vocabulary, length).astype(np.int32)

    def some(self, number: int, length: int) -> list[np.ndarray]:
        return [self.one(length) for _ in range(number)]


def chat(texts: Texts, turns: int, lengths: Lengths) -> Iterator[list[np.ndarray]]:
    """The parts of each prompt of a session."""
    history = [texts.one(lengths.system)]
    for _ in range(turns):
        history.append(texts.one(lengths.question))
        yield history
        history.append(texts.one(lengths.answer))


def rag(texts: Texts, turns: int, lengths: Lengths, library: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    system, history = texts.one(lengths.system), list[np.ndarray]()
    for _ in range(turns):
        found = [library[i] for i in texts.rng.permutation(len(library))[: lengths.documents]]
        history.append(texts.one(lengths.question))
        yield [system, *found, *history]
        history.append(texts.one(lengths.answer))


def agents(texts: Texts, turns: int, lengths: Lengths) -> Iterator[list[np.ndarray]]:
    systems, ask = texts.some(lengths.agents, lengths.system), texts.one(lengths.question)
    said = texts.some(1, lengths.said)  # the task
    for turn in range(turns):
        order = texts.rng.permutation(len(said))
        yield [systems[turn % lengths.agents], *(said[i] for i in order), ask]
        said.append(texts.one(lengths.said))


def sessions(name: str, texts: Texts, turns: int, lengths: Lengths) -> Iterator[Iterator[list[np.ndarray]]]:
    """Sessions of a workload, without end."""
    library = texts.some(lengths.library, lengths.document) if name == "rag" else []
    make: dict[str, Callable[[], Iterator[list[np.ndarray]]]] = {
        "chat": lambda: chat(texts, turns, lengths),
        "rag": lambda: rag(texts, turns, lengths, library),
        "agents": lambda: agents(texts, turns, lengths),
    }
    while True:
        yield make[name]()


WORKLOADS = ("chat", "rag", "agents")


def make_prompts(name: str, number: int, vocabulary: int, seed: Sequence[int], turns: int, lengths: Lengths) -> list:
    """As many prompts, in the order in which they arrive: lists of token ids. The same seed makes the same."""
    texts = Texts(vocabulary, [*seed, *name.encode()])
    held = list(itertools.islice(sessions(name, texts, turns, lengths), -(-number // turns)))
    order = texts.rng.permutation(np.repeat(np.arange(len(held)), turns)).tolist()
    return [np.concatenate(next(held[each])).tolist() for each in order][:number]


def longest(turns: int, lengths: Lengths) -> int:
    """Tokens of the longest prompt of any workload."""
    talk = lengths.system + turns * (lengths.question + lengths.answer)
    return max(talk + lengths.documents * lengths.document, talk + turns * lengths.said)


# Servers -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: str, url: str, patience_s: float) -> Iterator[float]:
    """A server while it runs: the seconds until it answered. All its processes are ended with it.

    Raises:
      RuntimeError: it ended, or does not answer in time.
    """
    began = time.perf_counter()
    process = subprocess.Popen(shlex.split(command), start_new_session=True, stdout=sys.stderr)
    try:
        while not answers(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}: {command}")
            if time.perf_counter() - began > patience_s:
                raise RuntimeError(f"the server did not answer within {patience_s:g} s: {command}")
            time.sleep(0.2)
        yield time.perf_counter() - began
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


def serve(options: argparse.Namespace) -> None:
    """This package's server, with random weights and without a tokenizer, until SIGTERM."""
    keep_on_disk()
    shapes = dataclasses.replace(named_config(options.device_model), max_position=options.length)
    about = {"dtype": options.dtype, "store_tokens": options.store_tokens, "max_num_seqs": options.max_num_seqs}
    engine = Engine.from_config(shapes, **about, max_waiting=4096)
    engine.reuse = parse_method(options.method)
    compile_all(engine)
    limits = Limits(max_body_bytes=1 << 24)
    with bound("127.0.0.1", options.port) as sockets:
        Server(create_app(Worker(engine), model=NAME, limits=limits), sockets=sockets).run()
    engine.close()


# Load --------------------------------------------------------------------------------------------------------


async def play(url: str, prompts: Sequence[list[int]], due: np.ndarray, new_tokens: int) -> list[Timeline]:
    """Send each prompt when it is due, in seconds from now, and wait for all answers."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
        timelines = [Timeline(at) for at in (time.perf_counter() + due).tolist()]
        pairs = zip(prompts, timelines, strict=True)
        await asyncio.gather(*(ask(client, prompt, timeline, new_tokens) for prompt, timeline in pairs))
        return timelines


async def ask(client: httpx.AsyncClient, prompt: list[int], timeline: Timeline, new_tokens: int) -> None:
    """Ask when it is due, and note when tokens came. An answer that fails has an error, and is not good."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0.0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    content = json.dumps(body)  # before it is due, since this takes time too
    await asyncio.sleep(max(timeline.due - time.perf_counter(), 0))
    try:
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", "/v1/completions", content=content, headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                note(line, timeline)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        timeline.error = error


def note(line: str, timeline: Timeline) -> None:
    """One line of a stream of events."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return
    for choice in json.loads(data)["choices"]:
        timeline(Event(choice["text"], tuple(choice.get("token_ids") or ())))


def figures(
    timelines: Sequence[Timeline], new_tokens: int, limits: tuple[float, float]
) -> dict[str, tuple[float, str]]:
    """The figures of a pass and their units, by name.

    Args:
      limits: of the time to the first token and between tokens, in seconds.

    Raises:
      RuntimeError: no request was answered whole.
    """
    whole = [one for one in timelines if one.error is None and sum(new for _, new in one.came) == new_tokens]
    if not whole:
        raise RuntimeError(f"no request was answered whole; the first one: {timelines[0].error or timelines[0].came}")
    seconds = max(one.came[-1][0] for one in whole) - min(one.due for one in timelines)
    good = sum(one.is_within(*limits) for one in whole)
    ttft = np.percentile([one.ttft for one in whole], PERCENTILES)
    gaps = np.percentile([sum(one.gaps) / max(len(one.gaps), 1) for one in whole], PERCENTILES)
    return {
        "goodput": (good / seconds, "requests/s"),
        "good": (good / len(timelines), "of requests"),
        "failed": (float(len(timelines) - len(whole)), "requests"),
        **{f"TTFT p{p}": (float(value), "s") for p, value in zip(PERCENTILES, ttft, strict=True)},
        **{f"between tokens p{p}": (1e3 * float(value), "ms") for p, value in zip(PERCENTILES, gaps, strict=True)},
    }


def passes(url: str, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, tuple[float, str]]]]:
    """The figures of each workload and rate. No two passes share tokens."""
    vocabulary, limits = named_config(options.device_model).vocab_size, (options.ttft_limit, options.itl_limit)
    for name in options.workloads:
        warm = make_prompts(name, WARM_UP, vocabulary, (options.seed,), options.turns, options.lengths)
        asyncio.run(play(url, warm, np.zeros(WARM_UP), options.new_tokens))
        for rate in options.rates:
            number = max(round(rate * options.seconds), options.turns)
            seed = options.seed, round(1e3 * rate)
            prompts = make_prompts(name, number, vocabulary, seed, options.turns, options.lengths)
            due = np.random.default_rng(seed).exponential(1 / rate, number).cumsum()
            timelines = asyncio.run(play(url, prompts, due, options.new_tokens))
            yield f"{name}, {rate:g} requests a second", figures(timelines, options.new_tokens, limits)


# The run -----------------------------------------------------------------------------------------------------


def device() -> str:
    """The GPU's name, asked without JAX, which would take its memory from the server; `cpu` if there is none."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "cpu"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-model", default="llama-3.1-8b", help="a named configuration, whose weights are random")
    add("--server", default=OURS, help=f"{OURS}, {VLLM}, or a command with {{model}}, {{port}} and {{length}}")
    add("--name", help="of the server in the rows; by default as --server")
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--rates", type=positive, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="requests a second")
    add("--seconds", type=positive, default=30.0, help="for which requests arrive, at each rate")
    add("--turns", type=count, default=15, help="of a session")
    add("--new-tokens", type=count, default=64)
    add("--ttft-limit", type=positive, default=1.0, help="seconds to the first token, for goodput")
    add("--itl-limit", type=positive, default=0.05, help="seconds between tokens, for goodput")
    add("--scale", type=positive, default=1.0, help="of all lengths of texts")
    add("--patience", type=positive, default=400.0, help="seconds that a server may take to start")
    add("--seed", type=int, default=0)
    ours = parser.add_argument_group("this package's server")
    ours.add_argument("--method", default="sparsex:boundary_layer=0:recompute_ratio=0.05", help="NAME:FIELD=VALUE:...")
    ours.add_argument("--dtype", default="bfloat16")
    ours.add_argument("--store-tokens", type=count, default=262144)
    ours.add_argument("--max-num-seqs", type=count, default=64)
    ours.add_argument("--serve", action="store_true", help="only serve, at --port")
    ours.add_argument("--port", type=int, default=0)
    ours.add_argument("--length", type=count, help="tokens of the longest request; by default of these workloads")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: one token has no time to the next")
    plain = Lengths()
    names = ("system", "question", "answer", "document", "said")
    scaled = {name: max(round(getattr(plain, name) * options.scale), 8) for name in names}
    options.lengths = dataclasses.replace(plain, **scaled)
    options.length = options.length or longest(options.turns, options.lengths) + options.new_tokens + 1
    parse_method(options.method)
    return options


def command_of(options: argparse.Namespace, folder: Path, port: int) -> str:
    command = COMMANDS.get(options.server, options.server)
    filled = command.format(model=write_model(options.device_model, folder), port=port, length=options.length)
    if options.server != OURS:
        return filled
    told = ("device_model", "method", "dtype", "store_tokens", "max_num_seqs", "length")
    return " ".join(
        [filled, *(f"--{name.replace('_', '-')} {shlex.quote(str(getattr(options, name)))}" for name in told)]
    )


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    options = parse(arguments)
    if options.serve:
        serve(options)
        return
    name, port = options.name or options.server, free_port()
    about: dict[str, Any] = {"bench": "load", "model": options.device_model} | provenance(kind=device())
    kept = [row for row in rows_of_file(about, folder) if row["implementation"] != name]
    told = ("seconds", "turns", "new_tokens", "ttft_limit", "itl_limit", "scale", "seed", "method", "max_num_seqs")
    content = about | {"settings": {key: getattr(options, key) for key in told}}

    def row(work: str, figure: float, unit: str) -> dict[str, Any]:
        return {"work": work, "implementation": name, "figure": float(f"{figure:.5g}"), "unit": unit}

    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryDirectory() as model,
        running(command_of(options, Path(model), port), url, options.patience) as started,
    ):
        rows = [row("start", started, "s")]
        print(f"{name} answers after {started:.1f} s", flush=True)
        for work, found in passes(url, options):
            told_now = ", ".join(f"{what} {figure:.3g} {unit}" for what, (figure, unit) in found.items())
            print(f"{name}, {work}: {told_now}", flush=True)
            rows += [row(f"{work}: {what}", *each) for what, each in found.items()]
            write_json(content | {"rows": kept + rows}, folder)


if __name__ == "__main__":
    run_script(main)
