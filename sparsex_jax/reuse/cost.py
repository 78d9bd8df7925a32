"""How long a prefill will take, by what parts of prefills were measured to take on the same devices.

Admission compares by it what can be done for a request: a short prompt is recomputed sooner than its pieces are copied,
scored and corrected. `sparsex_jax.device.speeds` measures. Benches print predictions beside what they measure.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sparsex_jax.config import ModelConfig
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.schedule import Phase

# Attention kernels take this many consecutive rows together, and read all keys up to the last one's position.
_TILE = 128
# The key mass of rows beside their attention: two passes over the keys, but none over the values.
_MASS = 1.25


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What prefills of one model take on the devices that they were measured on. Times are in seconds.

    Rows go through a layer a chunk at a time, and chunks and kernels pad them. So a layer's time rises with its rows in
    steps, whose places and heights only a measurement tells.

    Attributes:
      chunk: rows that go through a layer at a time.
      rows: numbers of rows that a layer was measured with, rising, up to two chunks.
      layer: time of a layer for each of these numbers, without attention to keys.
      key: for each of these numbers, what one more key adds that all the rows attend to.
      start: time of a prefill beside its layers: the plan's way to the device, embeddings and logits.
      copy: time to copy and align runs of cached KV, however short they are.
      copied_token: what each token that is copied adds, K and V of all layers.
    """

    chunk: int
    rows: tuple[int, ...]
    layer: tuple[float, ...]
    key: tuple[float, ...]
    start: float
    copy: float
    copied_token: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Speeds:
        """From `dataclasses.asdict`, or from what JSON makes of that.

        Raises:
          TypeError, ValueError: a field is missing, is none, or is no number or list of numbers of the right length.
        """
        lists = {name: tuple(map(float, fields[name])) for name in ("layer", "key")}
        rows = tuple(map(int, fields["rows"]))
        if any(len(values) != len(rows) for values in lists.values()):
            raise ValueError(f"rows has {len(rows)} entries; layer and key need as many")
        return cls(**{**fields, **lists, "rows": rows})

    def layer_seconds(self, positions: Int[np.ndarray, "rows"]) -> float:
        """Time of one layer for rows at these rising positions."""
        return self._of_rows(self.layer, len(positions)) + self.attention_seconds(positions)

    def attention_seconds(self, positions: Int[np.ndarray, "rows"]) -> float:
        """The part of it that attention takes."""
        return self._of_rows(self.key, len(positions)) * mean_keys(positions)

    def _of_rows(self, measured: Sequence[float], rows: int) -> float:
        """Between two measured numbers of rows on the line between them; behind the last, each chunk takes what the
        second one did."""
        if rows == 0:
            return 0.0
        beyond = max(-(-(rows - self.rows[-1]) // self.chunk), 0)
        one, two, inside = np.interp([self.chunk, 2 * self.chunk, rows - beyond * self.chunk], self.rows, measured)
        return float(inside + beyond * (two - one))


def mean_keys(positions: Int[np.ndarray, "rows"]) -> float:
    """How many keys a tile of rows reads, on average over the tiles. Rising positions."""
    if len(positions) == 0:
        return 0.0
    last = np.append(positions[_TILE - 1 : -1 : _TILE], positions[-1])
    return float(last.mean()) + 1


def prefill_seconds(model: ModelConfig, plan: RequestPlan, speeds: Speeds) -> float:
    """Seconds that the prefill of one request alone takes, copies and logits among them.

    Not counted is what every plan for the request needs alike: the lookup, and the first token's way to the caller.
    """
    phases = plan.phases
    rows = [_positions(plan, phase) for phase in phases]
    starts = [*(phase.start for phase in phases), model.num_layers]
    seconds = speeds.start + _copy_seconds(sum(copy.length for copy in plan.copies), speeds)
    for own, (begin, end) in zip(rows, itertools.pairwise(starts), strict=True):
        seconds += (end - begin) * speeds.layer_seconds(own)
    for before, phase in zip(rows, phases[1:], strict=False):
        if phase.signal and phase.start < model.num_layers and phase.can_leave_out(len(before)):
            seconds += _signal_seconds(model, plan, before, phase, speeds)
    return seconds


def _positions(plan: RequestPlan, phase: Phase) -> Int[np.ndarray, "rows"]:
    """Positions that a phase computes, if those that its signal chooses are spread evenly over the reused tokens."""
    candidates = np.flatnonzero(plan.prompt.reused & ~phase.forced)
    budget = min(phase.budget, len(candidates))
    chosen = candidates[(np.arange(budget) * len(candidates)) // max(budget, 1)]
    return _marked(phase.forced, chosen)


def _marked(forced: Bool[np.ndarray, "tokens"], chosen: Int[np.ndarray, "_"]) -> Int[np.ndarray, "rows"]:
    computed = forced.copy()
    computed[chosen] = True
    return np.flatnonzero(computed)


def _copy_seconds(tokens: int, speeds: Speeds) -> float:
    return speeds.copy + tokens * speeds.copied_token if tokens else 0.0


def _signal_seconds(
    model: ModelConfig, plan: RequestPlan, before: Int[np.ndarray, "rows"], phase: Phase, speeds: Speeds
) -> float:
    """Seconds of a signal: K and V of all rows at the boundary, the fresh rows' key mass, and the signal's own pass."""
    fresh = np.flatnonzero(plan.prompt.fresh)
    mass = _MASS * speeds.attention_seconds(fresh)
    everything = speeds.layer_seconds(before) - speeds.attention_seconds(before)
    return _kv_share(model) * everything + mass + phase.probe_layers * (speeds.layer_seconds(fresh) + mass)


def _kv_share(model: ModelConfig) -> float:
    """The share of a layer's weights that make keys and values."""
    keys_values = 2 * model.num_kv_heads * model.head_dim
    both_ways = 2 * model.num_q_heads * model.head_dim  # queries, and the output projection
    return keys_values / (keys_values + both_ways + 3 * model.intermediate_size)
