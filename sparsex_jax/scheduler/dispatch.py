"""Decoding for those who have a first token, a dispatch at a time.

The state stays on the device from one dispatch to the next, unless somebody came, went or got pages meanwhile: then it
is made anew of what the host knows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.generation import decode_state
from sparsex_jax.device.sampling import Sampled
from sparsex_jax.engine import Engine
from sparsex_jax.scheduler.sequence import Task


class Dispatch(NamedTuple):
    """Tokens on their way: whose, at most how many each, where they will be, and since when."""

    tasks: Sequence[Task]
    steps: int
    sampled: Sampled
    started: float


class Dispatcher:
    """Sends dispatches, and fetches what they sampled.

    Attributes:
      step_seconds: what a token of the last dispatch took.
    """

    def __init__(self, engine: Engine) -> None:
        self.step_seconds = 0.0
        self._engine = engine
        self._kept: tuple[DecodeState, list[tuple[int, int, int]]] | None = None

    def start(self, tasks: Sequence[Task], steps: int) -> Dispatch:
        """Send at most so many tokens for each task on their way."""
        started = time.perf_counter()
        kept, self._kept = self._kept, None
        state = kept[0] if kept is not None and kept[1] == _key(tasks, 0) else self._state(tasks)
        state, sampled = self._engine.runner.start_decode(state, steps)
        self._kept = state, _key(tasks, steps)
        return Dispatch(tasks, steps, sampled, started)

    def finish(self, dispatch: Dispatch) -> Sampled:
        """What was sampled, as NumPy arrays, a line for each task."""
        sampled = jax.device_get(dispatch.sampled)
        self.step_seconds = (time.perf_counter() - dispatch.started) / dispatch.steps
        return sampled

    def forget(self) -> None:
        """The store of the kept state is gone."""
        self._kept = None

    def _state(self, tasks: Sequence[Task]) -> DecodeState:
        outputs, prompts, pages = zip(*[(task.output, task.tokens, task.pages) for task in tasks], strict=True)
        shapes, vocab = self._engine.runner.shapes, self._engine.model.vocab_size
        return decode_state(outputs, prompts, pages, shapes.max_pages, vocab)


def _key(tasks: Sequence[Task], ahead: int) -> list[tuple[int, int, int]]:
    """What a decode state was made of, once each task has so many more tokens."""
    return [(task.id, len(task.pages), len(task.output.token_ids) + ahead) for task in tasks]
