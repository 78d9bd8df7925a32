"""Measures agents with a LoRA adapter each who read one trajectory: what each way to share its KV costs and saves.

    python scripts/bench_adapters.py [--model llama-3.1-8b] [--context 8192] [--ways isolated pre_lr]
    python scripts/bench_adapters.py --roles 24

The trace is that of LRAgent and PReCache: 17 steps of three agents who take turns, each with its new tokens behind all
that was said before, and an answer. Four of them bring --context tokens, so that all together are
4 * context + 912.
Adapters are random ones of rank 16 on queries and values, and weights of a named configuration are random, since the
figures depend on shapes alone. The ways:

    base       no adapters: what sharing could save at most
    isolated   an agent finds what it computed itself
    pre_lr, refresh, rebase, base_shared    as `Engine.generate(sharing=)`; a refresh recomputes as --refresh says

Told are the sum of the times to the first token, the time of all steps, and what was computed of the token-layers of
all prompts. `rebase` runs neutral prefills between two steps: their time is a row of its own. The first pass of each
way that compiles nothing is told.

--roles N: instead, the three trained adapters of ruler-tiny (`configs/ruler-tiny-adapters`) answer in N trajectories,
and told is which share of their answers is right.

Writes `adapters-trace-<model>-<device>.json`, or `adapters-roles-...`, to `scripts/results`. What adapters cost a
decode step is told by `bench_decode.py --adapters`.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import adapter_roles as roles
import jax
import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.checkpoints.adapters import adapter_digest
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import ModelConfig
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine, settled
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.adapters import AdapterWeights, Pair
from sparsex_jax.model.sharding import make_mesh

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RESULTS = Path(__file__).resolve().parent / "results"
AGENTS = roles.ROLES
WAYS = ("base", "isolated", "pre_lr", "refresh", "rebase", "base_shared")
RANK = 16
ALL_TARGETS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


def steps_of(context: int) -> list[tuple[str, int, int]]:
    """Whose step it is, how many tokens are new in its prompt, and how many it answers (LRAgent, section 5.1)."""
    turn = [("plan", 8, 8), ("act", 8, 8)]
    return [("plan", 512, 32), *4 * [*turn, ("plan", context, 32)], *turn, ("reflect", 32, 32), ("reflect", 8, 8)]


def random_adapter(config: ModelConfig, seed: int, targets: Sequence[str] = ("wq", "wv")) -> AdapterWeights:
    """Small random matrices on these weights in each layer."""
    rng, pairs = np.random.default_rng(seed), {}
    queries, keys = (heads * config.head_dim for heads in (config.num_q_heads, config.num_kv_heads))
    hidden, wide = config.hidden_size, config.intermediate_size
    sizes = {"wq": (hidden, queries), "wk": (hidden, keys), "wv": (hidden, keys), "wo": (queries, hidden)}
    sizes |= {"w_gate": (hidden, wide), "w_up": (hidden, wide), "w_down": (wide, hidden)}
    for name in targets:
        inputs, outputs = sizes[name]
        a = inputs**-0.5 * rng.standard_normal((config.num_layers, inputs, RANK), np.float32)
        b = 0.02 * rng.standard_normal((config.num_layers, RANK, outputs), np.float32)
        pairs[name] = Pair(a, b)
    return AdapterWeights(RANK, pairs, (), adapter_digest(pairs, ()))


@dataclasses.dataclass
class Totals:
    """Sums over the steps of one pass; times in seconds."""

    ttft: float = 0.0
    steps: float = 0.0
    between: float = 0.0
    computed: float = 0.0
    prompts: int = 0
    answers: int = 0

    def figures(self) -> dict[str, tuple[float, str]]:
        return {
            "TTFT, sum": (self.ttft, "s"),
            "all steps": (self.steps, "s"),
            "neutral runs": (self.between, "s"),
            "tokens": ((self.prompts + self.answers) / self.steps, "tokens/s"),
            "computed": (self.computed / self.prompts, "of token-layers"),
        }


def asked_of(way: str, agent: str, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Engine.generate` that make it this way."""
    if way == "base":
        return {}
    reuse = parse_method(options.refresh).updated(only_if_faster=False) if way == "refresh" else ReuseConfig("prefix")
    return {"adapter": agent, "sharing": way, "reuse": reuse}


def play(engine: Engine, way: str, options: argparse.Namespace, namespaces: Iterator[str]) -> Totals:
    """One pass of the trace, in the next namespace. Each answer stands in the prompts behind it."""
    rng, totals, said, namespace = np.random.default_rng(0), Totals(), np.zeros(0, np.int32), next(namespaces)
    for agent, new, answer in steps_of(options.context):
        said = np.append(said, rng.integers(1, engine.model.vocab_size, new)).astype(np.int32)
        began = time.perf_counter()
        sampling = SamplingParams(answer, temperature=0.0, ignore_eos=True)
        out = engine.generate(said, sampling, namespace=namespace, **asked_of(way, agent, options))
        ended = time.perf_counter()
        if way == "rebase":
            engine.heal()
        totals.ttft += out.report.ttft_s
        totals.steps += ended - began
        totals.between += time.perf_counter() - ended
        totals.computed += out.report.computed_fraction * len(said)
        totals.prompts, totals.answers = totals.prompts + len(said), totals.answers + answer
        said = np.append(said, out.token_ids).astype(np.int32)
    return totals


def trace(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    length = 4 * options.context + 1024
    for way in options.ways:
        shares = {} if way == "base" else {"max_adapters": len(AGENTS), "max_adapter_rank": RANK}
        shares |= {"share_adapters": True} if way not in ("base", "isolated") else {}
        room = {"store_tokens": (len(AGENTS) + 1) * length, "max_context": length, "max_num_seqs": 4}
        about = {"dtype": options.dtype, "choose": "always", "tensor_parallel": options.tensor_parallel}
        engine = make_engine(options.model, **about, **room, **shares)
        for number, agent in enumerate(AGENTS if shares else ()):
            engine.load_adapter(agent, random_adapter(engine.model, number))
        namespaces = map(str, itertools.count())  # of its own for each pass, which finds nothing of those before it
        one_pass = functools.partial(play, engine, way, options, namespaces)
        totals = settled(one_pass, way)
        figures = totals.figures()
        print(f"{way:10}", ", ".join(f"{name} {figure:.4g} {unit}" for name, (figure, unit) in figures.items()))
        for name, (figure, unit) in figures.items():
            row = {"work": f"trace, {options.context}: {name}", "implementation": way, "figure": float(f"{figure:.5g}")}
            yield row | {"unit": unit}
        del engine


def answers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The share of right values in the roles' answers, each role behind the true answers of those before it."""
    adapters = {role: CONFIGS / "ruler-tiny-adapters" / role for role in roles.ROLES}
    shape = {"share_adapters": True, "max_adapter_rank": 8, "store_tokens": 16384, "choose": "always"}
    mesh = make_mesh(options.tensor_parallel)
    engine = Engine.from_pretrained(CONFIGS / "ruler-tiny", mesh=mesh, adapters=adapters, dtype=options.dtype, **shape)
    held_out = roles.make_trajectories((0, 1, 0), options.roles, roles.Shape())
    for way in (way for way in options.ways if way != "base"):
        right, cross, computed = [], 0, []
        for number in range(options.roles):
            for agent, mine, prompt, expected in _turns(held_out, number):
                sampling = SamplingParams(len(expected), temperature=0.0, ignore_eos=True)
                asked = asked_of(way, agent, options) | {"namespace": f"{way} {number}"}
                out = engine.generate(prompt, sampling, **asked)
                if way == "rebase":
                    engine.heal()
                right += (np.array(out.token_ids) == expected)[mine].tolist()
                cross += out.report.sharing.cross_adapter_tokens if out.report.sharing else 0
                computed.append(out.report.computed_fraction)
        figures = {"right": np.mean(right), "computed": np.mean(computed)}
        print(
            f"{way:10} right {figures['right']:.3f} of {len(right)}, computed {figures['computed']:.3f}, {cross} shared"
        )
        for name, figure in figures.items():
            row = {"work": f"roles: {name}", "implementation": way, "figure": float(f"{figure:.5g}"), "unit": "share"}
            yield row | {"samples": len(right)}


def _turns(held_out: roles.Trajectories, number: int) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Of a trajectory: whose turn it is, where values stand in the answer, the prompt, and the answer."""
    tokens, of_turn, of_answer, value, _, who = (part[number] for part in held_out)
    for turn, role in enumerate(who.tolist()):
        answer = np.flatnonzero((of_turn == turn) & of_answer)
        values = np.flatnonzero(value[answer] >= 0) + 1
        yield AGENTS[role], values[values < len(answer)], tokens[: answer[0]], tokens[answer]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct" if small else "llama-3.1-8b")
    add("--dtype", default="float32" if small else "bfloat16")
    add("--context", type=count, default=256 if small else 8192, help="tokens that four of the steps bring")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--refresh", default="sparsex:boundary_layer=0:recompute_ratio=0.1", help="NAME or NAME:FIELD=VALUE:...")
    add("--roles", type=count, help="trajectories in which trained adapters answer")
    add_tensor_parallel(parser)
    options = parser.parse_args(arguments)
    bench, run = ("adapters-roles", answers) if options.roles else ("adapters-trace", trace)
    about = {"bench": bench, "model": "ruler-tiny" if options.roles else options.model}
    about |= provenance(options.tensor_parallel)
    unused = {"model", "context"} if options.roles else {"model", "roles"}
    settings = {name: value for name, value in vars(options).items() if name not in unused}
    rows: list[dict[str, Any]] = []
    for row in run(options):
        rows.append(row)
        path = write_json(
            about | {"settings": settings, "rows": rows},
            folder,
        )
    print(path)


if __name__ == "__main__":
    run_script(main)
