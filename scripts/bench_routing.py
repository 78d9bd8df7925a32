"""Compares ways to route requests to replicas: engines on Ray Serve behind one endpoint, asked over HTTP.

    uv sync --extra ray
    uv run python scripts/bench_routing.py [--model ruler-tiny] [--replicas 2] [--policies round-robin segments]

Two workloads of `sparsex_jax.eval.workloads`, each several times over with other texts: `rag`, where the same documents
come back in other combinations and orders, and `agents`, who store what they wrote and then read each other's words.
Each copy is a client of its own, which asks one thing after the other; all of them ask at the same time. All texts
together are more than one replica stores. Each policy gets the same requests. A few requests under another salt come
first, so that little is compiled while times are taken.

With `--fetching off on`, each policy is measured twice: the second time replicas get blocks that they lack from each
other. Both times they have the same host memory (`--host-store`).

A prompt's hit rate is the share of its tokens that its replica found, as its report says. Writes
`routing-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import itertools
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx
import numpy as np

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.names import model_title
from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.cli.values import parse_bytes
from sparsex_jax.config import EngineConfig
from sparsex_jax.config.checks import require
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.results import provenance, require_writable, write_json
from sparsex_jax.eval.workloads import WorkloadSize, make_workload
from sparsex_jax.routing import POLICIES, Policy, SegmentPolicy, Sketch
from sparsex_jax.serving.fleet.peers import PeerConfig

RESULTS = Path(__file__).resolve().parent / "results"
FOUND = ("prefix_tokens", "approximate_prefix_tokens", "reused_tokens", "recomputed_tokens")
# Always reused, so that figures do not depend on how fast this machine computes.
REUSE = {"method": "sparsex", "only_if_faster": False}
WARM_UP = 5  # requests of each client that come first


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of a request.

    Attributes:
      replica: who answered.
      report: the response's `sparsex`.
      ttft_s: seconds to the first token's event.
    """

    replica: str
    report: Mapping[str, Any]
    ttft_s: float

    @property
    def found(self) -> int:
        return sum(self.report[name] for name in FOUND)

    @property
    def fetched(self) -> int:
        """Tokens of parts that came from another replica, wholly or in part."""
        prefix = self.report["prefix_tokens"] if self.report.get("prefix_tier") == "peer" else 0
        segments = self.report.get("segments", ())
        return prefix + sum(each["length"] for each in segments if each["tier"] == "peer")


# Workloads --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A request of a client.

    Attributes:
      is_measured: it counts; else it stores what later ones read.
    """

    prompt: np.ndarray
    is_measured: bool


def steps_of(name: str, tokenizer: Any, vocab_size: int, size: WorkloadSize, seed: int) -> list[Step]:
    """What one client asks. Documents come with the questions; agents store their words before any of them is read."""
    made = make_workload(name, tokenizer, size, seed).within(vocab_size)
    stored = [] if name == "rag" else made.stored
    rounds = itertools.zip_longest(*(itertools.batched(texts, size.pieces) for texts in (stored, made.prompts)))
    return [
        Step(prompt, bool(is_measured))
        for both in rounds
        for is_measured, texts in enumerate(both)
        for prompt in texts or ()
    ]


# Clients ----------------------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, prompt: np.ndarray, salt: str, max_tokens: int) -> Answered:
    body = {"prompt": prompt.tolist(), "max_tokens": max_tokens, "cache_salt": salt, "stream": True, "temperature": 0}
    body |= {"reuse": REUSE, "ignore_eos": True}
    began, first, report = time.perf_counter(), None, {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                report = json.loads(line.removeprefix("data: ")).get("sparsex") or report
        return Answered(response.headers["x-sparsex-replica"], report, (first or time.perf_counter()) - began)


async def converse(client: httpx.AsyncClient, steps: Sequence[Step], salt: str, new_tokens: int) -> list[Answered]:
    """The answers that count of one client's requests."""
    answers = [(step, await ask(client, step.prompt, salt, new_tokens * step.is_measured)) for step in steps]
    return [answer for step, answer in answers if step.is_measured]


async def asked(
    url: str, clients: Sequence[Sequence[Step]], name: str, new_tokens: int
) -> tuple[list[Answered], float]:
    """The answers to all clients, and the seconds that they took."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def all_of_them(salt: str, most: int | None) -> list[Answered]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(converse(client, steps[:most], salt, new_tokens)) for steps in clients]
            return [answer for task in tasks for answer in task.result()]

        await all_of_them(f"{name}, warm-up", WARM_UP)
        began = time.perf_counter()
        return await all_of_them(f"{name}, measured", None), time.perf_counter() - began


# Figures ----------------------------------------------------------------------------------------------------


def figures(answers: Sequence[Answered], seconds: float) -> dict[str, tuple[float, str]]:
    prompt_tokens = sum(answer.report["prompt_tokens"] for answer in answers)
    computed = sum(answer.report["computed_fraction"] * answer.report["prompt_tokens"] for answer in answers)
    ttft = np.array([answer.ttft_s for answer in answers])
    by_replica = Counter(answer.replica for answer in answers)
    return {
        "hit rate": (sum(answer.found for answer in answers) / prompt_tokens, "share of prompt tokens"),
        "from others": (sum(answer.fetched for answer in answers) / prompt_tokens, "share of prompt tokens"),
        "computed": (computed / prompt_tokens, "share of token-layers"),
        "largest share of a replica": (max(by_replica.values()) / len(answers), "share of requests"),
        "TTFT p50": (float(np.percentile(ttft, 50)), "s"),
        "TTFT p95": (float(np.percentile(ttft, 95)), "s"),
        "throughput": (len(answers) / seconds, "requests/s"),
    }


def rows_of(name: str, policy: str, measured: Mapping[str, tuple[float, str]], samples: int) -> list[dict[str, Any]]:
    return [
        {
            "work": f"{name}: {what}",
            "implementation": policy,
            "figure": float(f"{figure:.4g}"),
            "unit": unit,
            "samples": samples,
        }
        for what, (figure, unit) in measured.items()
    ]


class Case(NamedTuple):
    """What is compared."""

    name: str
    policy: Policy
    peers: PeerConfig | None


def cases(args: argparse.Namespace) -> list[Case]:
    made: dict[str, Policy] = {}
    for policy in args.policies:
        if policy == "segments" and args.work_weights:
            made |= {f"segments, weight {weight:g}": SegmentPolicy(work_weight=weight) for weight in args.work_weights}
        else:
            made[policy] = POLICIES[policy]()
    peers = {"off": ("", None), "on": (", fetching", PeerConfig(most_s=args.fetch_seconds))}
    both = itertools.product(made.items(), (peers[each] for each in args.fetching))
    return [Case(name + suffix, policy, config) for (name, policy), (suffix, config) in both]


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all policies. Ray is started, and stopped in the end."""
    require(importlib.util.find_spec("ray") is not None, "replicas need Ray, which comes with the extra `ray`")
    import ray
    from ray import serve

    from sparsex_jax.serving.fleet.on_ray import FleetConfig, ScaleConfig, application, connect

    checkpoint = open_checkpoint(args.model)
    size = WorkloadSize(args.requests, args.length, args.pieces)
    about = (checkpoint.tokenizer, checkpoint.config.vocab_size, size)
    workloads = {name: [steps_of(name, *about, seed) for seed in range(args.clients)] for name in args.workloads}
    host = parse_bytes("host_store", args.host_store)
    require("on" not in args.fetching or host > 0, "fetching=on needs host_store above 0")
    config = EngineConfig(store_tokens=args.store_tokens, healing=0.0, host_store_bytes=host)
    choice = EngineChoice(args.model, config)
    scale = ScaleConfig(args.replicas, args.replicas, num_cpus=1.0, num_gpus=args.gpus_per_replica)
    rows: list[dict[str, Any]] = []
    connect(log_to_driver=args.verbose, num_cpus=max(args.replicas + 1, os.cpu_count() or 1))
    try:
        serve.start(http_options={"port": args.port})
        for case in cases(args):
            fleet = FleetConfig(
                args.model,
                model_title(args.model),
                choice.load,
                Sketch(secrets.token_bytes(32), args.sample),
                policy=case.policy,
                peers=case.peers,
            )
            serve.run(application(fleet, scale), name="sparsex")
            for name, clients in workloads.items():
                url = f"http://127.0.0.1:{args.port}"
                done = asyncio.run(asked(url, clients, f"{case.name}, {name}", args.new_tokens))
                measured = figures(*done)
                rows += rows_of(name, case.name, measured, len(done[0]))
                said = ", ".join(f"{what} {figure:.3g}" for what, (figure, _) in measured.items())
                print(f"{name}, {case.name}: {said}", flush=True)
            serve.delete("sparsex")
    finally:
        serve.shutdown()
        ray.shutdown()
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="ruler-tiny")
    add("--replicas", type=count, default=2)
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    add("--workloads", nargs="+", choices=("rag", "agents"), default=["rag", "agents"])
    add("--clients", type=count, default=6, help="each with texts of its own")
    add("--requests", type=count, default=12, help="prompts of each client that count")
    add("--length", type=count, default=768, help="tokens of a prompt, about")
    add("--pieces", type=count, default=4, help="documents in a prompt, or agents")
    add("--store-tokens", type=count, default=8192, help="of each replica")
    add("--host-store", default="0", help="host memory below each store, as `sparsex serve --host-store`")
    add("--fetching", nargs="+", choices=("off", "on"), default=["off"], help="`on` needs --host-store")
    add("--fetch-seconds", type=positive, default=2.0, help="a prompt waits for other replicas so long at most")
    add("--work-weights", nargs="+", type=float, default=[], help="of the policy `segments`, each a line")
    add("--new-tokens", type=count, default=8)
    add("--sample", type=count, default=16, help="one of this many windows is in digests")
    add("--gpus-per-replica", type=int, default=0)
    add("--port", type=int, default=8191)
    add("--verbose", action="store_true", help="show the logs of all processes")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    made = {"bench": "routing", "model": model_title(args.model)} | provenance()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "port", "verbose", "model")}
    require_writable(args.out)
    rows = bench(args)
    print(write_json(made | {"settings": settings, "rows": rows}, args.out), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
