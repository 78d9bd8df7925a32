"""Measures what prefills take on an engine's devices, for `sparsex_jax.reuse.cost`.

What is timed are the engine's own steps, with its own weights, shapes and kernels, on all of its devices: two layers
for a few numbers of rows, with and without many keys before them; copies; and a prefill without its layers. So
collectives, padding and waits for the host are in the times, and nothing is compiled that prefills do not need.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.device.runner import PrefillRun, Runner
from sparsex_jax.reuse.cost import Speeds, mean_keys
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase

_LAYERS = 2  # that a timing runs; the weights of a single one might stay in a processor's cache
_CHUNKS = 8  # of keys before the rows in the timings with many keys
_ROUNDS = 3  # timings of each kind at least
_SECONDS = 1.0  # no further round begins after this time

# What is timed: a step, the tokens that it is for, and the keys before them.
Kind = tuple[str, int, int]


def wanted_tokens(runner: Runner) -> int:
    """For how many tokens `measure_speeds` has use for pages."""
    return (_CHUNKS + 2) * runner.shapes.chunk


def measure_speeds(runner: Runner, pages: Sequence[int]) -> Speeds:
    """Time parts of prefills, for about a second and three times each at least; the fastest times count.

    It takes about as long as prefilling ten chunks, and before that it compiles what is not compiled yet of two plans
    and two copies, which prefills need too. It needs no memory but theirs.

    Args:
      pages: of the store; what is in them is lost. If they are few, tokens share their slots.
    """
    bench = _Bench(runner, pages)
    rows, copied = bench.row_counts(), bench.copied()
    seconds = _fastest({kind: bench.step(*kind) for kind in bench.kinds()})
    passed = seconds["dispatch", 1, 0]
    near = _rising([(seconds["layers", n, 0] - passed) / bench.layers for n in rows])
    far = _rising([(seconds["layers", n, bench.keys_before(n)] - passed) / bench.layers for n in rows])
    key = [max(more - few, 0) / max(bench.keys_before(n), 1) for n, few, more in zip(rows, near, far, strict=True)]
    layer = [max(few - each * mean_keys(np.arange(n)), 0) for n, few, each in zip(rows, near, key, strict=True)]
    small, large = (seconds["copy", n, 0] for n in copied)
    token = max(large - small, 0) / max(copied[1] - copied[0], 1)
    start = seconds["start", 1, 0]
    return Speeds(runner.shapes.chunk, rows, tuple(layer), tuple(key), start, max(small - token, 0), token)


def _rising(seconds: Sequence[float]) -> list[float]:
    """Load only adds to a time, so what took longer than more rows did is corrected to their time.

    >>> _rising([2.0, 4.0, 3.0, 5.0])
    [2.0, 3.0, 3.0, 5.0]
    """
    return np.minimum.accumulate(np.array(seconds)[::-1])[::-1].tolist()


def _fastest(steps: dict[Kind, Callable[[], float]]) -> dict[Kind, float]:
    """The least seconds that each step said it took. The steps take turns, so that load slows all alike; the first
    turn, in which they compile, does not count."""
    for step in steps.values():
        step()
    least, began = dict.fromkeys(steps, float("inf")), time.perf_counter()
    for turn in itertools.count(1):
        least = {kind: min(least[kind], step()) for kind, step in steps.items()}
        if turn >= _ROUNDS and time.perf_counter() - began > _SECONDS:
            return least
    raise AssertionError("unreachable")


class _Bench:
    """Single steps on a runner's store, with prompts of token 0."""

    def __init__(self, runner: Runner, pages: Sequence[int]) -> None:
        self._runner, self._shapes = runner, runner.shapes
        self._pages = list(itertools.islice(itertools.cycle(pages), self._shapes.max_pages))
        self._context = min(self._shapes.max_pages * runner.engine.page_size, runner.model.max_position)
        self.layers = min(_LAYERS, max(runner.model.num_layers - 1, 1))  # the last one would make logits

    def row_counts(self) -> tuple[int, ...]:
        """Where the time of a layer may bend or jump: within the smallest plan, behind it, and around a chunk."""
        few, chunk = self._shapes.buckets[0][0], self._shapes.chunk
        counts = {1, few // 4, few, few + 1, chunk, chunk + 1, 2 * chunk}
        return tuple(sorted(n for n in counts if 1 <= n <= self._context))

    def copied(self) -> tuple[int, int]:
        return 1, min(4 * self._shapes.chunk, self._context)

    def keys_before(self, rows: int) -> int:
        """How many keys stand before these rows in a timing with many."""
        return min(_CHUNKS * self._shapes.chunk, self._context - rows)

    def kinds(self) -> list[Kind]:
        layers = [("layers", n, keys) for n in self.row_counts() for keys in {0, self.keys_before(n)}]
        return [*layers, *(("copy", n, 0) for n in self.copied()), ("dispatch", 1, 0), ("start", 1, 0)]

    def step(self, name: str, tokens: int, keys: int) -> Callable[[], float]:
        """A call that runs a step once and returns the seconds that it took."""
        step = {"layers": self._layers, "copy": self._copy, "dispatch": self._no_layer, "start": self._start}[name]
        return functools.partial(step, tokens, keys)

    def _layers(self, rows: int, keys: int) -> float:
        return self._advanced(self._begin(rows, keys), self.layers)

    def _no_layer(self, rows: int, keys: int) -> float:
        return self._advanced(self._begin(rows, keys), 0)

    def _advanced(self, run: PrefillRun, layers: int) -> float:
        jax.block_until_ready((self._runner.store, run.state))
        began = time.perf_counter()
        self._runner.advance(run, layers)
        return self._done(began, run)

    def _start(self, rows: int, keys: int) -> float:
        """A prefill that begins behind its last layer."""
        jax.block_until_ready(self._runner.store)
        began = time.perf_counter()
        run = self._begin(rows, keys)
        run.next_layer = self._runner.model.num_layers
        run.state = dataclasses.replace(run.state, layer=run.state.layer + np.int32(run.next_layer))
        self._runner.advance(run)
        return self._done(began, run)

    def _copy(self, tokens: int, keys: int) -> float:
        """Each token is copied onto itself."""
        jax.block_until_ready(self._runner.store)
        slots = slots_of(self._pages, np.arange(tokens), self._runner.engine.page_size)
        began = time.perf_counter()
        self._runner.copy([(Segment(0, tokens, 0, slots, exact=True), self._pages)])
        return self._done(began)

    def _begin(self, rows: int, keys: int) -> PrefillRun:
        kind = np.where(np.arange(keys + rows) < keys, TokenKind.PREFIX, TokenKind.FRESH).astype(np.uint8)
        prompt = PromptMap(np.zeros(len(kind), np.int32), kind)
        return self._runner.begin([RequestPlan(prompt, (Phase(0, prompt.computed),), self._pages)])

    def _done(self, began: float, run: PrefillRun | None = None) -> float:
        jax.block_until_ready((self._runner.store, run and (run.state, run.logits)))
        return time.perf_counter() - began
