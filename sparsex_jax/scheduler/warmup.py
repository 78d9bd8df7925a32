"""Compiling before anybody waits for it: every program that requests need which reuse as the server does by default.

Programs depend on shapes and signals and never on values (README, "One prompt's path"), so a token or two compile each:

    for each row bucket   the alignment, the plain prefill, and one for each set of signals that plans of the default
                          method can have
    for 1, 2, 4 ...       the decode of so many requests together

Requests that name another method with signals of its own, log-probabilities, penalties or biases compile what they
need when they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.reuse.methods import Phase, method_of
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.scheduler.loop import Loop
from sparsex_jax.scheduler.sequence import Event

_NAMESPACE = "warm-up"
_FULL = ReuseConfig(method="full")


def steps(engine: Engine) -> list[Callable[[], None]]:
    """Calls that compile a few programs each. They leave nothing in the store. Call them before the loop runs."""
    prefills = [
        functools.partial(_prefill, engine, bucket, later)
        for bucket in engine.runner.shapes.buckets
        for later in [(), *_later_phases(engine)]
    ]
    return [*prefills, *(functools.partial(_decode, engine, number) for number in _batches(engine.config.max_batch))]


def _batches(most: int) -> list[int]:
    """A number of requests for each power of two that a batch is padded to: 1, 2, 4, 6 for a most of 6."""
    return [min(1 << power, most) for power in range((most - 1).bit_length() + 1)]


def _later_phases(engine: Engine) -> list[tuple[Phase, ...]]:
    """What may follow a plan's first phase, once for each tuple of signals: a plan leaves out what narrows nothing."""
    num_layers = engine.model.num_layers
    schedule = method_of(engine.reuse).phases(_prompt(2), num_layers)
    later = [phase for phase in schedule[1:] if phase.start < num_layers]
    subsets = itertools.chain.from_iterable(itertools.combinations(later, size) for size in range(1, len(later) + 1))
    return list({tuple(phase.signal for phase in phases): phases for phases in subsets}.values())


def _prompt(length: int) -> PromptMap:
    """Reused tokens, and a fresh one behind them."""
    kind = np.full(length, TokenKind.REUSED, np.uint8)
    kind[-1] = TokenKind.FRESH
    return PromptMap(np.zeros(length, np.int32), kind)


def _prefill(engine: Engine, bucket: tuple[int, int], later: Sequence[Phase]) -> None:
    """A plan of one request in this bucket: each phase computes a token less than the one before it."""
    length = len(later) + 1
    prompt = _prompt(length)
    phases = [Phase(0, prompt.computed)]
    for number, phase in enumerate(later, start=1):
        forced = np.arange(length) >= number
        phases.append(Phase(phase.start, forced, phase.signal, scores=phase.scores, probe_layers=phase.probe_layers))
    with engine.admitted([prompt.tokens], [], _FULL, [_NAMESPACE]) as [request], _only(engine, bucket):
        pages = request.plan.pages
        copied = Segment(0, length, 0, slots_of(pages, np.arange(length), engine.config.page_size), exact=True)
        engine.runner.prefill([RequestPlan(prompt, tuple(phases), pages, (copied,))])


@contextlib.contextmanager
def _only(engine: Engine, bucket: tuple[int, int]) -> Iterator[None]:
    """Plans are padded to this bucket, however few rows they have."""
    shapes = engine.runner.shapes
    engine.runner.shapes = dataclasses.replace(shapes, buckets=(bucket,))
    try:
        yield
    finally:
        engine.runner.shapes = shapes


def _decode(engine: Engine, number: int) -> None:
    """So many requests together, through a loop as the server's: a prefill and a dispatch."""
    loop, events = Loop(engine), list[Event]()
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    for _ in range(number):
        loop.submit([0], sampling, reuse=_FULL, namespace=_NAMESPACE, keep=False, listener=events.append)
    while loop.step():
        pass
    for event in events:
        if event.error is not None:
            raise event.error
