"""Measures what prefills take on an engine's devices, for `sparsex_jax.reuse.cost`.

What is timed are the engine's own steps, with its own weights, shapes and kernels, on all of its devices: two layers
for a few numbers of rows, with and without many keys before them; copies; and a prefill without its layers. So
collectives, padding and waits for the host are in the times, and nothing is compiled that prefills do not need.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.device.runner import PrefillRun, Runner
from sparsex_jax.reuse.cost import ChunkTimes, Speeds, mean_keys
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase

_LAYERS = 2  # that a timing runs; the weights of a single one might stay in a processor's cache
_CHUNKS = 8  # of keys before the rows, in the timings with many keys
_CHANGE = 0.05  # a round that makes some time shorter by more than this share is followed by another one
_SECONDS = 3.0  # but no round begins after this time


class Step(NamedTuple):
    """What is timed.

    Attributes:
      name: `layers`; `call`, the call that runs layers, without any; `start`, a prefill without its layers; `copy`;
        `sparse`, a short prefill with a copy and a boundary; or `plain`, the same with neither.
      bucket: the rows that the plan is padded to, and those of a chunk.
      tokens: rows, or tokens that are copied.
      keys: before the rows.
    """

    name: str
    bucket: tuple[int, int]
    tokens: int = 1
    keys: int = 0


def wanted_tokens(runner: Runner) -> int:
    """For how many tokens `measure_speeds` has use for pages."""
    _, (_, chunk) = _buckets(runner)
    return (_CHUNKS + 1) * chunk


def measure_speeds(runner: Runner, pages: Sequence[int]) -> Speeds:
    """Time parts of prefills, round by round, until the times change no more, or for a few seconds.

    A round computes about as much as the prefill of two chunks. Before the first one it compiles what is not compiled
    yet of two plans and two copies, which prefills need too. It needs no memory but theirs.

    Args:
      pages: of the store; what is in them is lost. If they are few, tokens share their slots.
    """
    bench = _Bench(runner, pages)
    small, large = _buckets(runner)
    start, copies = Step("start", small), [Step("copy", small), Step("copy", large, min(large[0], bench.context))]
    layers = [step for bucket in (small, large) for step in bench.chunk_steps(bucket)]
    plain, sparse = Step("plain", small, 2), Step("sparse", small, 2)
    rest = [Step("call", small), start, *copies, plain, sparse]
    seconds = _least({step: bench.timing(step) for step in [*layers, *rest]})
    one, many = (seconds[step] for step in copies)
    token = max(many - one, 0.0) / max(copies[1].tokens - 1, 1)
    return Speeds(
        small=bench.chunk_times(small, seconds),
        large=bench.chunk_times(large, seconds),
        start=seconds[start],
        boundary=max(seconds[sparse] - seconds[plain] - one, 0.0),
        copy=max(one - token, 0.0),
        copied_token=token,
    )


def _buckets(runner: Runner) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the smallest plans, and of larger ones."""
    small, large, *_ = runner.shapes.buckets
    return small, large


def _least(timings: dict[Step, Callable[[], float]]) -> dict[Step, float]:
    """The least seconds that each timing gives. They take turns, so that load from outside slows all alike. The first
    turn, in which they compile, does not count."""
    for timing in timings.values():
        timing()
    least, began, changes = dict.fromkeys(timings, np.inf), time.perf_counter(), True
    while changes:
        before, least = least, {step: min(least[step], timing()) for step, timing in timings.items()}
        changes = any(least[step] < (1 - _CHANGE) * before[step] for step in timings)
        changes &= time.perf_counter() - began < _SECONDS
    return least


def _rising(seconds: Sequence[float]) -> list[float]:
    """Load only adds to a time. So what took longer than more rows did gets the time of those.

    >>> _rising([2.0, 4.0, 3.0, 5.0])
    [2.0, 3.0, 3.0, 5.0]
    """
    return np.minimum.accumulate(np.array(seconds)[::-1])[::-1].tolist()


class _Bench:
    """Single steps on a runner's store, with prompts of token 0.

    Attributes:
      context: tokens that a prompt can have.
    """

    def __init__(self, runner: Runner, pages: Sequence[int]) -> None:
        self._runner, self._page_size = runner, runner.engine.page_size
        self.context = runner.shapes.max_pages * self._page_size
        self._pages = list(itertools.islice(itertools.cycle(pages), runner.shapes.max_pages))
        self._layers = min(_LAYERS, max(runner.model.num_layers - 1, 1))  # the last one would make logits

    def chunk_steps(self, bucket: tuple[int, int]) -> list[Step]:
        """A row, a quarter of a chunk's, and all of them; each without keys before them and, next, with many."""
        _, chunk = bucket
        rows = sorted({min(number, self.context) for number in (1, max(chunk // 4, 1), chunk)})
        return [
            Step("layers", bucket, number, keys)
            for number in rows
            for keys in (0, min(_CHUNKS * chunk, self.context - number))
        ]

    def chunk_times(self, bucket: tuple[int, int], seconds: Mapping[Step, float]) -> ChunkTimes:
        """From the seconds of all steps to those of a layer: what rows take, and what keys add."""
        steps = self.chunk_steps(bucket)
        near, far = (_rising([self._a_layer(step, seconds) for step in part]) for part in (steps[::2], steps[1::2]))
        rows = [step.tokens for step in steps[::2]]
        close, distant = ([self._seen(step) for step in part] for part in (steps[::2], steps[1::2]))
        more = [max(b - a, 1.0) for a, b in zip(close, distant, strict=True)]
        key = [max(b - a, 0.0) / number for a, b, number in zip(near, far, more, strict=True)]
        own = [each * number for each, number in zip(key, close, strict=True)]
        layer = [max(a - attention, 0.0) for a, attention in zip(near, own, strict=True)]
        return ChunkTimes(tuple(rows), tuple(layer), tuple(key))

    def _seen(self, step: Step) -> float:
        """How many keys a tile of the rows reads, on average over the layers that run, which may have windows."""
        positions, windows = step.keys + np.arange(step.tokens), self._runner.model.windows[: self._layers]
        return float(np.mean([mean_keys(positions, window) for window in windows]))

    def _a_layer(self, step: Step, seconds: Mapping[Step, float]) -> float:
        call = min(seconds[other] for other in seconds if other.name == "call")
        return max(seconds[step] - call, 0.0) / self._layers

    def timing(self, step: Step) -> Callable[[], float]:
        """A call that runs the step and returns the seconds until the devices are done with it."""
        prepare = {
            "layers": self._begin_layers,
            "call": self._begin_layers,
            "start": self._begin_all,
            "plain": self._begin_short,
            "sparse": self._begin_short,
            "copy": self._begin_copy,
        }[step.name]

        def timed() -> float:
            with self._runner.padding_to(step.bucket):
                run = prepare(step)
                jax.block_until_ready(self._runner.store)
                began = time.perf_counter()
                jax.block_until_ready((run(), self._runner.store))
                return time.perf_counter() - began

        return timed

    def _begin_layers(self, step: Step) -> Callable[[], Any]:
        run = self._begin(step)
        jax.block_until_ready(run.state)
        return lambda: self._advance(run, self._layers if step.name == "layers" else 0)

    def _begin_all(self, step: Step) -> Callable[[], Any]:
        """A prefill that begins behind its last layer."""

        def prefill() -> Any:
            run = self._begin(step)
            run.next_layer = self._runner.model.num_layers
            run.state = dataclasses.replace(run.state, layer=run.state.layer + np.int32(run.next_layer))
            return self._advance(run, 0)

        return prefill

    def _begin_short(self, step: Step) -> Callable[[], Any]:
        """A prefill of a few layers, from its plan on. A sparse one copies its first token and drops it in layer 1."""
        return lambda: self._advance(self._begin(step), self._layers)

    def _begin_copy(self, step: Step) -> Callable[[], Any]:
        return lambda: self._runner.copy([(self._onto_itself(step.tokens), self._pages)])

    def _onto_itself(self, tokens: int) -> Segment:
        """The first tokens of the pages, as a segment whose copy changes nothing."""
        slots = slots_of(self._pages, np.arange(tokens), self._page_size)
        return Segment(0, tokens, 0, slots, exact=True)

    def _begin(self, step: Step) -> PrefillRun:
        behind = np.arange(step.keys + step.tokens) >= step.keys
        kind = np.where(behind, TokenKind.FRESH, TokenKind.PREFIX).astype(np.uint8)
        sparse = step.name == "sparse"
        kind[:1] = TokenKind.REUSED if sparse else kind[:1]
        prompt = PromptMap(np.zeros(len(kind), np.int32), kind, (self._onto_itself(1),) if sparse else ())
        later = (Phase(1, prompt.fresh, "key_mass"),) if sparse else ()
        phases = (Phase(0, prompt.computed), *later)
        return self._runner.begin([RequestPlan(prompt, phases, self._pages, prompt.segments)])

    def _advance(self, run: PrefillRun, layers: int) -> Any:
        self._runner.advance(run, layers)
        return run.state, run.logits
