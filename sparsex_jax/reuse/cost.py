"""How long a prefill will take, by what parts of prefills were measured to take on the same devices.

The times are of the whole mesh, each device at its share, with the collectives between them. Admission compares by them
what can be done for a request: a short prompt is recomputed sooner than its pieces are copied, scored and corrected.
`sparsex_jax.device.measuring` measures. Benches print predictions beside what they measure.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sparsex_jax.cache import Segment
from sparsex_jax.config import ModelConfig
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import TokenKind
from sparsex_jax.reuse.schedule import Phase

# Attention kernels take this many consecutive rows together, and read all keys up to the last one's position.
_TILE = 128
# The key mass of rows beside their attention: two passes over the keys, but none over the values.
_MASS = 1.25
# Of what may be left out of a prompt, the share that excerpts are expected to keep.
_KEPT = 0.15


@dataclasses.dataclass(frozen=True)
class ChunkTimes:
    """What a chunk of rows takes in one layer, in seconds.

    Plans and kernels pad rows. So the time rises with the rows in steps, whose places and heights only measuring tells.

    Attributes:
      rows: the numbers of rows that were measured, rising; the last is a whole chunk.
      layer: for each of them, the time without attention to keys.
      key: for each of them, what one more key adds that all the rows attend to.
    """

    rows: tuple[int, ...]
    layer: tuple[float, ...]
    key: tuple[float, ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ChunkTimes:
        """As `Speeds.from_dict`."""
        rows, layer, key = (_times(fields[name]) for name in ("rows", "layer", "key"))
        if not len(rows) == len(layer) == len(key) > 0:
            raise ValueError("rows, layer and key differ in length, or are empty")
        if rows[0] < 1 or any(a >= b for a, b in itertools.pairwise(rows)):
            raise ValueError(f"rows={rows} do not rise from 1 or more")
        return cls(tuple(map(int, rows)), layer, key)

    def layer_seconds(self, positions: Int[np.ndarray, "rows"], window: int | None = None) -> float:
        """Seconds of a layer with this window for rows at these rising positions, a chunk at a time."""
        return self.rows_seconds(len(positions), mean_keys(positions, window))

    def layers_seconds(self, positions: Int[np.ndarray, "rows"], windows: Sequence[int | None]) -> float:
        """Seconds of layers with these windows."""
        seconds = (number * self.layer_seconds(positions, window) for window, number in Counter(windows).items())
        return sum(seconds, start=0.0)

    def projection_seconds(self, positions: Int[np.ndarray, "rows"]) -> float:
        """The part of it that does not depend on where the rows are."""
        return self._in_chunks(self.layer, len(positions))

    def attention_seconds(self, positions: Int[np.ndarray, "rows"], window: int | None = None) -> float:
        """The part of it that attention takes."""
        return self._in_chunks(self.key, len(positions)) * mean_keys(positions, window)

    def rows_seconds(self, rows: int, keys: int | float) -> float:
        """Seconds of a layer for a number of rows, each of which attends to the same number of keys."""
        return self._in_chunks(self.layer, rows) + self._in_chunks(self.key, rows) * keys

    def _in_chunks(self, measured: Sequence[float], rows: int) -> float:
        """Whole chunks and a rest, which is on the line between the two measured numbers of rows next to it."""
        whole, rest = divmod(rows, self.rows[-1])
        return whole * measured[-1] + (float(np.interp(rest, self.rows, measured)) if rest else 0.0)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What prefills of one model take on the devices that they were measured on, in seconds.

    Attributes:
      small: chunks of the smallest plans, which are one chunk.
      large: chunks of all other plans. It is the plan's first layer whose rows say which of both it is.
      start: a prefill beside its layers: the plan's way to the device, embeddings and logits.
      boundary: what a boundary with a signal adds, however few the rows, and what it takes to plan one.
      copy: to copy and align cached KV, however little.
      copied_token: what each token that is copied adds, K and V of all layers.
    """

    small: ChunkTimes
    large: ChunkTimes
    start: float
    boundary: float
    copy: float
    copied_token: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Speeds:
        """From what JSON makes of `dataclasses.asdict`.

        Raises:
          KeyError, TypeError, ValueError: a field is missing, or is not as JSON would have it.
        """
        small, large = (ChunkTimes.from_dict(fields[name]) for name in ("small", "large"))
        rest = _times([fields[name] for name in ("start", "boundary", "copy", "copied_token")])
        return cls(small, large, *rest)

    def of_plan(self, rows: int) -> ChunkTimes:
        """Of a plan that begins with this many rows."""
        return self.small if rows <= self.small.rows[-1] else self.large


def _times(values: Sequence[Any]) -> tuple[float, ...]:
    times = tuple(map(float, values))
    if not all(0 <= time < np.inf for time in times):
        raise ValueError(f"{times} are not all finite numbers that are not negative")
    return times


def mean_keys(positions: Int[np.ndarray, "rows"], window: int | None = None) -> float:
    """How many keys a tile of rows reads, on average over the tiles: from the first that its first row sees to its last
    row's own. Rising positions."""
    if len(positions) == 0:
        return 0.0
    last = np.append(positions[_TILE - 1 : -1 : _TILE], positions[-1])
    if window is None:
        return float(last.mean()) + 1
    return float((last + 1 - np.maximum(positions[::_TILE] - window + 1, 0)).mean())


def prefill_seconds(model: ModelConfig, plan: RequestPlan, speeds: Speeds) -> float:
    """Seconds that the prefill of one request alone takes, copies and logits among them.

    Where a signal decides how many tokens it chooses (`Phase.coverage`), it is taken to choose the least: what it will
    see is not known, and where it looks at little, this is what reuse can save.
    Not counted is what every plan for the request needs alike: the lookup, and the first token's way to the caller.
    """
    phases, times = plan.phases, speeds.of_plan(plan.num_rows)
    rows = [_positions(plan, phase) for phase in phases]
    starts = [*(phase.start for phase in phases), model.num_layers]
    seconds = speeds.start + _copy_seconds(sum(copy.length for copy in plan.copies), speeds)
    for own, (begin, end) in zip(rows, itertools.pairwise(starts), strict=True):
        seconds += times.layers_seconds(own, model.windows[begin:end])
    for before, phase in zip(rows, phases[1:], strict=False):
        if phase.start < model.num_layers and phase.can_leave_out(len(before)):
            seconds += speeds.boundary
            seconds += _signal_seconds(model, plan, before, phase, times)
    return seconds


def excerpt_seconds(model: ModelConfig, plan: RequestPlan, speeds: Speeds) -> float:
    """Seconds of a probe, and of the prefill of an excerpt behind it that keeps about as much as most do."""
    probe, prompt = plan.probe, plan.prompt
    assert probe is not None
    fresh = np.flatnonzero(prompt.fresh)
    times = speeds.of_plan(len(fresh))
    windows = model.windows[: probe.end_layer]
    watched = _MASS * sum(times.attention_seconds(fresh, window) for window in windows[probe.first_layer :])
    looking = times.layers_seconds(fresh, windows) + watched
    among = probe.num_tokens
    kept = len(prompt) - among + max(probe.least_tokens, round(_KEPT * among))
    rows = np.arange(int((prompt.kind == TokenKind.PREFIX).sum()), kept)
    answering = speeds.of_plan(len(rows)).layers_seconds(rows, model.windows)
    return 2 * speeds.start + _copy_seconds(sum(copy.length for copy in plan.copies), speeds) + looking + answering


def least_seconds(
    model: ModelConfig, missing: Int[np.ndarray, "rows"], copies: Sequence[Segment], speeds: Speeds
) -> float:
    """Less than any prefill takes that makes these copies and computes what is missing, or more, in every layer."""
    layers = speeds.of_plan(len(missing)).layers_seconds(missing, model.windows)
    return speeds.start + _copy_seconds(sum(copy.length for copy in copies), speeds) + layers


def can_save(share: float, model: ModelConfig, length: int, missing: int, speeds: Speeds) -> bool:
    """Whether segments in a prompt's last `missing` tokens might save more than this share of its prefill's time.

    As if each of its rows saw all the keys, and as if segments left one row. Asked for each request before anything is
    searched, so it has to be fast.
    """
    plain, sparse = speeds.start, speeds.start + speeds.copy
    for window, layers in Counter(model.windows).items():
        keys = length if window is None else min(length, window)
        plain += layers * speeds.of_plan(missing).rows_seconds(missing, keys)
        sparse += layers * speeds.of_plan(1).rows_seconds(1, keys)
    return sparse < (1 - share) * plain


def _positions(plan: RequestPlan, phase: Phase) -> Int[np.ndarray, "rows"]:
    """Positions that a phase computes, if those that its signal chooses are spread evenly over the reused tokens."""
    candidates = np.flatnonzero(plan.prompt.reused & ~phase.forced)
    budget = min(phase.budget, len(candidates))
    computed = phase.forced.copy()
    computed[candidates[(np.arange(budget) * len(candidates)) // max(budget, 1)]] = True
    return np.flatnonzero(computed)


def _copy_seconds(tokens: int, speeds: Speeds) -> float:
    return speeds.copy + tokens * speeds.copied_token if tokens else 0.0


def _signal_seconds(
    model: ModelConfig, plan: RequestPlan, before: Int[np.ndarray, "rows"], phase: Phase, times: ChunkTimes
) -> float:
    """Seconds of a signal: K and V of all rows at the boundary, the fresh rows' key mass, and the signal's own pass.
    None without a signal.

    On a mesh it is a little too much: K and V are summed over no devices, and a layer's time has two such sums.
    """
    if phase.signal is None:
        return 0.0
    fresh = np.flatnonzero(plan.prompt.fresh)
    own, *passed = model.windows[phase.start :][: phase.probe_layers or 1]
    everything = _kv_share(model) * times.projection_seconds(before)
    seconds = everything + _MASS * times.attention_seconds(fresh, own)
    if not phase.probe_layers:
        return seconds
    windows = [own, *passed]
    masses = _MASS * sum(times.attention_seconds(fresh, window) for window in windows)
    return seconds + times.layers_seconds(fresh, windows) + masses


def _kv_share(model: ModelConfig) -> float:
    """The share of a layer's products that make keys and values. On a mesh it is each device's, if copies of KV heads
    count in the model (`sharding.on_mesh`)."""
    keys_values = 2 * model.num_kv_heads * model.head_dim
    both_ways = 2 * model.num_q_heads * model.head_dim  # queries, and the output projection
    return keys_values / (keys_values + both_ways + 3 * model.mlp_width + (model.num_experts or 0))
