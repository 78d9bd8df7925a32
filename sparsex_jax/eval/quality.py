"""The quality bench: compares reuse methods on the same prompts and the same stored KV.

Every method answers with `keep=False`, so that none finds KV which another computed. All methods and regimes get the
same samples, so their differences are paired.
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
from sparsex_jax.eval import regimes, scores
from sparsex_jax.eval.oracle import true_deviation
from sparsex_jax.eval.results import Summary
from sparsex_jax.eval.scores import UNITS, Answer
from sparsex_jax.eval.tasks import TASKS, Sample, make_sample
from sparsex_jax.reuse.methods import Full, Oracle

Row = dict[str, Any]  # the figures of one method on one sample
Cell = tuple[str, str, int]  # task, regime, sample
Batch = Sequence[Cell]
ALL_TASKS = "all"  # the name of a summary over several tasks
Z95 = 1.959964  # 95 % of a normal distribution are within this many standard deviations of its mean
_SHARES = ("score", "top1", "agreement")


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
    """Measure all methods: a row, as `measure` gives it, for each task, regime, sample and method.

    Args:
      engine: has a tokenizer, and a store that holds `max_prefill_seqs` prompts at least twice.
      methods: by the names they have in the rows.
      num_tokens: tokens of body in each prompt, about.
      samples: prompts for each task and regime.
      num_segments: segments of each body.
      track: gets the batches and yields them again. It may show the progress.

    Raises:
      InvalidRequestError: a task or regime is unknown, the model has no tokenizer, or the prompts do not fit
        into the store.
    """
    check(engine, tasks, in_regimes)
    batches = batches_of(tasks, in_regimes, samples, engine.config.max_prefill_seqs)
    return [row for batch in track(batches) for row in measure(engine, methods, batch, num_tokens, seed, num_segments)]


def batches_of(tasks: Sequence[str], in_regimes: Sequence[str], samples: int, batch_size: int) -> list[Batch]:
    """All cells, in batches of at most `batch_size` cells of one task and regime."""
    return [
        [(task, regime, index) for index in indices]
        for task, regime in itertools.product(tasks, in_regimes)
        for indices in itertools.batched(range(samples), batch_size)
    ]


def check(engine: Engine, tasks: Sequence[str], in_regimes: Sequence[str]) -> None:
    """Raise InvalidRequestError now for names that are unknown, and not hours later in the run."""
    for field, names, known in (("task", tasks, TASKS), ("regime", in_regimes, regimes.REGIMES)):
        for name in names:
            if name not in known:
                raise InvalidRequestError(f"{field}={name!r} is unknown; there are: {', '.join(known)}")
    if engine.tokenizer is None:
        raise InvalidRequestError("the tasks are text, but this model has no tokenizer")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt whose segments are in the store.

    Attributes:
      prompt: token ids, int32.
      namespace: the prompt's own; it has the prompt's segments and nothing else.
      sampling: greedy, with room for the expected answer.
      expected: the strings that a right answer contains.
    """

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
    """Measure a batch of samples.

    Returns:
      A row for each sample and method, with the figures of `scores.UNITS`, the answer's text and the expected strings.
    """
    prepared = prepare_batch(engine, batch, num_tokens, seed, num_segments)
    reference, *answers = answer_all(engine, [Full(), *methods.values()], prepared)
    return [
        {"task": task, "regime": regime, "sample": index, "expected": list(prepared[i].expected)}
        | {"method": name, "text": found[i].text}
        | scores.compare(found[i], reference[i], prepared[i].expected)
        for i, (task, regime, index) in enumerate(batch)
        for name, found in zip(methods, answers, strict=True)
    ]


def prepare_batch(engine: Engine, batch: Batch, num_tokens: int, seed: int, num_segments: int) -> list[PreparedPrompt]:
    """Make a batch's prompts and store their segments. Every call with the same seed makes the same prompts."""
    prepared = []
    for task, regime, index in batch:
        rng = np.random.default_rng([seed, TASKS.index(task), index])
        sample = _sample(engine, task, rng, num_tokens, num_segments)
        namespace = f"quality/{task}/{regime}/{seed}/{index}"
        examples = _examples(engine, task, num_tokens, num_segments) if regime == "context" else ()
        prepared.append(prepare(engine, sample, regime, namespace, rng, share=len(batch), examples=examples))
    return prepared


def _examples(engine: Engine, task: str, num_tokens: int, num_segments: int) -> tuple[str, ...]:
    """The segments that the regime `context` stores first: the same for all samples of a task and all seeds."""
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
) -> PreparedPrompt:
    """Store a sample's segments as the regime says, and make the prompt that asks its first question.

    Args:
      share: how many samples share the store. Each must have room for its donors and its prompt.
      examples: segments of other samples of the task, for the regime `context`.
    """
    question = sample.questions[0]
    new_tokens = 2 * len(_encode(engine, question.reference)) + 16  # chat models answer at more length
    case = regimes.tokenize(sample, engine.tokenizer, examples=examples)
    regimes.check_room(engine, case, new_tokens, share)
    case = regimes.REGIMES[regime](engine, case, namespace, rng)
    return PreparedPrompt(case.prompt, namespace, SamplingParams(max_new_tokens=new_tokens), question.answers)


def answer_all(
    engine: Engine, methods: Sequence[ReuseConfig], prepared: Sequence[PreparedPrompt]
) -> list[list[Answer]]:
    """For each method, its answers to all prompts. Equal methods run once."""
    found: dict[ReuseConfig, list[Answer]] = {}
    for reuse in methods:
        if reuse not in found:
            if isinstance(reuse, Oracle):
                found[reuse] = answer_with_oracle(engine, prepared, reuse)
            else:
                found[reuse] = answer(engine, prepared, reuse)
    return [found[reuse] for reuse in methods]


def answer_with_oracle(engine: Engine, prepared: Sequence[PreparedPrompt], reuse: Oracle) -> list[Answer]:
    """As `answer`, one prompt after the other, each with the scores of its own true deviation."""
    answers = []
    for one in prepared:
        deviation = true_deviation(engine, one.prompt, one.namespace)
        answers += answer(engine, [one], dataclasses.replace(reuse, scores=deviation))
    return answers


def answer(
    engine: Engine, prepared: Sequence[PreparedPrompt], reuse: ReuseConfig, *, timed: bool = True
) -> list[Answer]:
    """Greedy answers to all prompts in one batch, with the logits of their first tokens. What is found is reused,
    whether that is faster or not.

    Args:
      timed: prefill the first prompt alone as well, to measure its TTFT.
    """
    generated = engine.generate_batch(
        [one.prompt for one in prepared],
        [one.sampling for one in prepared],
        namespace=[one.namespace for one in prepared],
        reuse=reuse.updated(only_if_faster=False),
        keep=False,
        return_logits=True,
    )
    times = [time_prefill(engine, prepared[0], reuse) if timed else None, *[None] * (len(prepared) - 1)]
    return [
        Answer(each.text, each.token_ids, np.asarray(each.logits), each.report, ttft)
        for each, ttft in zip(generated, times, strict=True)
    ]


def time_prefill(engine: Engine, prepared: PreparedPrompt, reuse: ReuseConfig) -> float:
    """The TTFT of a prompt alone, in seconds. It is prefilled twice, because the first time may include compiling."""
    reuse = reuse.updated(only_if_faster=False)
    for _ in range(2):
        prefill = engine.prefill(prepared.prompt, reuse=reuse, namespace=prepared.namespace, keep=False)
    return prefill.report.ttft_s


def _encode(engine: Engine, text: str) -> np.ndarray:
    return regimes.encode(engine.tokenizer, text)


# Summaries --------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Means with 95 % intervals: a summary for each task, regime, method and metric.

    If there are several tasks, the task `all` summarises the rows of all of them. The metric `loss` is how much less a
    method scores than full recompute on the same samples; it is there only if full recompute was measured.
    """
    rows = with_loss(rows)
    several = len({row["task"] for row in rows}) > 1
    pooled = [row | {"task": ALL_TASKS} for row in rows] if several else []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in [*rows, *pooled]:
        groups.setdefault((row["task"], row["regime"], row["method"]), []).append(row)
    return [summary for key, group in groups.items() for summary in _summaries(key, group)]


def with_loss(rows: Sequence[Row], reference: str = "full") -> list[Row]:
    """The rows, each with its `loss` against the reference method on the same sample, if that was measured."""
    best = {_cell(row): row["score"] for row in rows if row["method"] == reference}
    return [row | {"loss": best[_cell(row)] - row["score"]} if best else row for row in rows]


def _cell(row: Row) -> Cell:
    return row["task"], row["regime"], row["sample"]


def _summaries(key: tuple[str, str, str], group: Sequence[Row]) -> Iterable[Summary]:
    task, regime, method = key
    for metric, unit in {**UNITS, "loss": "share"}.items():
        values = np.array([row[metric] for row in group if metric in row], np.float64)
        if not len(values):
            continue
        low, high = wilson_interval(values) if metric in _SHARES else t_interval(values)
        summary = {"task": task, "regime": regime, "method": method, "metric": metric, "mean": float(values.mean())}
        yield summary | {"low": low, "high": high, "samples": len(values), "unit": unit}


def wilson_interval(values: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of values from 0 to 1, which treats each value as a coin toss.

    No distribution on [0, 1] has a larger variance than a coin toss of the same mean. So for shares the interval is
    too wide rather than too narrow, and it does not shrink to a point where all values are equal.
    """
    n, mean, z = len(values), float(values.mean()), Z95
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. For a single value, both ends are that value."""
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return mean - half, mean + half
