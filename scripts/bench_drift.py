"""Measures whether quality drifts when reuse builds on KV that earlier reuse computed.

    python scripts/bench_drift.py [--model ruler-tiny] [--queries 200] [--method sparsex:boundary_layer=0] [--agents 3]

The task is tracking variables over the same documents. Each session of 10 questions begins with other values of the
first variables, so the documents mean something else although their text is the same. Each question has the documents
in another order, and behind them the last two questions with the model's own answers. The KV of every prompt is kept,
and the next prompts find it, so approximate KV is the donor of approximate KV. Full recompute answers the same prompts,
and its KV is not kept. With several agents (`--agents`) each of them asks one question in a round, with the documents
in an order of its own, and the history has all answers of the last rounds; `--queries` then counts rounds. Prints a
line for each part of the queries, and writes `drift-<model>-<device>.json`, or `drift-rounds-<model>-<device>.json`.

    python scripts/bench_drift.py --orders 5 --queries 24 --method sparsex:boundary_layer=0:recompute_ratio=0.125 ...

With `--orders`, the same prompts come in several orders: as they were made, and at random (Request Order Matters, arXiv
2610.05833). Nothing is stored at first, and each prompt finds what the prompts before it left. There is no history, so
that a prompt is the same in all orders. Prints a line for each order, and writes `drift-orders-<model>-<device>.json`.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax import Engine, ReuseConfig, Round, SamplingParams
from sparsex_jax.cli.options import parse_method
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval import regimes, results, scores
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine
from sparsex_jax.eval.samples import Question, Sample
from sparsex_jax.eval.scores import Answer
from sparsex_jax.eval.tasks import make_sample

RESULTS = Path(__file__).resolve().parent / "results"
SESSION, HISTORY = 10, 2  # questions with the same values; earlier questions in each prompt
ASSIGNED = re.compile(r"VAR (\w+) = (\w+)\.")
SHOWN = {
    "hit rate": "share",
    "computed_fraction": "share",
    "score": "share",
    "full": "share",
    "agreement": "share",
    "kl": "nats",
}


def other_values(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample with the instruction's values permuted, and the answers that follow from them."""
    given = [value for _, value in ASSIGNED.findall(sample.instruction)]
    dealt = dict(zip(given, rng.permutation(given).tolist(), strict=True))

    def now(text: str) -> str:
        return re.sub(r"\w+$", lambda match: dealt.get(match[0], match[0]), text)

    instruction = ASSIGNED.sub(lambda match: f"VAR {match[1]} = {dealt[match[2]]}.", sample.instruction)
    questions = [
        Question(question.text, tuple(map(now, question.answers)), tuple(map(now, question.written)))
        for question in sample.questions
    ]
    return dataclasses.replace(sample, instruction=instruction, questions=tuple(questions))


def prompt_of(engine: Engine, sample: Sample, number: int, history: list[str], rng: np.random.Generator) -> np.ndarray:
    """The instruction, the documents in random order, what was said last, in any order, and the question."""
    case = regimes.tokenize(sample, engine.tokenizer, number)
    segments = [case.segments[i] for i in rng.permutation(len(case.segments))]
    before = regimes.encode(engine.tokenizer, "".join(history))
    return np.concatenate([case.opening, *segments, before, case.closing]).astype(np.int32)


def answers(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    reuse: ReuseConfig,
    keep: bool,
    together: Round | None = None,
) -> list[Answer]:
    """The greedy answers of a method."""
    sampling, reuse = SamplingParams(new_tokens), reuse.updated(only_if_faster=False)
    options: dict[str, Any] = {"reuse": reuse, "namespace": "drift", "keep": keep, "round": together}
    outs = engine.generate_batch(prompts, sampling, return_logits=True, **options)
    return [Answer(out.text, out.token_ids, np.asarray(out.logits), out.report) for out in outs]


def run(engine: Engine, reuse: ReuseConfig, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row of figures for each question."""
    rng, agents = np.random.default_rng(options.seed), options.agents
    first = make_sample("vt", rng, options.length, options.segments, options.queries * agents)
    for segment in first.segments:
        engine.remember(segment, namespace="drift", company=False)
    rows = []
    for number in range(options.queries):
        if number % SESSION == 0:
            sample, history = other_values(first, rng), []
        asked = range(number * agents, (number + 1) * agents)
        prompts = [prompt_of(engine, sample, each, heard(history, agents, rng), rng) for each in asked]
        questions = [sample.questions[each] for each in asked]
        new_tokens = max(2 * len(regimes.encode(engine.tokenizer, each.reference)) for each in questions)
        full = [answers(engine, [each], new_tokens, ReuseConfig("full"), keep=False)[0] for each in prompts]
        together = Round(f"round {number}", agents) if agents > 1 else None
        reused = answers(engine, prompts, new_tokens, reuse, True, together)
        for question, own, other in zip(questions, reused, full, strict=True):
            history.append(question.text + own.text)
            rows.append(figures(question, own, other))
        if (number + 1) % options.part == 0:
            print(line(number + 1, rows[-options.part * agents :], options), flush=True)
    return rows


def heard(history: list[str], agents: int, rng: np.random.Generator) -> list[str]:
    """What an agent hears of the last rounds: one agent in the order in which it was said, several in any."""
    last = history[-HISTORY * agents :]
    return last if agents == 1 else [last[at] for at in rng.permutation(len(last))]


def run_in_orders(engine: Engine, methods: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the file: the means over all prompts for each method and order."""
    asked, rng = prompts_of_sessions(engine, options), np.random.default_rng(options.seed)
    orders = [np.arange(len(asked)), *(rng.permutation(len(asked)) for _ in range(options.orders - 1))]
    full = [ask(engine, question, prompt, ReuseConfig("full"), keep=False) for question, prompt in asked]
    for method in methods:
        texts = []
        for number, order in enumerate(orders, start=1):
            engine.cache.clear()
            reused = {at: ask(engine, *asked[at], parse_method(method), keep=True) for at in order.tolist()}
            means = mean([figures(asked[at][0], own, full[at]) for at, own in reused.items()])
            print(f"{method}, order {number}: {told(means)}", flush=True)
            yield from rows_of(f"order {number}", method, means)
            texts.append([reused[at].text for at in range(len(asked))])
        same = float(np.mean([len(set(each)) == 1 for each in zip(*texts, strict=True)]))
        print(f"{method}: {same:.2f} of the prompts have the same answer in all orders", flush=True)
        yield from rows_of("all orders", method, {"same answer": same})


def prompts_of_sessions(engine: Engine, options: argparse.Namespace) -> list[tuple[Question, np.ndarray]]:
    """Questions of four sessions, each with other values, and their prompts."""
    rng = np.random.default_rng(options.seed)
    first = make_sample("vt", rng, options.length, options.segments, options.queries)
    asked = []
    for number in range(options.queries):
        if number % max(options.queries // 4, 1) == 0:
            sample = other_values(first, rng)
        asked.append((sample.questions[number], prompt_of(engine, sample, number, [], rng)))
    return asked


def ask(engine: Engine, question: Question, prompt: np.ndarray, reuse: ReuseConfig, keep: bool) -> Answer:
    new_tokens = 2 * len(regimes.encode(engine.tokenizer, question.reference))
    return answers(engine, [prompt], new_tokens, reuse, keep)[0]


def figures(question: Question, reused: Answer, full: Answer) -> dict[str, float]:
    found = 1 - reused.report.fresh_tokens / reused.report.prompt_tokens
    own = {"hit rate": found, "full": scores.task_score(full.text, question.answers)}
    return scores.compare(reused, full, question.answers) | own


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure that is shown."""
    return {name: float(np.mean([row[name] for row in rows])) for name in SHOWN}


def told(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {figure:.3f}" for name, figure in means.items())


def line(number: int, rows: list[dict[str, float]], options: argparse.Namespace) -> str:
    """The means of the last queries up to `number`, as text."""
    return f"{number - options.part + 1:4} to {number:4}: {told(mean(rows))}"


def rows_of(work: str, method: str, means: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"work": f"{work}: {name}", "implementation": method, "figure": round(figure, 5)}
        | {"unit": SHOWN.get(name, "share")}
        for name, figure in means.items()
    ]


def rows_of_parts(rows: list[dict[str, float]], method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the file: the means of each part of the queries."""
    agents, part = options.agents, options.part
    kind = "queries" if agents == 1 else "rounds"
    return [
        row
        for begin in range(0, options.queries, part)
        for row in rows_of(
            f"{kind} {begin + 1} to {begin + part}", method, mean(rows[begin * agents : (begin + part) * agents])
        )
    ]


def drifts(engine: Engine, methods: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method in methods:
        engine.cache.clear()
        yield from rows_of_parts(run(engine, parse_method(method), options), method, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="ruler-tiny", help="a model that can do the task vt")
    add(
        "--method",
        nargs="+",
        default=["sparsex:boundary_layer=0"],
        help="NAME or NAME:FIELD=VALUE:..., as in `sparsex bench quality`",
    )
    add("--queries", type=count, default=200)
    add("--agents", type=count, default=1, help="who ask at once, in a round")
    add("--orders", type=int, default=0, help="in which the same prompts come")
    add("--part", type=count, default=25, help="queries in a line of figures")
    add("--length", type=count, default=1024, help="tokens of the documents together")
    add("--segments", type=count, default=4)
    add("--store-tokens", type=count, default=16384, help="so few that old donors are evicted during the run")
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS, help="the directory of the JSON file")
    add_tensor_parallel(parser)
    options = parser.parse_args()
    sizes = {"dtype": options.dtype, "store_tokens": options.store_tokens, "max_num_seqs": options.agents}
    engine = make_engine(options.model, tensor_parallel=options.tensor_parallel, **sizes)
    bench = "drift-orders" if options.orders else "drift" if options.agents == 1 else "drift-rounds"
    measure = run_in_orders if options.orders else drifts
    about = {"bench": bench, "model": options.model} | results.provenance(options.tensor_parallel)
    results.write_rows(about, measure(engine, options.method, options), options.out)


if __name__ == "__main__":
    run_script(main)
