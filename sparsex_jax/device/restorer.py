"""Restores stored prefixes: loads run on the link while the devices compute, and each side takes over from the other.

    restoration = restorer.begin(tokens, pages, chunks)
    while not restoration.done:         # between two turns, others decode
        restorer.pump()

A turn dispatches loads first, since a load runs beside compute only if it was dispatched before it; then it computes a
step and looks what has arrived. The staircase (`sparsex_jax.reuse.staircase`) is where both sides should meet. Where
they meet in fact is decided turn by turn: if nothing is left to compute and loads are late, the first missing chunk is
computed; if nothing is left to load, the link takes what would be computed last. A link that stops is overtaken so.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int32

from sparsex_jax.device.link import IN_FLIGHT_BYTES, Link
from sparsex_jax.device.restoration import Chunk, Restoration, Step
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.traffic import Flight, Traffic
from sparsex_jax.errors import LinkError
from sparsex_jax.reuse.pace import Pace
from sparsex_jax.reuse.staircase import Costs, plan_heights

_LOAD_SECONDS = 0.01  # of the groups of a chunk that are loaded together
_WITHIN = 0.01  # of the best plan
_POLL = 2e-4  # seconds
_MARGIN = 1.1  # times longer than predicted; what is gained only if the predictions are better than that is not tried
# Loads alone, if they take no more than so many times what both sides together would. A step that is computed makes the
# host wait, and the link with it: on an H200, 32K tokens of an 8B model took 82 ms loaded and 170 with some computed.
_WORTH = 1.2


class Restorer:
    """Restores any number of prefixes, which share the devices and the link.

    The link serves the one that lacks most, the devices take turns (CacheFlow, arXiv 2604.25080).

    Attributes:
      pace: what loads and compute take.
      active: what is being restored.
      traffic: what is on the link.
    """

    def __init__(
        self,
        runner: Runner,
        link: Link,
        pace: Pace,
        *,
        in_flight_bytes: int = IN_FLIGHT_BYTES,
        turn_seconds: float = 0.03,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
          in_flight_bytes: no load begins while more than this is on the link; it takes memory of the devices.
          turn_seconds: what a turn computes should take, but it computes a group of layers at least.
        """
        self._runner, self._link, self.pace = runner, link, pace
        self._in_flight_bytes, self._turn_seconds = in_flight_bytes, turn_seconds
        self._clock, self._sleep = clock, sleep
        self.active: list[Restoration] = []
        self.traffic: Traffic[Restoration] = Traffic(link, pace, clock)
        self._supplied_at = 0.0  # when the last block came into host memory
        self._coming = 0  # blocks that come into host memory
        self._turns, self._losses = 0, runner.losses

    # From outside -------------------------------------------------------------------------------------------

    def begin(self, tokens: Int32[np.ndarray, "tokens"], pages: Sequence[int], chunks: Sequence[Chunk]) -> Restoration:
        """Plan how to restore a prefix, and dispatch its first loads.

        Args:
          tokens: the whole prefix, from position 0 on.
          pages: of all its tokens, held by the caller until it is done or cancelled. Those before the first chunk are
            exact and in the store; the others are the caller's own.
          chunks: what is to be restored, one behind the other, up to the last token.

        Raises:
          ValueError: the chunks do not follow each other, or do not end where the tokens do.
        """
        _check_chunks(chunks, len(tokens), self._runner.engine.page_size)
        self._end_if_lost()
        self._collect()  # what has arrived long ago says nothing of the link
        if not self.active and not self.traffic.flights:
            self.pace.compute.forget()
            self.pace.link.forget()
        restoration = Restoration(tokens, pages, chunks, *self._predictions(chunks))
        self._plan(restoration)
        self.active.append(restoration)
        self._supplied_at = self._clock()
        self._note_supply()
        self._load()
        return restoration

    def cancel(self, restoration: Restoration) -> None:
        """Stop. Nothing is written to its pages by what is dispatched from now on. Idempotent."""
        if restoration in self.active:
            self._end(restoration)

    def _end_if_lost(self) -> None:
        """Stop all if the store was lost: the cells that were in it are gone."""
        if self._losses != self._runner.losses:
            self._losses = self._runner.losses
            for restoration in list(self.active):
                self._end(restoration)

    def pump(self, wait: float = 0.0) -> bool:
        """A turn: place what has arrived, keep the link busy, and compute a step. It returns when that is computed.

        A restoration that fails ends with its `error`. If the runner lost the store since, all end without being done.

        Args:
          wait: with nothing to compute, for how many seconds to wait for loads.

        Returns:
          Whether anything is still being restored.
        """
        self._end_if_lost()
        self._note_supply()
        self._collect()
        self._load()
        chosen = self._next_step()
        if chosen is not None:
            self._compute(*chosen)
        elif self.active:
            self._wait(wait)
        self._collect()
        self._load()
        return bool(self.active)

    # The plan -----------------------------------------------------------------------------------------------

    def _predictions(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """For each cell, the seconds that computing it takes, and about how many bytes are loaded for it."""
        spans, layers = [(chunk.start, chunk.end) for chunk in chunks], [len(group) for group in self._link.layers]
        shares, windows = np.array(layers) / sum(layers), self._runner.model.windows
        groups = [[windows[layer] for layer in group] for group in self._link.layers]
        return self.pace.predicted_cells(spans, groups), np.outer(shares, [self._block_bytes(one) for one in chunks])

    def _block_bytes(self, chunk: Chunk) -> int:
        block = chunk.in_memory()
        if block is not None:
            return block.nbytes
        return self._link.block_bytes(-(-(chunk.end - chunk.start) // self._runner.engine.page_size))

    def _plan(self, restoration: Restoration) -> None:
        """How high each chunk is computed, behind what the devices and the link are to do already."""
        costs = Costs(self.pace.compute.value * restoration.predicted, self._load_costs(restoration))
        load_busy = self._seconds_to_wait()
        height, expected = plan_heights(
            costs, compute_busy=self._seconds_to_compute(), load_busy=load_busy, within=_WITHIN
        )
        loads_alone = load_busy + float(costs.load.sum())
        if loads_alone <= _WORTH * expected:
            height, expected = np.zeros_like(height), loads_alone
            restoration.patient_until = self._clock() + _WORTH * loads_alone
        restoration.height, restoration.expected_seconds = height, expected

    def _load_costs(self, restoration: Restoration) -> Float[np.ndarray, "groups chunks"]:
        """Seconds of loading each cell, on the link or into host memory, whichever takes longer."""
        link = self.pace.load_seconds(1.0) * restoration.nbytes
        supply = np.array([chunk.seconds if chunk.is_coming else 0.0 for chunk in restoration.chunks])
        return np.where(restoration.stored, np.maximum(link, supply / len(link)), np.inf)

    # Compute ------------------------------------------------------------------------------------------------

    def _next_step(self) -> tuple[Restoration, Step] | None:
        """What the plans compute next, in turns; else what is computed sooner than loads will be done."""
        in_turn = sorted(self.active, key=lambda one: one.turn)
        planned = [(one, step) for one in in_turn if (step := one.next_step()) is not None]
        late = ((one, step) for one in in_turn if (step := self._late_step(one)) is not None)
        return planned[0] if planned else next(late, None)

    def _late_step(self, restoration: Restoration) -> Step | None:
        """What is missing of its first chunk, if it is computed before all loads are done."""
        step = restoration.first_missing()
        if step is None or self._clock() < restoration.patient_until:
            return None
        seconds = self.pace.compute.value * restoration.seconds_of(step)
        return step if _MARGIN * seconds < self._seconds_to_wait() else None

    def _compute(self, restoration: Restoration, step: Step) -> None:
        self._turns += 1
        restoration.turn = self._turns
        started, step = self._clock(), self._within_turn(restoration, step)
        restoration.overtake(step)
        try:
            self._advance(restoration, step)
        except Exception as error:
            self._end(restoration, error)
            return
        self.pace.compute.correct(self.pace.compute.value * restoration.seconds_of(step), self._clock() - started)
        restoration.computed(step)
        self._end_if_done(restoration)

    def _within_turn(self, restoration: Restoration, step: Step) -> Step:
        """As many groups of the step as a turn should take, but one at least."""
        seconds = np.cumsum(self.pace.compute.value * restoration.predicted[step.first : step.end, step.chunk])
        return step._replace(end=step.first + max(int((seconds <= self._turn_seconds).sum()), 1))

    def _advance(self, restoration: Restoration, step: Step) -> None:
        """Run the step's layers for its chunk, and wait until that is done: what arrives meanwhile is placed next."""
        run = restoration.runs.get(step.chunk)
        if run is None:
            run = restoration.runs[step.chunk] = self._runner.begin([restoration.plan_of(step.chunk)])
        layers = self._link.layers
        self._runner.advance(run, layers[step.end - 1].stop - layers[step.first].start)
        jax.block_until_ready(self._runner.store)

    def _seconds_to_compute(self) -> float:
        """What all plans still compute."""
        return self.pace.compute.value * sum((float(one.predicted[one.to_compute].sum()) for one in self.active), 0.0)

    # Load ---------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Keep as much on the link as may be, of the restoration that lacks most first."""
        while self.traffic.nbytes < self._in_flight_bytes:
            lacking = sorted(self.active, key=lambda one: -one.missing_tokens)
            following = ((one, one.next_load()) for one in lacking)
            found = next(((one, load) for one, load in following if load is not None), None)
            if found is not None:
                self._fetch(found[0], *found[1])
            elif not any(self._take_over(one) for one in lacking):
                return

    def _fetch(self, restoration: Restoration, chunk: int, groups: list[int]) -> None:
        """Begin to load the first of these groups, or as many as are loaded in a moment."""
        block = restoration.chunks[chunk].in_memory()
        assert block is not None
        seconds = self.pace.load_seconds(1.0) * np.cumsum(restoration.nbytes[groups, chunk])
        groups = groups[: max(int((seconds <= _LOAD_SECONDS).sum()), 1)]
        restoration.coming(chunk, groups)
        if not self.traffic.send(restoration, chunk, groups, block):
            restoration.lose(chunk, groups)

    def _take_over(self, restoration: Restoration) -> bool:
        """Leave to the link what would be computed last, if it is loaded before that."""
        last = restoration.last_to_compute()
        if last is None:
            return False
        if _MARGIN * self.traffic.seconds(float(restoration.nbytes[last])) >= self._seconds_to_compute():
            return False
        restoration.leave_to_link(*last)
        return True

    def _collect(self) -> None:
        """Place what has arrived."""
        for flight in self.traffic.take_arrived():
            if flight.owner.wants(flight.chunk, flight.groups):
                self._place(flight)

    def _place(self, flight: Flight[Restoration]) -> None:
        restoration = flight.owner
        if flight.arriving is None:
            restoration.lose(flight.chunk, flight.groups)
            return
        try:
            rows, pages = self._pages(restoration.chunks[flight.chunk], restoration.pages)
            self._runner.store = self._link.place(self._runner.store, flight.arriving, rows, pages)
        except LinkError:
            restoration.lose(flight.chunk, flight.groups)
        except Exception as error:
            self._end(restoration, error)
        else:
            restoration.loaded(flight.chunk, flight.groups, flight.nbytes)
            self._end_if_done(restoration)

    def _pages(self, chunk: Chunk, pages: Sequence[int]) -> tuple[range, Sequence[int]]:
        """Which pages of its block a chunk is, and where they belong."""
        size = self._runner.engine.page_size
        own = pages[chunk.start // size : -(-chunk.end // size)]
        return range(chunk.first_row, chunk.first_row + len(own)), own

    # Waiting ------------------------------------------------------------------------------------------------

    def _seconds_to_wait(self) -> float:
        """Until all that is to be loaded will be here, if nobody overtakes it."""
        nbytes = sum((float(one.nbytes[one.to_load].sum()) for one in self.active), 0.0)
        late = self._clock() - self._supplied_at
        supply = [max(chunk.seconds, late) for one in self.active for chunk in one.chunks if chunk.is_coming]
        return max(self.traffic.seconds(nbytes), sum(supply))

    def _wait(self, seconds: float) -> None:
        """Until something has arrived or is worth computing, but no longer than this."""
        began = self._clock()
        while self._clock() - began < seconds and not self._has_news():
            self._sleep(_POLL)

    def _has_news(self) -> bool:
        supplied = self._note_supply()
        return supplied or self.traffic.any_arrived() or self._next_step() is not None

    def _note_supply(self) -> bool:
        """Whether blocks have come into host memory since this was asked last."""
        coming = sum(chunk.is_coming for one in self.active for chunk in one.chunks)
        fewer, self._coming = coming < self._coming, coming
        if fewer:
            self._supplied_at = self._clock()
        return fewer

    # The end ------------------------------------------------------------------------------------------------

    def _end_if_done(self, restoration: Restoration) -> None:
        if restoration.done:
            self._end(restoration)

    def _end(self, restoration: Restoration, error: Exception | None = None) -> None:
        restoration.ended, restoration.error = True, error
        restoration.runs.clear()
        self.active.remove(restoration)


def _check_chunks(chunks: Sequence[Chunk], num_tokens: int, page_size: int) -> None:
    edges = [*(chunk.start for chunk in chunks), num_tokens]
    if not chunks or edges[1:] != [chunk.end for chunk in chunks] or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"the chunks start at {edges[:-1]}; they must follow each other up to {num_tokens}")
    if any(start % page_size for start in edges[:-1]):
        raise ValueError(f"the chunks start at {edges[:-1]}; each must start at a multiple of {page_size}")
