"""What prefill and decode take on one replica, in seconds: the engine's cost model in closed form.

`sparsex_jax.reuse.cost` prices a plan token by token. Here a prompt is a few counts, so that a million of them can be
priced: how many rows go through the layers before the boundary and behind it, and how many keys they see on average.
A plan is then

    start + (layers before) layer(rows before) + (layers behind) layer(rows behind) + what each prompt adds

where `layer` is that of `ChunkTimes`, and a prompt adds its attention, copies and part of the signal. So prompts that
share a plan share the passes over the weights.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from sparsex_jax.config import ModelConfig
from sparsex_jax.config.checks import require
from sparsex_jax.eval.fleet.store import Found
from sparsex_jax.reuse.cost import ChunkTimes, Speeds

_MASS = 1.25  # as in `sparsex_jax.reuse.cost`
_HALF_TILE = 64  # kernels read the keys up to the end of a row's tile of 128


@dataclasses.dataclass(frozen=True)
class Method:
    """How prompts are reused.

    Attributes:
      name: in tables.
      segments: whether segments are found anywhere, or prefixes only.
      boundary: layers that compute all tokens.
      ratio: of the reused tokens, the share that the other layers recompute.
      overflow: reused tokens on each side of a run of fresh ones that are recomputed in any case.
      signal: whether a signal chooses the tokens.
    """

    name: str
    segments: bool = True
    boundary: int = 0
    ratio: float = 0.0
    overflow: int = 0
    signal: bool = True

    def __post_init__(self) -> None:
        require(self.boundary >= 0, f"boundary={self.boundary} must be at least 0")
        require(0 <= self.ratio <= 1, f"ratio={self.ratio} must be from 0 to 1")

    def recomputed(self, reused: int, borders: int) -> int:
        """Reused tokens that the layers behind the boundary compute."""
        return min(reused, round(self.ratio * reused) + self.overflow * borders)


METHODS = {
    method.name: method
    for method in (
        Method("prefix", segments=False),
        Method("naive", signal=False),
        Method("sparsex l*=0, 5 %", ratio=0.05, overflow=16),
        Method("sparsex l*=3, 15 %", boundary=3, ratio=0.15, overflow=16),
    )
}


class Work(NamedTuple):
    """What one prompt, or one stage of it, asks of a plan.

    Attributes:
      sparse: whether there is a boundary. Only prompts that agree share a plan.
      before, behind: rows in the layers before the boundary, and in the others.
      seconds: what it adds to those that all rows of the plan share.
    """

    sparse: bool
    before: float
    behind: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class DecodeTimes:
    """A decode step, in seconds.

    Attributes:
      step: with however few rows and keys.
      row: each sequence adds.
      key: each token of each sequence's context adds.
    """

    step: float
    row: float
    key: float


class Timing:
    """Seconds of one replica's device.

    Attributes:
      method: how prompts are reused.
      decode: of decode steps.
      budget: rows of a plan.
      token_bytes: of a token's KV in all layers.
    """

    def __init__(
        self, model: ModelConfig, speeds: Speeds, decode: DecodeTimes, method: Method, *, budget: int, token_bytes: int
    ) -> None:
        require(method.boundary < model.num_layers, f"boundary={method.boundary} must be below {model.num_layers}")
        require(budget >= 1, f"budget={budget} must be at least 1")
        self.decode, self.method, self.budget, self.token_bytes = decode, method, budget, token_bytes
        self._layers, self._speeds = model.num_layers, speeds
        self._small, self._large = _Chunks(speeds.small), _Chunks(speeds.large)
        self._kv_share = _kv_share(model)

    def stages(self, found: Found) -> list[Work]:
        """The stages of a prompt's prefill, all alike: as many as keep each within the token budget."""
        whole = self.work(found)
        count = max(1, -int(-self._rows(whole) // self.budget))
        part = Work(whole.sparse, whole.before / count, whole.behind / count, whole.seconds / count)
        return [part] * count

    def work(self, found: Found) -> Work:
        """A whole prompt: with segments where that takes less time alone, else by its prefix alone."""
        plain = self._plain(found)
        if not found.reused:
            return plain
        sparse = self._sparse(found)
        return sparse if self.plan_seconds([sparse]) < self.plan_seconds([plain]) else plain

    def forced(self, found: Found) -> Work:
        """A whole prompt with all segments that were found, even if that takes longer."""
        return self._sparse(found) if found.reused else self._plain(found)

    def alone_seconds(self, found: Found) -> float:
        """Of a prefill that shares its plan with nobody."""
        return self.plan_seconds([self.work(found)])

    def computed_tokens(self, found: Found) -> float:
        """Token-layers that a prompt computes, divided by the layers."""
        return self._rows(self.work(found))

    def plan_seconds(self, works: list[Work]) -> float:
        """Of a plan that these share. They are all sparse or all plain."""
        before, behind = sum(work.before for work in works), sum(work.behind for work in works)
        sparse = works[0].sparse
        boundary = self.method.boundary if sparse else 0
        chunks = self._of_plan(before)
        seconds = self._speeds.start + boundary * chunks.layer_seconds(before)
        seconds += (self._layers - boundary) * chunks.layer_seconds(behind)
        if sparse and self.method.signal:
            seconds += self._speeds.boundary
        return seconds + sum(work.seconds for work in works)

    def decode_seconds(self, steps: int, sequences: int, context: int) -> float:
        """Of so many steps of sequences that have so many tokens together before the first of them."""
        keys = steps * context + sequences * steps * (steps - 1) // 2
        return steps * (self.decode.step + sequences * self.decode.row) + self.decode.key * keys

    def _rows(self, work: Work) -> float:
        """Of a layer, on average."""
        boundary = self.method.boundary if work.sparse else 0
        return (boundary * work.before + (self._layers - boundary) * work.behind) / self._layers

    def _plain(self, found: Found) -> Work:
        rows = found.fresh + found.reused
        chunks = self._of_plan(rows)
        keys = (found.fresh_keys + found.reused_keys) / rows + _HALF_TILE
        return Work(False, rows, rows, self._layers * chunks.key_seconds(rows) * keys)

    def _sparse(self, found: Found) -> Work:
        method, everyone = self.method, found.fresh + found.reused
        again = method.recomputed(found.reused, found.borders)
        behind = found.fresh + again
        before = everyone if method.signal else behind
        chunks, all_keys = self._of_plan(before), found.fresh_keys + found.reused_keys
        keys = (found.fresh_keys + found.reused_keys / found.reused * again) / behind + _HALF_TILE
        seconds = method.boundary * chunks.key_seconds(everyone) * (all_keys / everyone + _HALF_TILE)
        seconds += (self._layers - method.boundary) * chunks.key_seconds(behind) * keys
        if method.signal:
            seconds += self._kv_share * chunks.layer_seconds(everyone)
            seconds += _MASS * chunks.key_seconds(found.fresh) * (found.fresh_keys / found.fresh + _HALF_TILE)
        return Work(True, before, behind, seconds + self._copies(found.reused))

    def _copies(self, tokens: int) -> float:
        return self._speeds.copy + tokens * self._speeds.copied_token if tokens else 0.0

    def _of_plan(self, rows: float) -> _Chunks:
        return self._small if rows <= self._small.most else self._large


class _Chunks:
    """`ChunkTimes` as tables, since interpolation in NumPy takes longer than all else."""

    def __init__(self, times: ChunkTimes) -> None:
        self.most = times.rows[-1]
        rests = np.arange(self.most + 1)
        self._layer, self._key = (
            [0.0, *np.interp(rests[1:], times.rows, column).tolist()] for column in (times.layer, times.key)
        )

    def layer_seconds(self, rows: float) -> float:
        """Of a layer without attention."""
        return self._in_chunks(self._layer, rows)

    def key_seconds(self, rows: float) -> float:
        """What one more key adds that all rows attend to."""
        return self._in_chunks(self._key, rows)

    def _in_chunks(self, table: list[float], rows: float) -> float:
        whole, rest = divmod(-int(-rows // 1), self.most)
        return whole * table[-1] + table[rest]


def _kv_share(model: ModelConfig) -> float:
    """The share of a layer's products that make keys and values, as in `sparsex_jax.reuse.cost`."""
    keys_values = 2 * model.num_kv_heads * model.head_dim
    return keys_values / (keys_values + 2 * model.num_q_heads * model.head_dim + 3 * model.mlp_width)
