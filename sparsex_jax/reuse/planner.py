"""From prompts and their schedules to the plan that the jitted prefill consumes. Host side, NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from sparsex_jax.cache import Segment, run_of_slots
from sparsex_jax.cache.derived import Derived
from sparsex_jax.cache.mirrors import Packing
from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.adapters import NO_SLOT, Acting
from sparsex_jax.reuse.excerpt import Probe
from sparsex_jax.reuse.plan import (
    PADDING_REQUEST,
    ROW_MULTIPLES,
    Boundaries,
    Budget,
    Copies,
    PackedRows,
    PrefillPlan,
    Rows,
)
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import MAX_BOUNDARIES, Phase
from sparsex_kernels.arguments import Patch

# Rows that go through a layer at a time, by platform; on one that is not here, as on a TPU.
CHUNKS = {
    "cpu": 128,  # larger chunks gain 15 % in the matrix products and lose more to padding
    "gpu": 2048,  # kernels skip padding by themselves
    "tpu": 2048,
}


@dataclasses.dataclass(frozen=True, eq=False)
class RequestPlan:
    """What one request asks of a prefill.

    Attributes:
      prompt: the classified prompt.
      phases: its schedule.
      pages: physical pages of its tokens in order, the shared prefix first.
      copies: runs to copy into those pages first: the prefix tail and the segments.
      probe: what is decided by this pass, which gives no logits. None: it is a prefill.
      adapter: acts on its tokens. None: it is the base model's.
      unseen: tokens of the prefix that the schedule computes all the same, for what the adapter adds to their values;
        K and V of theirs stay as they are. None: there are none.
    """

    prompt: PromptMap
    phases: tuple[Phase, ...]
    pages: Sequence[int]
    copies: tuple[Segment, ...] = ()
    probe: Probe | None = None
    adapter: Acting | None = None
    unseen: Bool[np.ndarray, "tokens"] | None = None

    def running_through(self, unseen: Bool[np.ndarray, "tokens"]) -> RequestPlan:
        """The same plan, with these tokens of the prefix unseen."""
        if not unseen.any():
            return self
        phases = tuple(dataclasses.replace(phase, forced=phase.forced | unseen) for phase in self.phases)
        return dataclasses.replace(self, phases=phases, unseen=unseen)

    @property
    def num_rows(self) -> int:
        """Tokens of the first phase."""
        return self.phases[0].size

    def most_rows(self, needed: Sequence[int]) -> int:
        """Tokens of the last of these phases at most, each of which chooses from those of the one before it."""
        return min(self.phases[number].most for number in needed)

    @property
    def kind(self) -> tuple[tuple[int, int] | None, tuple[tuple[int, str | None, int], ...]]:
        """The layers that a probe looks at, if it is one; where each phase starts, by what signal, how deep that
        looks. Requests share a plan only if these agree."""
        phases = tuple((phase.start, phase.signal, phase.probe_layers) for phase in self.phases)
        return (self.probe.first_layer, self.probe.end_layer) if self.probe else None, phases

    def first_reading_layer(self, num_layers: int) -> int:
        """Layers before this one compute all tokens, and read nothing of what is reused. `num_layers`: none does."""
        if self.probe is not None or (self.prompt.computed & ~self.phases[0].forced).any():
            return 0
        sizes = [phase.size for phase in self.phases]
        narrow = (phase.start for size, phase in zip(sizes, self.phases[1:], strict=False) if phase.can_leave_out(size))
        return min([*narrow, num_layers])

    def layers_read_at(self, layer: int) -> int:
        """KV of reused tokens is read in the layers before this one, by the time `layer` has run.

        Where a phase begins, its signal may run the fresh tokens through more layers than `layer` itself.
        """
        begins = (phase for phase in self.phases if phase.start == layer)
        return max([layer + 1, *(layer + phase.probe_layers for phase in begins)])

    def exact_tokens(self, num_layers: int) -> int:
        """How many prompt tokens have exact KV once prefilled: all, or those before the first approximate one.

        KV behind a reused token that some layer leaves out is approximate, and so is KV behind an approximate prefix.
        Neither passes for an exact prefix.
        """
        everyone = int(np.count_nonzero(self.prompt.computed))
        sparse = any(phase.can_leave_out(everyone) for phase in self.phases if phase.start < num_layers)
        return self.prompt.exact_frontier if sparse or self.prompt.approximate.any() else len(self.prompt)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The few static shapes that plans are padded to: (rows, chunk) buckets, requests and pages a request; and whether
    their rows say which adapter acts on them, and which are unseen. Rows of a decode step are a `row_multiple`.

    Attributes:
      at_once: how many rows may go through all layers in one program, rising.
      unit: where one of several such programs begins is a multiple of it.
    """

    buckets: tuple[tuple[int, int], ...]
    max_requests: int
    max_pages: int
    at_once: tuple[int, ...]
    unit: int
    adapters: bool = False
    unseen: bool = False
    row_multiple: int = 1

    @classmethod
    def of(cls, max_context: int, max_requests: int, page_size: int, chunk: int) -> Shapes:
        """A small bucket for short work, then factors of 4 up to the longest context.

        Rows go through the layers a chunk at a time and chunks of padding are skipped, so a large bucket costs
        memory, not time, and few are enough: 4 for a context of 8192 and chunks of 128.
        """
        sizes = [4 * chunk]
        while sizes[-1] < max_context:
            sizes.append(4 * sizes[-1])
        few = chunk // 2
        buckets = ((few, few), *((size, chunk) for size in sizes))
        at_once = few, 3 * chunk // 4, chunk
        return cls(buckets, max_requests, -(-max_context // page_size), at_once=at_once, unit=chunk)

    @classmethod
    def of_engine(cls, model: ModelConfig, engine: EngineConfig, *, platform: str, pairs: bool = False) -> Shapes:
        """The shapes of an engine's plans on a platform: cpu, gpu or tpu.

        Args:
          pairs: whether two chunks may go through all layers side by side (`all_layers`).
        """
        max_context = min(model.max_position, engine.num_pages * engine.page_size)
        chunk = engine.chunk_rows or CHUNKS.get(platform, CHUNKS["tpu"])
        shapes = cls.of(max_context, engine.max_prefill_seqs, engine.page_size, chunk)
        about: Any = {"adapters": engine.max_adapters > 0, "unseen": engine.share_adapters}
        at_once = (*shapes.at_once, 2 * chunk) if pairs else shapes.at_once
        return dataclasses.replace(shapes, at_once=at_once, row_multiple=ROW_MULTIPLES.get(platform, 1), **about)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1][0]

    def bucket(self, rows: int) -> tuple[int, int]:
        """The smallest (rows, chunk) that holds this number of rows."""
        return next(bucket for bucket in self.buckets if bucket[0] >= rows)

    def at_once_in(self, bucket: tuple[int, int]) -> tuple[int, ...]:
        """How many rows of a plan of this bucket may go through all layers in one program."""
        return tuple(size for size in self.at_once if size <= bucket[0])

    def chunks_at_once(self, rows: int) -> Iterator[tuple[int, int]]:
        """Where the programs begin that take this number of rows through all layers, in units, and their sizes."""
        sizes = self.at_once_in(self.bucket(rows))
        for first in range(0, rows, sizes[-1]):
            yield first // self.unit, next((size for size in sizes if size >= rows - first), sizes[-1])


def needed_phases(requests: Sequence[RequestPlan], num_layers: int) -> list[int]:
    """Numbers of the phases that have layers and leave out some token of the phase before them; the first always."""
    needed = [0]
    for i, phase in enumerate(requests[0].phases[1:], start=1):
        narrows = any(request.phases[i].can_leave_out(request.phases[needed[-1]].size) for request in requests)
        if phase.start < num_layers and narrows:
            needed.append(i)
    return needed


def last_choice(requests: Sequence[RequestPlan], num_layers: int) -> tuple[int | None, int]:
    """The layer at which rows are left out for the last time, and how many there are from then on at most.

    The layer is None where all that are computed go through all layers.
    """
    needed = needed_phases(requests, num_layers)
    rows = sum(request.most_rows(needed) for request in requests)
    return (requests[0].phases[needed[-1]].start if len(needed) > 1 else None), rows


def plan_prefill(
    requests: Sequence[RequestPlan], shapes: Shapes, num_layers: int, signals: Sequence[str]
) -> tuple[PrefillPlan, Rows]:
    """Lay the rows of requests with the same schedule out behind each other.

    Args:
      signals: names of those that the prefill is compiled with, in their order.

    Returns:
      The plan, and its rows: the tokens of the first phase.

    Raises:
      InvalidRequestError: a phase's signal is none of these.
    """
    first, *later = [[request.phases[i] for request in requests] for i in needed_phases(requests, num_layers)]
    computed = [np.flatnonzero(phase.forced) for phase in first]
    size, _ = shapes.bucket(sum(map(len, computed)))
    layout = _Layout(requests, computed, size)
    plan = PrefillPlan(
        page_tables=page_tables([request.pages for request in requests], shapes.max_requests, shapes.max_pages),
        fresh=layout.rows([request.prompt.fresh for request in requests], False),
        scores=layout.rows([_given_scores(request) for request in requests], 0.0),
        block=layout.rows([_blocks(request) for request in requests], 0),
        boundaries=_boundaries(layout, later, shapes.max_requests, signals),
    )
    return plan, layout.first_rows(shapes)


class _Layout(NamedTuple):
    """Which tokens of each request are rows of the plan, one request behind the other, padded to `size`."""

    requests: Sequence[RequestPlan]
    computed: Sequence[Int[np.ndarray, "_"]]
    size: int

    def rows(self, values: Iterable[np.ndarray], fill: int | float | bool) -> Any:
        """From a value for each token of each prompt to one for each row."""
        return _padded([each[at] for each, at in zip(values, self.computed, strict=True)], self.size, fill)

    def first_rows(self, shapes: Shapes) -> Rows:
        lines = [np.full(len(at), line) for line, at in enumerate(self.computed)]
        token = self.rows([request.prompt.tokens for request in self.requests], 0)
        position = _padded(self.computed, self.size, -1)
        request = _padded(lines, self.size, PADDING_REQUEST)
        slots = _padded(self._adapter_slots(), self.size, NO_SLOT) if shapes.adapters else None
        unseen = self.rows(map(_unseen, self.requests), False) if shapes.unseen else None
        index: Any = np.arange(self.size, dtype=np.int32)
        return Rows(token, position, request, index, slots, unseen)

    def _adapter_slots(self) -> list[np.ndarray]:
        acting = zip(self.requests, self.computed, strict=True)
        return [one.adapter.slots(at) if one.adapter else np.full(len(at), NO_SLOT) for one, at in acting]


def _unseen(request: RequestPlan) -> Bool[np.ndarray, "tokens"]:
    return np.zeros(len(request.prompt), bool) if request.unseen is None else request.unseen


def _boundaries(
    layout: _Layout, later: Sequence[Sequence[Phase]], max_requests: int, signals: Sequence[str]
) -> Boundaries:
    """The phases after the first, one boundary each, and unused boundaries behind them.

    Args:
      later: each of these phases, for every request.
    """
    lines = MAX_BOUNDARIES
    layer, signal, probe_layers = (_full(lines, fill) for fill in (-1, -1, 0))
    forced = _full((lines, layout.size), False)
    for line, same in enumerate(later):
        layer[line], signal[line] = same[0].start, _number_of(same[0].signal, signals)
        probe_layers[line] = same[0].probe_layers
        forced[line] = layout.rows([phase.forced for phase in same], False)
    return Boundaries(layer, signal, forced, _budgets(later, max_requests), probe_layers)


def _budgets(later: Sequence[Sequence[Phase]], max_requests: int) -> Budget:
    least, coverage, most = (_full((MAX_BOUNDARIES, max_requests), fill) for fill in (0, 0.0, 0))
    for line, same in enumerate(later):
        least[line, : len(same)] = [phase.budget for phase in same]
        coverage[line, : len(same)] = [phase.coverage for phase in same]
        most[line, : len(same)] = [phase.most_chosen for phase in same]
    return Budget(least, coverage, most)


def _number_of(signal: str | None, signals: Sequence[str]) -> int:
    """A signal's place among those that the prefill is compiled with; -1 for none."""
    if signal is None:
        return -1
    if signal not in signals:
        raise InvalidRequestError(f"signal={signal!r} is unknown; there are: {', '.join(signals)}")
    return list(signals).index(signal)


def _given_scores(request: RequestPlan) -> Float32[np.ndarray, "tokens"]:
    """What the signal `given` reads, the same at every boundary of a request."""
    given = [phase.scores for phase in request.phases if phase.scores is not None]
    return given[0] if given else np.zeros(len(request.prompt), np.float32)


def _blocks(request: RequestPlan) -> Int[np.ndarray, "tokens"]:
    """The blocks in which tokens are chosen, the same at every boundary of a request."""
    return request.prompt.blocks(max(phase.pool_tokens for phase in request.phases))


def plan_copies(runs: Sequence[tuple[Segment, Sequence[int]]], shapes: Shapes, page_size: int) -> Iterator[Copies]:
    """The copies of these runs, each into the pages of the sequence it belongs to, in as many parts as shapes demand.

    A batch that reuses nearly everything has few rows to compute and more to copy than the largest bucket holds.
    """
    group: list[tuple[Segment, Sequence[int]]] = []
    tokens = 0
    for run in runs:
        tokens += run[0].length
        if tokens > shapes.max_rows:
            yield _copies(group, shapes, page_size)
            group, tokens = [], run[0].length
        group.append(run)
    if group:
        yield _copies(group, shapes, page_size)


def _copies(runs: Sequence[tuple[Segment, Sequence[int]]], shapes: Shapes, page_size: int) -> Copies:
    targets = [run_of_slots(pages, segment.start, segment.length, page_size) for segment, pages in runs]
    size, _ = shapes.bucket(sum(map(len, targets)))
    rows = _rows_of([segment for segment, _ in runs])
    moved = np.concatenate([np.full(segment.length, segment.shift) for segment, _ in runs])
    source, shift = _padded([rows.source], size, 0), _padded([moved + rows.shift], size, 0)
    patch = None
    if rows.depth.any():
        patch = Patch(*(_padded([each], size, 0) for each in (rows.patch, rows.layer, rows.depth, moved)))
    return Copies(source, _padded(targets, size, -1), shift, patch)


def _rows_of(segments: Sequence[Segment]) -> Derived:
    """Where the rows of these segments are, behind each other."""
    if any(segment.rows for segment in segments):
        return Derived.joined([segment.rows or Derived.stored(segment.slots) for segment in segments])
    return Derived.stored(np.concatenate([segment.slots for segment in segments]))


def plan_packing(packing: Packing, shapes: Shapes) -> Iterator[PackedRows]:
    """Patch rows to move, in as many parts as shapes demand."""
    for begin in range(0, len(packing.source), shapes.max_rows):
        part = slice(begin, begin + shapes.max_rows)
        size, _ = shapes.bucket(len(packing.source[part]))
        source, layer, depth = (
            _padded([each[part]], size, 0) for each in (packing.source, packing.layer, packing.depth)
        )
        yield PackedRows(source, _padded([packing.target[part]], size, -1), layer, depth)


def slots_of(pages: Sequence[int], places: Int[np.ndarray, "n"], page_size: int) -> Int[np.ndarray, "n"]:
    """Where the tokens at these places of a sequence are, whose pages follow each other."""
    page, offset = np.divmod(places, page_size)
    return np.asarray(pages)[page] * page_size + offset


def page_tables(pages: Sequence[Sequence[int]], max_requests: int, max_pages: int) -> Any:
    """A line of page numbers for each request, int32 `[lines, pages]`, padded with page 0, which is never read through
    the padding."""
    tables = _full((max_requests, max_pages), 0)
    for line, own in enumerate(pages):
        tables[line, : len(own)] = own
    return tables


def _padded(parts: Sequence[np.ndarray], size: int, fill: int | float | bool) -> Any:
    """The parts behind each other, filled up to `size`, of the fill's type."""
    out, at = _full(size, fill), 0
    for part in parts:
        out[at : at + len(part)] = part
        at += len(part)
    return out


def _full(shape: int | tuple[int, ...], fill: int | float | bool) -> Any:
    """A NumPy array of the fill's type: bool, int32 or float32. It is `Any` because a plan's arrays are jax's to those
    who compute with it."""
    return np.full(shape, fill, {bool: bool, int: np.int32, float: np.float32}[type(fill)])
