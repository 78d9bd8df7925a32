"""Measures rounds of agents who hear each other: how long each waits for its first token, and what the store holds.

    python scripts/bench_agents.py [--model llama-3.1-8b] [--agents 2 4 8 16] [--shared 512 4096 24576] [--add]

Everybody's answers go into everybody's next prompt, behind a text of its own:

    debate        [system | private | everybody's texts, in an order of its own | ask]
    group chat    [system | private | everybody's texts, in the order in which they were said | ask]

Texts are random tokens, and weights of a named configuration are random too, since the figures depend on shapes alone.
A history that all share comes first; each round adds the answers. The ways to answer a round, each with its own store:

    full             all prompts at once, computed in full
    prefix           all at once, with the prefix cache
    reordered        as that, but [system | everybody's texts, in one order | private | ask]: where order is free
    one by one       each prompt once the one before is answered, with segments (--method)
    at once          all at once, with segments
    round            all are members of one round, with segments
    round, mirrors   the same where the store keeps what is alike once, if this version can (--mirrors)

The first round of each way makes what is stored; told are the medians of the others, of a pass that compiled nothing.
The time to a first token is from the round's beginning, and the worst of the agents' counts for the limit. `store` is
what the store cannot give up without losing something, tables of mirrors included; `contexts` are those of the agents
after the last round; a `mirror` is what one of them adds to the donors that it rests on. `count_mirrors.py` counts the
same without a device. Prints a line for each, and writes `agents-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsex_jax import Engine, EngineConfig, ReuseConfig, Round, SamplingParams
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine, settled
from sparsex_jax.eval.footprint import footprint, store_bytes
from sparsex_jax.eval.results import provenance, rows_of_file, write_json
from sparsex_jax.scheduler.output import Generation
from sparsex_jax.scheduler.sequence import DEFAULT_NAMESPACE

RESULTS = Path(__file__).resolve().parent / "results"
WORKLOADS = ("debate", "group chat")
WAYS = ("full", "prefix", "reordered", "one by one", "at once", "round")
MIRRORS = "round, mirrors"
SYSTEM, ASK = 64, 32  # tokens
MESSAGE = 1536  # tokens of a message of the history, at most
MEMBERS = 4  # whose rows a plan can have, beyond what work it may be


@dataclasses.dataclass
class Talk:
    """A conversation of agents.

    Attributes:
      said: everybody's texts, in the order in which they were said.
    """

    workload: str
    private: list[np.ndarray]
    system: np.ndarray
    ask: np.ndarray
    said: list[np.ndarray]
    rng: np.random.Generator

    @classmethod
    def begin(cls, workload: str, agents: int, shared: int, options: argparse.Namespace, vocabulary: int) -> "Talk":
        rng = np.random.default_rng(options.seed)

        def text(length: int) -> np.ndarray:
            return rng.integers(1, vocabulary, length).astype(np.int32)

        private = [text(options.private + int(rng.integers(0, options.private // 8 + 1))) for _ in range(agents)]
        messages = max(agents, shared // MESSAGE)
        said = [text(len(part)) for part in np.array_split(np.zeros(shared), messages)]
        return cls(workload, private, text(SYSTEM), text(ASK), said, rng)

    def prompts(self, *, reordered: bool) -> list[np.ndarray]:
        return [self._prompt(private, reordered) for private in self.private]

    def _prompt(self, private: np.ndarray, reordered: bool) -> np.ndarray:
        shuffled = self.workload == "debate" and not reordered
        order = self.rng.permutation(len(self.said)) if shuffled else range(len(self.said))
        said = [self.said[at] for at in order]
        parts = [*said, private] if reordered else [private, *said]
        return np.concatenate([self.system, *parts, self.ask]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Played:
    """A round that was answered: seconds to each agent's first token and to the last answer, and the answers."""

    ttft_s: list[float]
    seconds: float
    answers: list[Generation]

    def figures(self) -> dict[str, tuple[float, str]]:
        reports = [answer.report for answer in self.answers]
        prompt_tokens = sum(report.prompt_tokens for report in reports)
        computed = sum(report.computed_fraction * report.prompt_tokens for report in reports)
        new_tokens = sum(len(answer.token_ids) for answer in self.answers)
        return {
            "TTFT, mean": (statistics.mean(self.ttft_s), "s"),
            "TTFT, worst": (max(self.ttft_s), "s"),
            "round": (self.seconds, "s"),
            "prompts": (prompt_tokens / self.seconds, "tokens/s"),
            "answers": (new_tokens / self.seconds, "tokens/s"),
            "computed": (computed / prompt_tokens, "of token-layers"),
            "hit rate": (1 - sum(report.fresh_tokens for report in reports) / prompt_tokens, "of tokens"),
        }


class Bench:
    """An engine that answers rounds in several ways."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self._engine, self._options = engine, options
        self._sampling = SamplingParams(options.answer, ignore_eos=True)
        self._rounds = itertools.count()

    def play(self, workload: str, agents: int, shared: int, way: str) -> dict[str, tuple[float, str]]:
        """The figures of one way: medians over its rounds behind the first."""
        engine = self._engine
        talk = Talk.begin(workload, agents, shared, self._options, engine.model.vocab_size)
        played = []
        for _ in range(1 + self._options.rounds):
            prompts = talk.prompts(reordered=way == "reordered")
            played.append(self._answer(way, prompts))
            answers = [np.array(answer.token_ids, np.int32) for answer in played[-1].answers]
            talk.said += answers
        # The last token of an answer was no input.
        kept = self._kept([np.append(*pair)[:-1] for pair in zip(prompts, answers, strict=True)])
        engine.cache.clear()
        told = [each.figures() for each in played[1:]]
        medians = {
            name: (statistics.median(each[name][0] for each in told), unit) for name, (_, unit) in told[0].items()
        }
        return medians | kept

    def _kept(self, contexts: Sequence[np.ndarray]) -> dict[str, tuple[float, str]]:
        """What the store has in the end: all that it could not give up for nothing, and the agents' contexts."""
        cache = self._engine.cache
        page_bytes = self._engine.runner.store.nbytes / self._engine.config.num_pages
        held = footprint(cache, contexts, DEFAULT_NAMESPACE, page_bytes)
        figures = {
            "store": (store_bytes(cache, page_bytes), "bytes"),
            "contexts, kept": (held.found, "of tokens"),
            "contexts, together": (held.together, "bytes"),
            "contexts, smaller than dense": (held.times_smaller, "times"),
        }
        if held.mirrors:
            figures["mirror, of dense"] = statistics.mean(held.mirrors), "of bytes"
            figures["largest mirror, of dense"] = max(held.mirrors), "of bytes"
        return figures

    def _answer(self, way: str, prompts: Sequence[np.ndarray]) -> Played:
        began, reuse = time.perf_counter(), self._reuse(way)
        if way == "one by one":
            return self._one_by_one(prompts, reuse, began)
        name = Round(f"round {next(self._rounds)}", len(prompts)) if way.startswith("round") else None
        answers = self._engine.generate_batch(prompts, self._sampling, reuse=reuse, round=name)
        return Played([answer.report.ttft_s for answer in answers], time.perf_counter() - began, answers)

    def _one_by_one(self, prompts: Sequence[np.ndarray], reuse: ReuseConfig, began: float) -> Played:
        ttft_s, answers = [], []
        for prompt in prompts:
            before = time.perf_counter() - began
            answers.append(self._engine.generate(prompt, self._sampling, reuse=reuse))
            ttft_s.append(before + answers[-1].report.ttft_s)
        return Played(ttft_s, time.perf_counter() - began, answers)

    def _reuse(self, way: str) -> ReuseConfig:
        exact = {"full": "full", "prefix": "prefix", "reordered": "prefix"}
        return ReuseConfig(exact[way]) if way in exact else self._options.reuse


def rows_of(work: str, way: str, figures: dict[str, tuple[float, str]]) -> list[dict[str, Any]]:
    return [
        {"work": f"{work}: {name}", "implementation": way, "figure": float(f"{figure:.5g}"), "unit": unit}
        for name, (figure, unit) in figures.items()
    ]


def within(rows: Sequence[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    """For each workload, history and way, the most agents whose worst first token comes within the limit."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        work, _, name = row["work"].partition(": ")
        if name == "TTFT, worst":
            workload, agents, shared = work.split(", ")
            key = f"{workload}, {shared}: agents within {limit_s:g} s", row["implementation"]
            fits = row["figure"] <= limit_s
            found[key] = max(found.get(key, 0), int(agents.split()[0]) if fits else 0)
    return [
        {"work": work, "implementation": way, "figure": number, "unit": "agents"}
        for (work, way), number in found.items()
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    small = jax.default_backend() == "cpu"
    can_mirror = any(field.name == "mirrors" for field in dataclasses.fields(EngineConfig))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct" if small else "llama-3.1-8b")
    add("--dtype", default="float32" if small else "bfloat16")
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--agents", type=count, nargs="+", default=[2, 4] if small else [2, 4, 8, 16])
    add("--shared", type=count, nargs="+", default=[512] if small else [512, 4096, 24576], help="tokens of the history")
    add("--private", type=count, default=64 if small else 1024, help="tokens of each agent, and up to an eighth more")
    add("--answer", type=count, default=8 if small else 32, help="tokens of each answer")
    add("--rounds", type=count, default=2 if small else 3, help="that are measured, behind the first")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--method", default="sparsex:boundary_layer=0:recompute_ratio=0.05", help="NAME or NAME:FIELD=VALUE:...")
    add("--mirrors", action="store_true", help="also with a store that keeps what is alike once")
    add("--limit", type=positive, default=1.5, help="seconds to the first token")
    add("--store-tokens", type=count, help="by default what the largest case can fill")
    add("--add", action="store_true", help="keep the file's figures of other cases")
    add("--seed", type=int, default=0)
    add_tensor_parallel(parser)
    options = parser.parse_args(arguments)
    if options.mirrors and not can_mirror:
        parser.error("--mirrors: this version keeps each prompt's KV as a whole")
    options.reuse = parse_method(options.method).updated(only_if_faster=False)
    return options


def engine_for(options: argparse.Namespace, **fields: Any) -> Engine:
    """An engine with room for the largest case."""
    most = max(options.agents)
    said = max(options.shared) + most * options.answer * (2 + options.rounds)
    length = said + options.private * 9 // 8 + SYSTEM + ASK + options.answer + 64
    asked = {"dtype": options.dtype, "max_num_seqs": most, "choose": "always", "max_context": MEMBERS * length}
    asked["store_tokens"] = options.store_tokens or (most + 1) * length
    return make_engine(options.model, tensor_parallel=options.tensor_parallel, **asked, **fields)


def earlier_rows(about: dict[str, Any], works: set[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Rows of the file that is there already, but those of these works."""
    measured = [row for row in rows_of_file(about, folder) if row["unit"] != "agents"]
    return [row for row in measured if (row["work"].partition(": ")[0], row["implementation"]) not in works]


def run(bench: Bench, options: argparse.Namespace, ways: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case."""
    for workload, shared, agents, way in itertools.product(options.workloads, options.shared, options.agents, ways):
        work = f"{workload}, {agents} agents, {shared} shared"
        figures = settled(functools.partial(bench.play, workload, agents, shared, way), work)
        told = ", ".join(f"{name} {figure:.4g} {unit}" for name, (figure, unit) in figures.items())
        print(f"{work}, {way}: {told}", flush=True)
        yield rows_of(work, way, figures)


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    options = parse(arguments)
    about: dict[str, Any] = {"bench": "agents", "model": options.model} | provenance(options.tensor_parallel)
    cases = itertools.product(options.workloads, options.agents, options.shared)
    names = {f"{workload}, {agents} agents, {shared} shared" for workload, agents, shared in cases}
    kinds = [({}, options.ways)] + [({"mirrors": True}, [MIRRORS])] * options.mirrors
    works = set(itertools.product(names, [way for _, ways in kinds for way in ways]))
    rows = earlier_rows(about, works, folder) if options.add else []
    settings = {name: value for name, value in vars(options).items() if name not in ("model", "reuse", "add")}
    for fields, ways in kinds:
        for found in run(Bench(engine_for(options, **fields), options), options, ways):
            rows += found
            content = about | {"settings": settings, "rows": rows + within(rows, options.limit)}
            write_json(content, folder)  # so that it is there if a later case fails


if __name__ == "__main__":
    run_script(main)
