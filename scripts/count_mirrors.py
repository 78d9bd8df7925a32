"""Counts what a store keeps of agents who hear each other, page by page, without a model.

    python scripts/count_mirrors.py [--agents 2 4 8 16] [--shared 4096 24576] [--method sparsex:boundary_layer=0:...]

The debate of `bench_agents.py`: the store's books, lookups, plans and mirrors are those of an engine, and so is what
each prompt copies and computes. Only what is in the pages is missing, so tokens are chosen at random, in blocks of the
method's `pool_tokens`.

Two ways to answer: as members of a round, all at once, and one by one. The store has room for all contexts of a round
and of the one before it. Then `--keep` agents take their turns in a store for four of them, with mirrors and without.
Prints a line for each, and writes `mirrors-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_agents import ASK, SYSTEM, Talk
from jaxtyping import Bool, Int32, Int64

from sparsex_jax import EngineConfig, ModelConfig
from sparsex_jax.cache import Match, PageCache
from sparsex_jax.cache.mirrors import Origins
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.footprint import Footprint, footprint
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.reuse.methods import Method
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.schedule import Phase, written_depth
from sparsex_jax.scheduler.choice import Choice, look_up

RESULTS = Path(__file__).resolve().parent / "results"
METHOD = "sparsex:boundary_layer=0:recompute_ratio=0.05:pool_tokens=32"
AGENTS = "agents"  # their namespace
Tokens = Int32[np.ndarray, "tokens"]


@dataclasses.dataclass(eq=False)
class Turn:
    """A prompt that holds its pages."""

    prompt: Tokens
    match: Match
    plan: RequestPlan
    pages: list[int]
    origins: Origins | None
    depth: Int64[np.ndarray, "tokens"] | None = None


class Books:
    """An engine's store without the rows."""

    def __init__(self, model: ModelConfig, num_pages: int, method: Method, seed: int, *, mirrors: bool = True) -> None:
        self.model, self._method, self._page_size = model, method, EngineConfig().page_size
        self.cache = PageCache(num_pages, self._page_size, num_layers=model.num_layers if mirrors else 0)
        self.page_bytes = self._page_size * model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2.0  # bfloat16
        self._choice, self._rng = Choice(model, self._page_size), np.random.default_rng(seed)

    def admit(self, prompt: Tokens, answer: int, last_used: np.ndarray | None = None) -> Turn:
        """As `Admission.admit`. Raises StoreFullError."""
        cache, method = self.cache, self._method
        match = look_up(cache, prompt, AGENTS, method, self.model.num_layers, last_used=last_used)
        plan = self._choice.plan(prompt, match, method, lambda: np.full(len(prompt), -1))
        derived = [page for page in plan.pages if cache.mirrors.is_derived(page)]
        stored = [page for page in plan.pages if not cache.mirrors.is_derived(page)]
        try:
            new = cache.allocate(-(-(len(prompt) + answer - 1) // self._page_size) - len(stored))
        except BaseException:
            cache.let_go(match)
            raise
        cache.mirrors.restore(derived, new[: len(derived)])
        cache.share(stored)
        restored = dict(zip(derived, new, strict=False))
        pages = [*(restored.get(page, page) for page in plan.pages), *new[len(derived) :]]
        located = tuple(cache.mirrors.located(copy) for copy in plan.copies)
        return Turn(prompt, match, plan, pages, cache.mirrors.origins(located, len(prompt)) if located else None)

    def prefill(self, turn: Turn) -> None:
        turn.depth = written_depth(turn.plan.phases, self._computed(turn.plan), self.model.num_layers)
        self.cache.let_go(turn.match)
        self._commit(turn, turn.prompt)

    def _computed(self, plan: RequestPlan) -> Bool[np.ndarray, "phases tokens"]:
        """Which tokens each phase computes."""
        masks = [plan.phases[0].forced]
        for phase in plan.phases[1:]:
            masks.append(phase.forced | self._chosen(plan, phase, masks[-1] & ~phase.forced))
        return np.array(masks)

    def _chosen(self, plan: RequestPlan, phase: Phase, candidates: Bool[np.ndarray, "tokens"]) -> np.ndarray:
        """Blocks of candidates, until there are as many tokens as the phase chooses."""
        blocks = np.where(candidates, plan.prompt.blocks(phase.pool_tokens), -1)
        numbers, sizes = np.unique(blocks[candidates], return_counts=True)
        order = self._rng.permutation(len(numbers))
        before = np.cumsum(sizes[order]) - sizes[order]
        return np.isin(blocks, numbers[order][before < phase.budget])

    def _commit(self, turn: Turn, tokens: Tokens) -> None:
        exact = turn.plan.exact_tokens(self.model.num_layers)
        exact = len(tokens) if exact == len(turn.prompt) else min(exact, len(tokens))
        self.cache.commit(turn.pages, tokens, AGENTS, exact_tokens=exact, made_by=self._method)

    def end(self, turn: Turn, answer: Tokens) -> Tokens:
        """Returns the context that can be found from now on."""
        tokens = np.concatenate([turn.prompt, answer[:-1]])
        self._commit(turn, tokens)
        if self.cache.mirrors.num_layers and turn.origins is not None and turn.depth is not None:
            self.cache.mirrors.derive(turn.pages, turn.origins, turn.depth, len(turn.plan.pages))
        self.cache.release(turn.pages)
        return tokens

    def footprint(self, contexts: Sequence[Tokens]) -> Footprint:
        return footprint(self.cache, contexts, AGENTS, self.page_bytes)


def answers_to(number: int, options: argparse.Namespace, vocabulary: int, rng: np.random.Generator) -> list[Tokens]:
    return [rng.integers(1, vocabulary, options.answer).astype(np.int32) for _ in range(number)]


def debate(books: Books, agents: int, shared: int, way: str, options: argparse.Namespace) -> Iterator[Footprint]:
    """The footprint of the agents' contexts after each round."""
    vocabulary, rng = books.model.vocab_size, np.random.default_rng(options.seed)
    talk = Talk.begin("debate", agents, shared, options, vocabulary)
    for _ in range(1 + options.rounds):
        prompts, answers = talk.prompts(reordered=False), answers_to(agents, options, vocabulary, rng)
        groups = [range(agents)] if way == "round" else [[number] for number in range(agents)]
        contexts: list[Tokens] = []
        for group in groups:
            last_used = books.cache.last_used()
            turns = [books.admit(prompts[number], options.answer, last_used) for number in group]
            for turn in turns:
                books.prefill(turn)
            contexts += [books.end(turn, answers[number]) for turn, number in zip(turns, group, strict=True)]
        talk.said += answers
        yield books.footprint(contexts)


def turns(books: Books, agents: int, shared: int, options: argparse.Namespace) -> tuple[float, int]:
    """Agents go on with what they were told, one after the other, and all are told the same in each round.

    Returns:
      The share of their contexts that is found in place in the last round, and how many are kept whole.
    """
    rng, vocabulary = np.random.default_rng(options.seed), books.model.vocab_size

    def text(length: int) -> Tokens:
        return rng.integers(1, vocabulary, length).astype(np.int32)

    contexts, found, had = [text(SYSTEM + options.private) for _ in range(agents)], 0, 0
    for number in range(1 + options.rounds):
        news, found, had = text(shared if number == 0 else agents * options.answer), 0, 0
        for agent in range(agents):
            turn = books.admit(np.concatenate([contexts[agent], news, text(ASK)]), options.answer)
            found, had = found + turn.match.num_prefix_tokens, had + len(contexts[agent])
            books.prefill(turn)
            contexts[agent] = books.end(turn, text(options.answer))
    whole = [books.footprint([context]).found > 0.99 for context in contexts]
    return found / had, sum(whole)


def rows_of_debates(model: ModelConfig, method: Method, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shared in options.shared:
        for agents in options.agents:
            for way in ("round", "one by one"):
                length = shared + options.private * 9 // 8 + agents * options.answer * (1 + options.rounds) + 256
                books = Books(model, 2 * (agents + 1) * length // EngineConfig().page_size, method, options.seed)
                *_, last = debate(books, agents, shared, way, options)
                yield from told(f"debate, {agents} agents, {shared} shared", way, figures_of(last))


def figures_of(held: Footprint) -> dict[str, tuple[float, str]]:
    return {
        "kept": (held.found, "of tokens"),
        "together": (held.together, "bytes"),
        "smaller than dense": (held.times_smaller, "times"),
        "mirror, of dense": (statistics.mean(held.mirrors), "of bytes"),
        "largest mirror, of dense": (max(held.mirrors), "of bytes"),
    }


def rows_of_turns(model: ModelConfig, method: Method, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shared, agents, size = options.shared[-1], options.keep, EngineConfig().page_size
    rounds = 1 + options.rounds
    length = (
        SYSTEM + options.private + shared + rounds * (ASK + options.answer) + options.rounds * agents * options.answer
    )
    for mirrors in (False, True):
        books = Books(model, 4 * -(-length // size), method, options.seed, mirrors=mirrors)
        hits, whole = turns(books, agents, shared, options)
        figures = {"hit rate in the last round": (hits, "of tokens"), "kept": (whole, "agents")}
        way = "mirrors" if mirrors else "dense"
        yield from told(f"turns, {agents} agents in a store for 4, {shared} shared", way, figures)


def told(work: str, way: str, figures: dict[str, tuple[float, str]]) -> list[dict[str, Any]]:
    """Print figures as a line, and give them as rows."""
    print(f"{work}, {way}: " + ", ".join(f"{name} {figure:.4g} {unit}" for name, (figure, unit) in figures.items()))
    return [
        {"work": f"{work}: {name}", "implementation": way, "figure": float(f"{figure:.5g}"), "unit": unit}
        for name, (figure, unit) in figures.items()
    ]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-3.1-8b", help="whose layers and heads are counted, in bfloat16")
    add("--method", default=METHOD, help="NAME or NAME:FIELD=VALUE:...")
    add("--agents", type=count, nargs="+", default=[2, 4, 8, 16])
    add("--shared", type=count, nargs="+", default=[4096, 24576], help="tokens of the history")
    add("--private", type=count, default=1024, help="tokens of each agent, and up to an eighth more")
    add("--answer", type=count, default=32, help="tokens of each answer")
    add("--rounds", type=count, default=3, help="behind the first")
    add("--keep", type=count, default=10, help="agents in a store for four")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, method = named_config(options.model), parse_method(options.method).updated(only_if_faster=False)
    rows = [*rows_of_debates(model, method, options), *rows_of_turns(model, method, options)]
    settings = {name: value for name, value in vars(options).items() if name != "model"}
    write_json(
        {"bench": "mirrors", "model": options.model} | provenance() | {"settings": settings, "rows": rows}, folder
    )


if __name__ == "__main__":
    run_script(main)
