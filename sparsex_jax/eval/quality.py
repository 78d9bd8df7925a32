"""The quality bench: reuse methods side by side on the same prompts and the same stored KV.

Every method is asked with `keep=False`, so that none sees what another computed. Methods share samples, and so do
regimes: differences are paired.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import metrics, regimes
from sparsex_jax.eval.metrics import UNITS, Answer
from sparsex_jax.eval.oracle import true_deviation
from sparsex_jax.eval.tasks import TASKS, Sample, make_sample
from sparsex_jax.reuse.methods import Full, Oracle

Row = dict[str, Any]
Cell = tuple[str, str, int]  # task, regime, sample
Batch = Sequence[Cell]
ALL_TASKS = "all"  # the task of a summary over several
Z95 = 1.959964  # a normal variable is within so many standard deviations with 95 %
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
    track: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> list[Row]:
    """Measure all methods: one row for each task, regime, sample and method, as `measure` gives it.

    Args:
      engine: with a tokenizer, and a store that holds `max_batch` prompts at least twice.
      num_tokens: about so many tokens of body in each prompt.
      track: passes the batches of cells (task, regime, sample) on, and may show how far it is.

    Raises:
      InvalidRequestError: no such task or regime, no tokenizer, or the prompts do not fit.
    """
    check(engine, tasks, in_regimes)
    batches = batches_of(tasks, in_regimes, samples, engine.config.max_batch)
    return [row for batch in track(batches) for row in measure(engine, methods, batch, num_tokens, seed, num_segments)]


def batches_of(tasks: Sequence[str], in_regimes: Sequence[str], samples: int, max_batch: int) -> list[Batch]:
    """All cells, in batches of one task and regime."""
    return [
        [(task, regime, index) for index in indices]
        for task, regime in itertools.product(tasks, in_regimes)
        for indices in itertools.batched(range(samples), max_batch)
    ]


def check(engine: Engine, tasks: Sequence[str], in_regimes: Sequence[str]) -> None:
    """Raise InvalidRequestError for whatever would fail later, maybe after hours."""
    for kind, names, known in (("task", tasks, TASKS), ("regime", in_regimes, regimes.REGIMES)):
        for name in names:
            if name not in known:
                raise InvalidRequestError(f"{kind}={name!r} is unknown; there are: {', '.join(known)}")
    if engine.tokenizer is None:
        raise InvalidRequestError("the tasks are text, but this model has no tokenizer")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A prompt whose segments a namespace of its own holds, and what is expected of it."""

    prompt: np.ndarray
    namespace: str
    sampling: SamplingParams
    expected: tuple[str, ...]


def measure(
    engine: Engine,
    methods: Mapping[str, ReuseConfig],
    batch: Batch,
    num_tokens: int,
    seed: int,
    num_segments: int = 4,
) -> list[Row]:
    """Some samples: a row for each and each method, with the figures of `metrics.UNITS`, text and what was expected."""
    asked = prepare_batch(engine, batch, num_tokens, seed, num_segments)
    reference, *answers = answer_all(engine, [Full(), *methods.values()], asked)
    return [
        {"task": task, "regime": regime, "sample": index, "expected": list(asked[i].expected)}
        | {"method": name, "text": found[i].text}
        | metrics.compare(found[i], reference[i], asked[i].expected)
        for i, (task, regime, index) in enumerate(batch)
        for name, found in zip(methods, answers, strict=True)
    ]


def prepare_batch(engine: Engine, batch: Batch, num_tokens: int, seed: int, num_segments: int) -> list[Asked]:
    """A batch's prompts, with their segments in the store. The same again, however often it is called."""
    asked = []
    for task, regime, index in batch:
        rng = np.random.default_rng([seed, TASKS.index(task), index])
        sample = _sample(engine, task, rng, num_tokens, num_segments)
        namespace = f"quality/{task}/{regime}/{seed}/{index}"
        examples = _examples(engine, task, num_tokens, num_segments) if regime == "context" else ()
        asked.append(prepare(engine, sample, regime, namespace, rng, share=len(batch), examples=examples))
    return asked


def _examples(engine: Engine, task: str, num_tokens: int, num_segments: int) -> tuple[str, ...]:
    """Segments for the regime `context`: the same for all samples of a task, whatever their seed."""
    return _sample(engine, task, np.random.default_rng(TASKS.index(task)), num_tokens, num_segments).segments


def _sample(engine: Engine, task: str, rng: np.random.Generator, num_tokens: int, num_segments: int) -> Sample:
    return make_sample(task, rng, num_tokens, num_segments, count=lambda text: len(_encode(engine, text)))


def prepare(
    engine: Engine,
    sample: Sample,
    regime: str,
    namespace: str,
    rng: np.random.Generator,
    share: int = 1,
    examples: Sequence[str] = (),
) -> Asked:
    """Ask the sample's first question of segments that came into the store as the regime says.

    Args:
      share: so many samples share the store; each must find room for its donors and its prompt.
      examples: segments of the same kind, which the regime `context` wants.
    """
    question = sample.questions[0]
    new_tokens = 2 * len(_encode(engine, question.reference)) + 16  # chat models say more than asked
    case = regimes.tokenize(sample, engine.tokenizer, examples=examples)
    regimes.check_room(engine, case, new_tokens, share)
    case = regimes.REGIMES[regime](engine, case, namespace, rng)
    return Asked(case.prompt, namespace, SamplingParams(max_new_tokens=new_tokens), question.answers)


def answer_all(engine: Engine, methods: Sequence[ReuseConfig], asked: Sequence[Asked]) -> list[list[Answer]]:
    """What each method answers to each prompt. Equal methods are asked once."""
    found: dict[ReuseConfig, list[Answer]] = {}
    for reuse in methods:
        if reuse not in found:
            found[reuse] = ask_oracle(engine, asked, reuse) if isinstance(reuse, Oracle) else ask(engine, asked, reuse)
    return [found[reuse] for reuse in methods]


def ask_oracle(engine: Engine, asked: Sequence[Asked], reuse: Oracle) -> list[Answer]:
    """The oracle's answers, one prompt after the other: its scores are of one prompt."""
    answers = []
    for one in asked:
        scores = true_deviation(engine, one.prompt, one.namespace)
        answers += ask(engine, [one], dataclasses.replace(reuse, scores=scores))
    return answers


def ask(engine: Engine, asked: Sequence[Asked], reuse: ReuseConfig, *, timed: bool = True) -> list[Answer]:
    """Greedy continuations with the logits of their first tokens, all together; the first prompt may be timed too."""
    generated = engine.generate_batch(
        [one.prompt for one in asked],
        [one.sampling for one in asked],
        namespace=[one.namespace for one in asked],
        reuse=reuse,
        keep=False,
        return_logits=True,
    )
    times = [time_prefill(engine, asked[0], reuse) if timed else None, *[None] * (len(asked) - 1)]
    return [
        Answer(each.text, each.token_ids, np.asarray(each.logits), each.report, ttft)
        for each, ttft in zip(generated, times, strict=True)
    ]


def time_prefill(engine: Engine, asked: Asked, reuse: ReuseConfig) -> float:
    """TTFT of a prompt alone, in seconds. Twice, as the first may have to be compiled."""
    for _ in range(2):
        prefill = engine.prefill(asked.prompt, reuse=reuse, namespace=asked.namespace, keep=False)
    return prefill.report.ttft_s


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
        values = np.array([row[metric] for row in group if metric in row], np.float64)
        if not len(values):
            continue
        low, high = wilson_interval(values) if metric in _COIN_LIKE else t_interval(values)
        summary = {"task": task, "regime": regime, "method": method, "metric": metric, "mean": float(values.mean())}
        yield summary | {"low": low, "high": high, "samples": len(values), "unit": unit}


def wilson_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values from 0 to 1, as if each were a coin.

    No distribution on [0, 1] varies more than a coin of the same mean, so for shares it is a wide interval rather
    than a narrow one, and it does not shrink to nothing where all values agree.
    """
    n, mean, z = len(values), float(values.mean()), Z95
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; the mean itself for a single value."""
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return mean - half, mean + half
