"""Compares ways to route requests to replicas: engines on Ray Serve behind one endpoint, asked over HTTP.

    uv sync --extra ray
    uv run python scripts/bench_routing.py [--model ruler-tiny] [--replicas 2] [--policies round-robin segments]

Two workloads of `sparsex_jax.eval.workloads`, each several times over with other texts, mixed at random: `rag`, where
the same documents come back in other combinations and orders, and `agents`, who read each other's words. All texts
together are more than one replica stores. Each policy gets the same requests in the same order, from clients that each
wait for an answer before they ask again. Some requests under another salt come before, so that little is compiled while
times are taken.

A prompt's hit rate is the share of its tokens that its replica found, as its report says. Writes
`routing-<model>-<device>.json` to `scripts/results`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx
import numpy as np

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.names import model_title
from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.eval.workloads import Workload, WorkloadSize, make_workload
from sparsex_jax.routing import LeastLoaded, Policy, RoundRobin, SegmentPolicy, Sketch

RESULTS = Path(__file__).resolve().parent / "results"
POLICIES: dict[str, Policy] = {"round-robin": RoundRobin(), "least-loaded": LeastLoaded(), "segments": SegmentPolicy()}
FOUND = ("prefix_tokens", "approximate_prefix_tokens", "reused_tokens", "recomputed_tokens")
# Always reused, so that figures do not depend on how fast this machine computes.
REUSE = {"method": "sparsex", "only_if_faster": False}
WARM_UP = 16  # stored texts and prompts that come first, of each


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


# Workloads --------------------------------------------------------------------------------------------------


def mixed(name: str, tokenizer: Any, vocab_size: int, size: WorkloadSize, copies: int) -> Workload:
    """Several workloads of other texts, whose prompts come in random order."""
    all_of_them = [make_workload(name, tokenizer, size, seed).within(vocab_size) for seed in range(copies)]
    rng = np.random.default_rng(copies)
    stored = [text for each in all_of_them for text in each.stored]
    prompts = [prompt for each in all_of_them for prompt in each.prompts]
    return Workload(
        [stored[i] for i in rng.permutation(len(stored))], [prompts[i] for i in rng.permutation(len(prompts))]
    )


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


async def in_turn(
    client: httpx.AsyncClient, prompts: Sequence[np.ndarray], clients: int, **about: Any
) -> list[Answered]:
    """All prompts, by so many clients at a time."""
    places, answers = asyncio.Semaphore(clients), []

    async def one(prompt: np.ndarray) -> Answered:
        async with places:
            return await ask(client, prompt, **about)

    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(one(prompt)) for prompt in prompts]
    return [answer.result() for answer in answers]


async def asked(url: str, workload: Workload, name: str, args: argparse.Namespace) -> tuple[list[Answered], float]:
    """The answers to the prompts, and the seconds that they took."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        first = (*workload.stored[:WARM_UP], *workload.prompts[:WARM_UP])
        await in_turn(client, first, args.clients, salt=f"{name}, warm-up", max_tokens=args.new_tokens)
        salt = f"{name}, measured"
        await in_turn(client, workload.stored, args.clients, salt=salt, max_tokens=0)
        began = time.perf_counter()
        answers = await in_turn(client, workload.prompts, args.clients, salt=salt, max_tokens=args.new_tokens)
        return answers, time.perf_counter() - began


# Figures ----------------------------------------------------------------------------------------------------


def figures(answers: Sequence[Answered], seconds: float) -> dict[str, tuple[float, str]]:
    prompt_tokens = sum(answer.report["prompt_tokens"] for answer in answers)
    computed = sum(answer.report["computed_fraction"] * answer.report["prompt_tokens"] for answer in answers)
    ttft = np.array([answer.ttft_s for answer in answers])
    by_replica = Counter(answer.replica for answer in answers)
    return {
        "hit rate": (sum(answer.found for answer in answers) / prompt_tokens, "share of prompt tokens"),
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


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all policies. Ray is started, and stopped in the end."""
    import ray
    from ray import serve

    from sparsex_jax.serving.fleet.on_ray import FleetConfig, ScaleConfig, application, connect

    checkpoint = open_checkpoint(args.model)
    size = WorkloadSize(args.requests, args.length, args.pieces)
    workloads = {
        name: mixed(name, checkpoint.tokenizer, checkpoint.config.vocab_size, size, args.copies)
        for name in args.workloads
    }
    choice = EngineChoice(args.model, "auto", args.store_tokens, healing=0.0)
    scale = ScaleConfig(args.replicas, args.replicas, num_cpus=1.0, num_gpus=args.gpus_per_replica)
    rows: list[dict[str, Any]] = []
    connect(log_to_driver=args.verbose, num_cpus=max(args.replicas + 1, os.cpu_count() or 1))
    try:
        serve.start(http_options={"port": args.port})
        for policy in args.policies:
            fleet = FleetConfig(
                args.model,
                model_title(args.model),
                choice.load,
                Sketch(secrets.token_bytes(32), args.sample),
                policy=POLICIES[policy],
            )
            serve.run(application(fleet, scale), name="sparsex")
            for name, workload in workloads.items():
                done = asyncio.run(asked(f"http://127.0.0.1:{args.port}", workload, f"{policy}, {name}", args))
                measured = figures(*done)
                rows += rows_of(name, policy, measured, len(workload.prompts))
                said = ", ".join(f"{what} {figure:.3g}" for what, (figure, _) in measured.items())
                print(f"{name}, {policy}: {said}", flush=True)
            serve.delete("sparsex")
    finally:
        serve.shutdown()
        ray.shutdown()
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="ruler-tiny")
    add("--replicas", type=int, default=2)
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    add("--workloads", nargs="+", choices=("rag", "agents"), default=["rag", "agents"])
    add("--copies", type=int, default=6, help="workloads that are mixed")
    add("--requests", type=int, default=16, help="prompts of each copy")
    add("--length", type=int, default=768, help="tokens of a prompt, about")
    add("--pieces", type=int, default=4, help="documents in a prompt, or agents")
    add("--store-tokens", type=int, default=8192, help="of each replica")
    add("--clients", type=int, default=4)
    add("--new-tokens", type=int, default=8)
    add("--sample", type=int, default=16, help="digests have one window in so many")
    add("--gpus-per-replica", type=int, default=0)
    add("--port", type=int, default=8191)
    add("--verbose", action="store_true", help="show the logs of all processes")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    made = {"bench": "routing", "model": model_title(args.model)} | provenance()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "port", "verbose", "model")}
    rows = bench(args)
    print(write_json(made | {"settings": settings, "rows": rows}, args.out), file=sys.stderr)


if __name__ == "__main__":
    main()
