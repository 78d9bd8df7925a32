"""Measures conversations of many turns by method: work and time to the first token turn by turn, and quality.

    uv run python scripts/bench_conversations.py [--workloads rag_chat coding] [--methods sparsex] [--answers full own]

The workloads are those of `sparsex_jax.eval.conversations`. The methods take turns: each answers the first request,
then each the second, in an order that changes, so that load slows all alike. Each has a namespace of its own. `prefix`,
the plain prefix cache, is always among them, and full recompute gives the reference for quality.

`--answers` says what becomes of the answers, since a client sends them back in the next turn:

    full       the transcript is full recompute's, so all methods get the same prompts and can be compared turn by turn.
               Each generates one token only, and the answer's tokens are new to all of them in the next turn
    own        each goes on with its own answers, as clients do, and has their KV from decoding. Prompts differ from
               method to method where answers do
    scripted   the transcript is drawn from the seed: for random weights, which answer nothing

With `--heal`, there is time between any two requests to make all approximate KV exact; this work is not in the figures.

For quality, full recompute gets the prompts that the method got. A turn's time is the least of several passes without
this and without compiling anything: what else the machine does only adds to it. With answers of `own` there is one
pass, for quality and times. Prints a table, and writes `conversations-<model>-<device>.json` to `scripts/results`.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.conversations import (
    CONVERSATIONS,
    ConversationSize,
    Request,
    encode_messages,
    make_conversation,
    next_request,
    scripted_answers,
)
from sparsex_jax.eval.engines import add_tensor_parallel, load_engine, settled
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.eval.scores import agreement, kl_divergence
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler import warmup
from sparsex_jax.scheduler.output import Generation

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "prefix"
METHODS = (BASELINE, "sparsex")
ANSWERS = ("full", "own", "scripted")
SLOWER = 1.1  # a turn is slower than the baseline's if it takes more than this many times as long


@dataclasses.dataclass
class Turn:
    """One method's figures for one request.

    Attributes:
      speaker: who was to answer.
      kl, top1, agreement: compared with full recompute's answer to the same prompt. None where it was not asked.
        agreement: share of its greedy tokens before the first that differs; of answers `own` only.
    """

    speaker: str
    report: Report
    kl: float | None = None
    top1: float | None = None
    agreement: float | None = None

    def figures(self, num_layers: int) -> dict[str, Any]:
        """All of it as numbers; work is in token-layers."""
        report = self.report
        work = round(report.computed_fraction * report.prompt_tokens * num_layers)
        tokens = {f"{kind}_tokens": number for kind, number in report.tokens_by_kind().items()}
        quality = {"kl": self.kl, "top1": self.top1, "agreement": self.agreement}
        return {"speaker": self.speaker, "prompt_tokens": report.prompt_tokens, **tokens, "work": work, **quality}


@dataclasses.dataclass
class Player:
    """One method's side of a conversation.

    Attributes:
      request: what it has to answer next. None behind the last one.
    """

    reuse: ReuseConfig
    namespace: str
    requests: Any
    handles: set[int]
    request: Request | None
    turns: list[Turn] = dataclasses.field(default_factory=list)

    def go_on(self, answer: str, turn: Turn) -> None:
        self.turns.append(turn)
        self.request = next_request(self.requests, answer)


class Bench:
    """Passes of conversations over one engine."""

    def __init__(
        self, engine: Engine, tokenizer: Any, size: ConversationSize, seed: int, *, heals: bool = False
    ) -> None:
        self._engine, self._tokenizer, self._size, self._seed, self._heals = engine, tokenizer, size, seed, heals
        self._full: dict[bytes, Generation] = {}
        self._passes = itertools.count()

    def compare(self, name: str, answers: str, methods: dict[str, ReuseConfig], passes: int) -> dict[str, list[dict]]:
        """A pass for quality, then passes for times: the figures of each method, turn by turn."""
        if answers == "own":
            timed = [quality := settled(lambda: self.once(name, answers, methods, quality=True), name)]
        else:
            quality = self.once(name, answers, methods, quality=True)
            timed = [settled(lambda: self.once(name, answers, methods), name) for _ in range(passes)]
        return {method: self._rows(quality[method], [each[method] for each in timed]) for method in methods}

    def _rows(self, quality: Sequence[Turn], timed: Sequence[Sequence[Turn]]) -> list[dict[str, Any]]:
        num_layers = self._engine.model.num_layers
        ttft = np.min([[turn.report.ttft_s for turn in turns] for turns in timed], axis=0).tolist()
        return [
            timed_turn.figures(num_layers)
            | {"kl": turn.kl, "top1": turn.top1, "agreement": turn.agreement, "ttft_s": seconds}
            for turn, timed_turn, seconds in zip(quality, timed[-1], ttft, strict=True)
        ]

    def once(
        self, name: str, answers: str, methods: dict[str, ReuseConfig], *, quality: bool = False
    ) -> dict[str, list[Turn]]:
        """All methods play the conversation, turn and turn about."""
        number, script = next(self._passes), scripted_answers(self._seed)
        players = {method: self._player(name, reuse, f"pass {number}, {method}") for method, reuse in methods.items()}
        for turn in itertools.count():
            scripted = next(script)
            waiting = [player for player in players.values() if player.request is not None]
            if not waiting:
                break
            first = (turn + number) % len(waiting)
            for player in [*waiting[first:], *waiting[:first]]:
                self._play(player, answers, scripted, quality)
                if self._heals:
                    self._engine.heal()
        for handle in itertools.chain.from_iterable(player.handles for player in players.values()):
            self._engine.forget(handle)
        return {method: player.turns for method, player in players.items()}

    def _player(self, name: str, reuse: ReuseConfig, namespace: str) -> Player:
        stored, requests = make_conversation(name, self._size, self._seed)
        handles = {self._engine.remember(self._ids(text), namespace=namespace, frozen=True) for text in stored}
        return Player(reuse, namespace, requests, handles, next_request(requests, None))

    def _ids(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, np.int32) % self._engine.model.vocab_size

    def _play(self, player: Player, answers: str, scripted: str, quality: bool) -> None:
        """A player answers its request, and gets the next one."""
        prompt = encode_messages(self._tokenizer, player.request.messages) % self._engine.model.vocab_size
        new_tokens = player.request.new_tokens if answers == "own" else 1
        wants_full = answers == "full" or quality
        full = self._full_answer(prompt, player.request.new_tokens) if wants_full else None
        done = self._generate(prompt, new_tokens, quality, reuse=player.reuse, namespace=player.namespace)
        turn = Turn(player.request.speaker, done.report)
        if quality:
            turn.kl = kl_divergence(full.logits, done.logits)
            turn.top1 = float(full.token_ids[0] == done.token_ids[0])
            turn.agreement = agreement(full.token_ids, done.token_ids) if answers == "own" else None
        text = {"full": full and full.text, "own": done.text, "scripted": scripted}[answers]
        player.go_on(text.strip(), turn)

    def _full_answer(self, prompt: np.ndarray, new_tokens: int) -> Generation:
        """Full recompute's greedy answer; each is computed once."""
        key = prompt.tobytes()
        if key not in self._full:
            self._full[key] = self._generate(prompt, new_tokens, True, reuse=ReuseConfig("full"), keep=False)
        return self._full[key]

    def _generate(self, prompt: np.ndarray, new_tokens: int, logits: bool, **options: Any) -> Generation:
        sampling = SamplingParams(new_tokens)
        return self._engine.generate_batch([prompt], sampling, return_logits=logits, **options)[0]


# The results -----------------------------------------------------------------------------------------------


def summary(turns: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], num_layers: int) -> dict[str, tuple]:
    """Figures of a whole conversation with their units, by name. What compares with the baseline leaves out the first
    turn, in which nothing can be reused yet."""
    third = max(len(turns) // 3, 1)
    prompt_tokens = sum(turn["prompt_tokens"] for turn in turns)
    pairs = list(zip(turns[1:], baseline[1:], strict=True))

    def mean(name: str, some: Sequence[dict[str, Any]] = turns) -> float | None:
        values = [turn[name] for turn in some if turn[name] is not None]
        return float(np.mean(values)) if values else None

    return {
        "turns": (len(turns), "requests"),
        "prompt": (prompt_tokens, "tokens"),
        "work": (sum(turn["work"] for turn in turns) / prompt_tokens / num_layers, "of token-layers"),
        "TTFT sum": (sum(turn["ttft_s"] for turn in turns), "s"),
        "dearer": (sum(own["work"] > other["work"] for own, other in pairs), "turns"),
        "slower": (sum(own["ttft_s"] > SLOWER * other["ttft_s"] for own, other in pairs), "turns"),
        "KL, first third": (mean("kl", turns[:third]), "nats"),
        "KL, last third": (mean("kl", turns[-third:]), "nats"),
        "top-1": (mean("top1"), "share"),
        "agreement": (mean("agreement"), "share"),
    }


Played = dict[tuple[str, str], dict[str, list[dict[str, Any]]]]  # by (workload, answers), then by method


def rows(played: Played, num_layers: int) -> list[dict[str, Any]]:
    return [
        {
            "work": f"{name}, {answers}: {what}",
            "implementation": method,
            "figure": None if figure is None else float(f"{figure:.5g}"),
            "unit": unit,
        }
        for (name, answers), by_method in played.items()
        for method, turns in by_method.items()
        for what, (figure, unit) in summary(turns, by_method[BASELINE], num_layers).items()
    ]


def columns(turns: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list for each figure, which takes less room in a file than a record for each turn."""
    return {
        name: [float(f"{turn[name]:.4g}") if isinstance(turn[name], float) else turn[name] for turn in turns]
        for name in turns[0]
    }


def save(options: argparse.Namespace, played: Played, num_layers: int) -> None:
    bench = "conversations-healed" if options.heal else "conversations"
    about = {"bench": bench, "model": options.model} | provenance(options.tensor_parallel)
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "note")}
    turns = [
        {"workload": name, "answers": answers, "method": method, **columns(turns)}
        for (name, answers), by_method in played.items()
        for method, turns in by_method.items()
    ]
    content = about | {"num_layers": num_layers, "note": options.note, "settings": settings}
    write_json(content | {"rows": rows(played, num_layers), "turns": turns}, RESULTS)


def show(name: str, answers: str, by_method: dict[str, list[dict[str, Any]]], num_layers: int) -> None:
    """Each method's work turn by turn, as shares of its prompts, and its figures."""
    print(f"\n## {name}, answers: {answers}")
    for method, turns in by_method.items():
        shares = " ".join(f"{turn['work'] / turn['prompt_tokens'] / num_layers:.2f}" for turn in turns)
        figures = {what: f for what, (f, _) in summary(turns, by_method[BASELINE], num_layers).items() if f is not None}
        print(f"{method}: {shares}\n    {', '.join(f'{what} {figure:.4g}' for what, figure in figures.items())}")


# The run ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="a checkpoint, or a named configuration for random weights")
    add("--dtype", default="auto")
    add("--workloads", nargs="+", default=list(CONVERSATIONS), choices=list(CONVERSATIONS))
    add("--methods", nargs="+", default=list(METHODS), help="NAME or NAME:FIELD=VALUE:...")
    add("--answers", nargs="+", default=["full", "own"], choices=ANSWERS)
    add("--turns", type=count, default=ConversationSize.turns)
    add(
        "--scale",
        type=positive,
        default=ConversationSize.scale,
        help="how many times as long notes, files and texts are",
    )
    add("--new-tokens", type=count, default=ConversationSize.new_tokens)
    add("--passes", type=count, default=3, help="passes that are timed, 1 or more; not of answers own")
    add("--store-tokens", type=count, default=49152)
    add("--heal", action="store_true", help="make approximate KV exact between requests")
    add("--seed", type=int, default=0)
    add("--note", help="what a reader of the tables must know")
    add_tensor_parallel(parser)
    options = parser.parse_args()
    options.methods = list(dict.fromkeys([BASELINE, *options.methods]))
    return options


def main() -> None:
    options = parse()
    methods = {name: parse_method(name) for name in options.methods}
    size = ConversationSize(options.turns, options.scale, options.new_tokens)
    sizes = {"dtype": options.dtype, "store_tokens": options.store_tokens, "frozen_limit": 0.9}
    engine, tokenizer = load_engine(options.model, tensor_parallel=options.tensor_parallel, **sizes)
    for step in warmup.steps(engine.loop):
        step()
    bench = Bench(engine, tokenizer, size, options.seed, heals=options.heal)
    played: Played = {}
    started = time.perf_counter()
    for name, answers in itertools.product(options.workloads, options.answers):
        played[name, answers] = bench.compare(name, answers, methods, options.passes)
        show(name, answers, played[name, answers], engine.model.num_layers)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        save(options, played, engine.model.num_layers)  # so that it is there if a later workload fails


if __name__ == "__main__":
    run_script(main)
