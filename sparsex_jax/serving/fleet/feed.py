"""A replica's digest, kept up to date for routers that ask.

A router asks again and again, with the number of the last update that it has. It gets the deltas behind that one, or a
snapshot where some of them are not known any more. Nothing is computed while nobody asks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator

import numpy as np

from sparsex_jax.routing import Holdings, Position, Sketch, Update
from sparsex_jax.serving.fleet.pages import LEAST_MOST, Journal, Page


class DigestFeed(Journal):
    """Observes a store and the tiers below it, and tells of them in updates. Any thread may ask."""

    def __init__(self, sketch: Sketch, vocab_size: int, num_pages: int, most_deltas: int = 256) -> None:
        """
        Args:
          sketch: the fleet's.
          vocab_size: keys from there on are of adapters, which have another number in each process. They are not told.
          num_pages: of the store.
          most_deltas: who is farther behind gets a snapshot.
        """
        super().__init__(most=max(4 * num_pages, LEAST_MOST))
        self._sketch, self._vocab_size, self._most_deltas = sketch, vocab_size, most_deltas
        self._reading = threading.Lock()
        self._samples: dict[Hashable, tuple[bytes, list[int]]] = {}
        self._begin()

    def _begin(self) -> None:
        self._samples.clear()
        self._holdings = Holdings()
        self._deltas: deque[Update] = deque(maxlen=self._most_deltas)

    def since(self, position: Position) -> list[bytes]:
        """The updates behind a position, in order, as bytes. Empty: nothing changed."""
        with self._reading:
            self._catch_up()
            return [update.to_bytes() for update in self._behind(position)]

    @property
    def num_samples(self) -> int:
        """How many a snapshot would have."""
        with self._reading:
            self._catch_up()
            return self._holdings.num_samples

    def _behind(self, position: Position) -> list[Update]:
        holdings = self._holdings
        first = self._deltas[0].seq if self._deltas else holdings.seq + 1
        if position.epoch == holdings.epoch and first - 1 <= position.seq <= holdings.seq:
            return [update for update in self._deltas if update.seq > position.seq]
        return [holdings.snapshot()]

    def _catch_up(self) -> None:
        is_cleared, pages = self.read()
        if is_cleared:
            self._begin()
        for is_stored, some in _runs(pages):
            if is_stored:
                self._add(some)
            else:
                self._remove(some)
        delta = self._holdings.delta()
        if delta is not None:
            self._deltas.append(delta)

    def _add(self, pages: list[Page]) -> None:
        by_shape: dict[tuple[str, int], list[Page]] = {}
        for page in pages:
            by_shape.setdefault((page.namespace, len(page.before) + len(page.tokens)), []).append(page)
        for (namespace, size), alike in by_shape.items():
            rows = np.frombuffer(b"".join(page.before + page.tokens for page in alike), np.int32).reshape(-1, size // 4)
            tag, is_told = self._sketch.tag(namespace), (rows < self._vocab_size).all(axis=1)
            samples = self._sketch.samples_of_each(rows[is_told], namespace)
            for page, each in zip(
                (page for page, told in zip(alike, is_told, strict=True) if told), samples, strict=True
            ):
                self._samples[page.node] = tag, each.tolist()
                self._holdings.add(tag, each.tolist())

    def _remove(self, pages: list[Page]) -> None:
        for page in pages:
            tag, samples = self._samples.pop(page.node, (b"", []))
            self._holdings.remove(tag, samples)


def _runs(pages: list[Page]) -> Iterator[tuple[bool, list[Page]]]:
    """Pages that came, or went, one after the other."""
    run: list[Page] = []
    for page in pages:
        if run and run[0].is_stored != page.is_stored:
            yield run[0].is_stored, run
            run = []
        run.append(page)
    if run:
        yield run[0].is_stored, run
