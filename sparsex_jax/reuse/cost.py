"""How long a prefill will take: its operations and bytes, over the speeds that a device was measured to reach.

Admission asks it whether reuse pays (`only_if_faster`): a short prompt is recomputed sooner than its pieces are copied,
scored and corrected. Benches print it beside what they measure.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
from jaxtyping import Bool

from sparsex_jax.config import ModelConfig
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

_BYTES = 2  # of a weight, a key or a value: the speeds below are those of bfloat16


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What one device reaches with this package's kernels, in bfloat16.

    Attributes:
      linear: operations a second of linear layers with many rows.
      attention: operations a second of attention, over visible pairs of a row and a key.
      bandwidth: bytes a second, read and written.
      layer: seconds that a layer takes however few its rows are: launches, and waits for the host.
      start: seconds outside the device's work: from the prompt to its first operation, and from the last to the token.
      tile: rows that are computed together; a part of a tile takes as long as a whole one.
    """

    linear: float
    attention: float
    bandwidth: float
    layer: float
    start: float
    tile: int


# By JAX's name of the device, fitted to `scripts/results/e2e-*`.
SPEEDS = {"NVIDIA H100 80GB HBM3": Speeds(760e12, 560e12, 2.75e12, 0.20e-3, 6e-3, 128)}


def speeds_of(device: jax.Device) -> Speeds | None:
    """The speeds of a device, or None if they were not measured."""
    return SPEEDS.get(device.device_kind)


def prefill_seconds(config: ModelConfig, plan: RequestPlan, speeds: Speeds) -> float:
    """Seconds from the prompt to the logits of its last token, for one request alone."""
    phases, prompt = plan.phases, plan.prompt
    starts = [*(phase.start for phase in phases), config.num_layers]
    seconds = speeds.start + config.vocab_size * config.hidden_size * _BYTES / speeds.bandwidth
    seconds += _copy_seconds(config, sum(copy.length for copy in plan.copies), speeds)
    for phase, (begin, end) in zip(phases, itertools.pairwise(starts), strict=True):
        rows, pairs = _rows_and_pairs(prompt, phase)
        seconds += (end - begin) * _layer_seconds(config, rows, pairs, speeds)
    for before, phase in itertools.pairwise(phases):
        if phase.signal and phase.start < config.num_layers:
            seconds += _signal_seconds(config, prompt, before, phase, speeds)
    return seconds


def _layer_seconds(config: ModelConfig, rows: int, pairs: float, speeds: Speeds) -> float:
    weights = config.hidden_size * (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    weights += 3 * config.hidden_size * config.intermediate_size
    computed = -(-rows // speeds.tile) * speeds.tile
    linear = max(2 * weights * computed / speeds.linear, weights * _BYTES / speeds.bandwidth)
    # What is read and written between the products: the MLP's gate, norms, rotations, residuals.
    beside = rows * _BYTES * (3 * config.intermediate_size + 16 * config.hidden_size) / speeds.bandwidth
    return linear + beside + _attention_seconds(config, pairs, speeds) + speeds.layer


def _attention_seconds(config: ModelConfig, pairs: float, speeds: Speeds) -> float:
    return 4 * config.num_q_heads * config.head_dim * pairs / speeds.attention


def _copy_seconds(config: ModelConfig, tokens: int, speeds: Speeds) -> float:
    """Seconds to read and write K and V of these tokens in all layers."""
    size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * _BYTES
    return 2 * tokens * size / speeds.bandwidth


def _signal_seconds(config: ModelConfig, prompt: PromptMap, before: Phase, phase: Phase, speeds: Speeds) -> float:
    """Seconds of a signal: K and V of all rows at the boundary, the fresh rows' attention again, and its own pass."""
    rows, _ = _rows_and_pairs(prompt, before)
    projections = 4 * config.hidden_size * config.num_kv_heads * config.head_dim * rows / speeds.linear
    fresh, pairs = int(prompt.fresh.sum()), _pairs(prompt.fresh)
    mass = 1.25 * _attention_seconds(config, pairs, speeds)
    probe = phase.probe_layers * (_layer_seconds(config, fresh, pairs, speeds) + mass)
    return projections + mass + probe


def _rows_and_pairs(prompt: PromptMap, phase: Phase) -> tuple[int, float]:
    """How many rows a phase has at most, and how many keys they see together if the chosen ones are spread evenly."""
    candidates = prompt.reused & ~phase.forced
    chosen = phase.budget * _pairs(candidates) / max(int(candidates.sum()), 1)
    return phase.size, _pairs(phase.forced) + chosen


def _pairs(tokens: Bool[np.ndarray, "tokens"]) -> float:
    """How many keys these tokens see together: each sees itself and all before it."""
    return float((np.flatnonzero(tokens) + 1).sum())
