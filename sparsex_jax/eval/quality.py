"""The quality bench: compares reuse methods on the same prompts and the same stored KV.

Every method answers with `keep=False`, so that none finds KV which another computed. All methods and regimes get the
same samples, so their differences are paired. The first token of each prompt is timed alone, by all methods in turn, so
that their times are from the same minutes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import regimes, scores
from sparsex_jax.eval.engines import settled
from sparsex_jax.eval.flops import flops_fraction
from sparsex_jax.eval.oracle import true_deviation
from sparsex_jax.eval.regimes import Regime
from sparsex_jax.eval.reorder import Reorder
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.eval.samples import Sample
from sparsex_jax.eval.scores import Answer
from sparsex_jax.eval.summaries import Cell, Row
from sparsex_jax.eval.tasks import STRANGERS, TASKS, make_sample
from sparsex_jax.reuse.methods import Full, Oracle

Batch = Sequence[Cell]
FULL = Full()


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
    log: RowLog | None = None,
) -> list[Row]:
    """Measure all methods: a row, as `measure` gives it, for each task, regime, sample and method.

    Args:
      engine: has a tokenizer, and a store that holds `max_prefill_seqs` prompts at least twice.
      methods: by the names they have in the rows.
      num_tokens: tokens of body in each prompt, about.
      samples: prompts for each task and regime.
      num_segments: segments of each body.
      track: gets the batches and yields them again. It may show the progress.
      log: gets the rows as they come. What it has already is not measured again.

    Raises:
      InvalidRequestError: a task or regime is unknown, the model has no tokenizer, or the prompts do not fit
        into the store.
    """
    check(engine, tasks, in_regimes)
    log = RowLog() if log is None else log
    batches = batches_of(tasks, in_regimes, samples, engine.config.max_prefill_seqs)
    for batch in track(batches):
        cells, names = log.missing(batch, list(methods))
        if cells:
            asked = {name: methods[name] for name in names}
            log.add(measure(engine, asked, cells, num_tokens, seed, num_segments))
    return log.of(itertools.chain.from_iterable(batches), list(methods))


def batches_of(tasks: Sequence[str], in_regimes: Sequence[str], samples: int, batch_size: int) -> list[Batch]:
    """All cells, in batches of at most `batch_size` cells of one task and regime."""
    return [
        [(task, regime, index) for index in indices]
        for task, regime in itertools.product(tasks, in_regimes)
        for indices in itertools.batched(range(samples), batch_size)
    ]


def check(engine: Engine, tasks: Sequence[str], in_regimes: Sequence[str]) -> None:
    """Raise InvalidRequestError now for names that are unknown, and not hours later in the run."""
    for task in tasks:
        if task not in TASKS:
            raise InvalidRequestError(f"task={task!r} is unknown; there are: {', '.join(TASKS)}")
    for regime in in_regimes:
        Regime.parse(regime)
    if engine.tokenizer is None:
        raise InvalidRequestError("the tasks are text, but this model has no tokenizer")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt whose segments are in the store.

    Attributes:
      prompt: token ids, int32.
      reordered: the prompt with its segments in the order of an earlier one that began alike, int32.
      namespace: the prompt's own; it has the prompt's segments and nothing else.
      sampling: greedy, with room for the expected answer.
      expected: the strings that a right answer contains.
    """

    prompt: np.ndarray
    reordered: np.ndarray
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
    asked = {reuse: asks(engine, prepared, reuse) for reuse in (FULL, *methods.values())}
    answers = {reuse: answer(engine, some) for reuse, some in asked.items()}
    rows = []
    for i, (task, regime, index) in enumerate(batch):
        times = time_in_turn(engine, {reuse: some[i] for reuse, some in asked.items()}, index)
        for name, reuse in methods.items():
            found, full = (dataclasses.replace(answers[one][i], ttft_s=times[one]) for one in (reuse, FULL))
            row = {"task": task, "regime": regime, "sample": index, "expected": list(prepared[i].expected)}
            figures = scores.compare(found, full, prepared[i].expected)
            figures["flops_fraction"] = flops_fraction(engine.model, asked[reuse][i].reuse, found.report)
            rows.append(row | {"method": name, "text": found.text} | figures)
    return rows


def prepare_batch(engine: Engine, batch: Batch, num_tokens: int, seed: int, num_segments: int) -> list[PreparedPrompt]:
    """Make a batch's prompts and store their segments. Every call with the same seed makes the same prompts."""
    prepared = []
    for task, name, index in batch:
        rng = np.random.default_rng([seed, TASKS.index(task), index])
        sample = _sample(engine, task, rng, num_tokens, num_segments)
        namespace, regime = f"quality/{task}/{name}/{seed}/{index}", Regime.parse(name)
        examples = _examples(engine, task, regime, num_tokens, num_segments)
        prepared.append(prepare(engine, sample, regime, namespace, rng, share=len(batch), examples=examples))
    return prepared


def _examples(engine: Engine, task: str, regime: Regime, num_tokens: int, num_segments: int) -> list[str]:
    """The segments that a regime stores first: the same for all samples of a task and all seeds."""
    other = STRANGERS[task] if regime.kind == "strangers" else task
    rng, number = np.random.default_rng(TASKS.index(other)), regime.num_examples(num_segments)
    found: list[str] = []
    while len(found) < number:
        found += _sample(engine, other, rng, num_tokens, num_segments).segments
    return found[:number]


def _sample(engine: Engine, task: str, rng: np.random.Generator, num_tokens: int, num_segments: int) -> Sample:
    return make_sample(task, rng, num_tokens, num_segments, count=lambda text: len(_encode(engine, text)))


def prepare(
    engine: Engine,
    sample: Sample,
    regime: Regime,
    namespace: str,
    rng: np.random.Generator,
    share: int = 1,
    examples: Sequence[str] = (),
) -> PreparedPrompt:
    """Store a sample's segments as the regime says, and make the prompt that asks its first question.

    Args:
      share: how many samples share the store. Each must have room for its donors and its prompt.
      examples: segments of other samples, for the regimes `company` and `strangers`.
    """
    question = sample.questions[0]
    new_tokens = 2 * len(_encode(engine, question.reference)) + 16  # chat models answer at more length
    case = regimes.tokenize(sample, engine.tokenizer, examples=examples)
    regimes.check_room(engine, case, new_tokens, share)
    case = regime.store(engine, case, namespace, rng)
    sampling = SamplingParams(max_new_tokens=new_tokens)
    return PreparedPrompt(case.prompt, case.reordered, namespace, sampling, question.answers)


class Ask(NamedTuple):
    """What a method is asked: a prompt of its own, if it changes prompts, with options of its own for each prompt."""

    tokens: np.ndarray
    prepared: PreparedPrompt
    reuse: ReuseConfig


def asks(engine: Engine, prepared: Sequence[PreparedPrompt], reuse: ReuseConfig) -> list[Ask]:
    """What a method is asked for each prompt. What is found is reused, whether that is faster or not."""
    reuse = reuse.updated(only_if_faster=False)
    if isinstance(reuse, Reorder):
        return [Ask(one.reordered, one, reuse) for one in prepared]
    if isinstance(reuse, Oracle):
        found = [true_deviation(engine, one.prompt, one.namespace) for one in prepared]
        own = [dataclasses.replace(reuse, scores=each) for each in found]
        return [Ask(one.prompt, one, each) for one, each in zip(prepared, own, strict=True)]
    return [Ask(one.prompt, one, reuse) for one in prepared]


def answer(engine: Engine, asked: Sequence[Ask]) -> list[Answer]:
    """Greedy answers to all prompts, with the logits of their first tokens: those of the same options in one batch."""
    answers: list[Answer] = []
    for reuse, same in itertools.groupby(asked, lambda each: each.reuse):
        group = list(same)
        generated = engine.generate_batch(
            [each.tokens for each in group],
            [each.prepared.sampling for each in group],
            namespace=[each.prepared.namespace for each in group],
            reuse=reuse,
            keep=False,
            return_logits=True,
        )
        answers += [Answer(out.text, out.token_ids, np.asarray(out.logits), out.report) for out in generated]
    return answers


def time_in_turn(engine: Engine, asked: Mapping[ReuseConfig, Ask], turn: int) -> dict[ReuseConfig, float]:
    """The TTFT of one prompt alone by each method, in seconds, one after the other. Each turn another one is first."""
    order = list(asked)
    first = turn % len(order)
    return {reuse: time_alone(engine, asked[reuse]) for reuse in order[first:] + order[:first]}


def time_alone(engine: Engine, asked: Ask) -> float:
    """The TTFT of a prompt alone, in seconds. It is prefilled again if something was compiled meanwhile."""

    def prefill() -> float:
        out = engine.prefill(asked.tokens, reuse=asked.reuse, namespace=asked.prepared.namespace, keep=False)
        return out.report.ttft_s

    return settled(prefill, asked.reuse.method)


def _encode(engine: Engine, text: str) -> np.ndarray:
    return regimes.encode(engine.tokenizer, text)
