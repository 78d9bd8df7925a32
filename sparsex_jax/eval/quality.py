"""The quality bench: reuse methods side by side on the same prompts and the same stored KV.

Every method is asked with `keep=False`, so that none sees what another computed. Methods share samples, and so do
regimes: differences are paired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import metrics, regimes
from sparsex_jax.eval.metrics import UNITS, Answer
from sparsex_jax.eval.tasks import TASKS, Sample, make_sample
from sparsex_jax.methods import find_method
from sparsex_jax.methods.oracle import oracle, true_deviation

Row = dict[str, Any]
Cell = tuple[str, str, int]  # task, regime, sample
ALL_TASKS = "all"  # the task of a summary over several
ORACLE = "oracle"  # knows each prompt's true deviation, so it exists for one prompt at a time
_COIN_LIKE = ("score", "top1", "agreement")


def run(
    engine: Engine,
    methods: Mapping[str, ReuseConfig],
    tasks: Sequence[str],
    in_regimes: Sequence[str],
    num_tokens: int,
    samples: int,
    seed: int = 0,
    *,
    num_segments: int = 4,
    track: Callable[[Sequence[Cell]], Iterable[Cell]] = iter,
) -> list[Row]:
    """Measure all methods: one row for each task, regime, sample and method, as `measure` gives it.

    Args:
      engine: with a tokenizer, and a store that holds each prompt at least twice.
      num_tokens: about so many tokens of body in each prompt.
      track: passes the cells (task, regime, sample) on, and may show how far it is.

    Raises:
      InvalidRequestError: no such method, task or regime, no tokenizer, or a prompt does not fit.
    """
    check(engine, methods, tasks, in_regimes)
    cells = list(itertools.product(tasks, in_regimes, range(samples)))
    return [row for cell in track(cells) for row in measure(engine, methods, cell, num_tokens, seed, num_segments)]


def check(engine: Engine, methods: Mapping[str, ReuseConfig], tasks: Sequence[str], in_regimes: Sequence[str]) -> None:
    """Raise InvalidRequestError for whatever would fail later, maybe after hours."""
    for kind, names, known in (("task", tasks, TASKS), ("regime", in_regimes, regimes.REGIMES)):
        for name in names:
            if name not in known:
                raise InvalidRequestError(f"{kind}={name!r} is unknown; there are: {', '.join(known)}")
    for reuse in methods.values():
        if reuse.method != ORACLE:
            find_method(reuse.method)
    if engine.tokenizer is None:
        raise InvalidRequestError("the tasks are text, but this model has no tokenizer")


def measure(
    engine: Engine,
    methods: Mapping[str, ReuseConfig],
    cell: Cell,
    num_tokens: int,
    seed: int,
    num_segments: int = 4,
) -> list[Row]:
    """One sample: a row for each method, with the figures of `metrics.UNITS`, its text and what was expected."""
    task, regime, index = cell
    rng = np.random.default_rng([seed, TASKS.index(task), index])
    sample = make_sample(task, rng, num_tokens, num_segments, count=lambda text: len(_encode(engine, text)))
    answers = answer_all(engine, methods, sample, regime, f"quality/{task}/{regime}/{seed}/{index}", rng)
    expected = sample.questions[0].answers
    same = {"task": task, "regime": regime, "sample": index, "expected": list(expected)}
    return [
        same | {"method": name, "text": answers[name].text} | metrics.compare(answers[name], answers[""], expected)
        for name in methods
    ]


def answer_all(
    engine: Engine,
    methods: Mapping[str, ReuseConfig],
    sample: Sample,
    regime: str,
    namespace: str,
    rng: np.random.Generator,
) -> dict[str, Answer]:
    """What each method answers to the sample's first question; full recompute, the reference, is under ''."""
    new_tokens = 2 * len(_encode(engine, sample.questions[0].reference)) + 16  # chat models say more than asked
    case = regimes.tokenize(sample, engine.tokenizer)
    case = regimes.prepare(engine, case, regime, namespace, rng, new_tokens)
    full = ReuseConfig("full")
    reference = ask(engine, case.prompt, full, namespace, new_tokens)
    with _oracle(engine, methods, case.prompt, namespace):
        return {"": reference} | {
            name: reference if reuse == full else ask(engine, case.prompt, reuse, namespace, new_tokens)
            for name, reuse in methods.items()
        }


def _oracle(
    engine: Engine, methods: Mapping[str, ReuseConfig], prompt: np.ndarray, namespace: str
) -> AbstractContextManager[Any]:
    """While it is open, the oracle is a method, if it is wanted."""
    if all(reuse.method != ORACLE for reuse in methods.values()):
        return nullcontext()
    return oracle(true_deviation(engine, prompt, namespace), ORACLE)


def ask(engine: Engine, prompt: np.ndarray, reuse: ReuseConfig, namespace: str, new_tokens: int) -> Answer:
    """Greedy continuation and logits. The logits' own prefill comes second: it is the one timed, compiled by then."""
    sampling = SamplingParams(max_new_tokens=new_tokens)
    generated = engine.generate(prompt, sampling, reuse=reuse, namespace=namespace, keep=False)
    prefill = engine.prefill(prompt, reuse=reuse, namespace=namespace, keep=False)
    return Answer(generated.text, generated.token_ids, prefill.logits, prefill.report)


def _encode(engine: Engine, text: str) -> np.ndarray:
    return regimes.encode(engine.tokenizer, text)


# Summaries --------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Means with 95 % intervals, a row for each task, regime, method and metric; over all tasks, if several, as well.

    `loss` is what a method scores less than full recompute on the same samples, where that was among the methods.
    """
    rows = with_loss(rows)
    several = len({row["task"] for row in rows}) > 1
    pooled = [row | {"task": ALL_TASKS} for row in rows] if several else []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in [*rows, *pooled]:
        groups.setdefault((row["task"], row["regime"], row["method"]), []).append(row)
    return [summary for key, group in groups.items() for summary in _summaries(key, group)]


def with_loss(rows: Sequence[Row], reference: str = "full") -> list[Row]:
    """The rows, each with the `loss` against the reference method on the same sample, if that was asked."""
    best = {_cell(row): row["score"] for row in rows if row["method"] == reference}
    return [row | {"loss": best[_cell(row)] - row["score"]} if best else row for row in rows]


def _cell(row: Row) -> Cell:
    return row["task"], row["regime"], row["sample"]


def _summaries(key: tuple[str, str, str], group: Sequence[Row]) -> Iterable[Row]:
    task, regime, method = key
    for metric, unit in {**UNITS, "loss": "share"}.items():
        if metric not in group[0]:
            continue
        values = np.array([row[metric] for row in group], np.float64)
        low, high = wilson_interval(values) if metric in _COIN_LIKE else t_interval(values)
        summary = {"task": task, "regime": regime, "method": method, "metric": metric, "mean": float(values.mean())}
        yield summary | {"low": low, "high": high, "samples": len(values), "unit": unit}


def wilson_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values from 0 to 1, as if each were a coin.

    No distribution on [0, 1] varies more than a coin of the same mean, so for shares it is a wide interval rather
    than a narrow one, and it does not shrink to nothing where all values agree.
    """
    n, mean, z = len(values), float(values.mean()), 1.959964
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; the mean itself for a single value."""
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return mean - half, mean + half
