"""The floating-point operations of a prefill, with those of a signal's own pass, as a share of full recompute's.

Token-layers alone (`Report.computed_fraction`) do not say that a row near the end of a prompt attends to all of it.
The matrix products of the layers and of attention count; embeddings, norms and the logits of one token do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from sparsex_jax.cache import Segment
from sparsex_jax.config import ModelConfig, ReuseConfig
from sparsex_jax.reuse.excerpt import Probe
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.report import Report, make_report, report_of_excerpt
from sparsex_jax.reuse.schedule import Phase

# Of the layers that a signal's own pass runs, the share in which it scores. The others score in one.
_SCORED_LAYERS = {"probe_mass": 1.0, "probe_focus": 1.0, "probe_square": 1 / 3}
_READS_NO_QUERIES = ("kv_deviation", "given")


class _Layers:
    """The operations of a model's layers."""

    def __init__(self, model: ModelConfig) -> None:
        self.windows = model.windows
        hidden, self.heads = model.hidden_size, model.num_q_heads * model.head_dim
        self.queries = 2 * hidden * self.heads
        self.keys_values = 2 * hidden * 2 * model.num_kv_heads * model.head_dim
        self.token = 2 * self.queries + self.keys_values + 2 * hidden * (3 * model.mlp_width + (model.num_experts or 0))

    def run(self, rows: Bool[np.ndarray, "tokens"], start: int = 0, end: int | None = None) -> float:
        """These rows of a prompt in layers from one up to another; each attends to what the layer's window shows."""
        windows = self.windows[start:end]
        return len(windows) * self.token * int(rows.sum()) + 4 * self.heads * _keys(rows, windows)

    def score(self, rows: Bool[np.ndarray, "tokens"], start: int, end: int) -> float:
        """The attention of these rows without their values."""
        windows = self.windows[start:end]
        return len(windows) * self.queries * int(rows.sum()) + 2 * self.heads * _keys(rows, windows)


def _keys(rows: Bool[np.ndarray, "tokens"], windows: Sequence[int | None]) -> int:
    """How many keys these rows see in layers with these windows together."""
    before = np.flatnonzero(rows) + 1
    seen = {window: before if window is None else np.minimum(before, window) for window in set(windows)}
    return sum(int(seen[window].sum()) for window in windows)


def flops_fraction(model: ModelConfig, reuse: ReuseConfig, report: Report) -> float:
    """The share of full recompute's operations that the reported prefill took.

    Args:
      reuse: the method that made the report, for its schedule.
    """
    layers, prompt = _Layers(model), _prompt_of(report)
    everything = layers.run(np.ones(len(prompt), bool))
    if report.probe_layers:
        return (_probe(layers, report) + layers.run(_rows_of_excerpt(report))) / everything
    phases = method_of(reuse).fitted(model.windows).phases(prompt, model.num_layers)
    rows = _rows(phases, report)
    starts = [*(phase.start for phase in phases), model.num_layers]
    spans = zip(rows, itertools.pairwise(starts), strict=True)
    prefilled = sum(layers.run(own, start, end) for own, (start, end) in spans)
    pairs = zip(rows, phases[1:], strict=False)
    signals = sum(
        _signal(layers, prompt, before, phase)
        for before, phase in pairs
        if phase.start < model.num_layers and phase.can_leave_out(int(before.sum()))
    )
    return (prefilled + signals) / everything


def _probe(layers: _Layers, report: Report) -> float:
    """A pass of the fresh tokens, as if all of its layers were looked at."""
    fresh = report.kind != TokenKind.PREFIX
    for segment in report.segments:
        fresh[segment.start : segment.start + segment.length] = False
    return layers.run(fresh, 0, report.probe_layers) + layers.score(fresh, 0, report.probe_layers)


def _rows_of_excerpt(report: Report) -> Bool[np.ndarray, "kept"]:
    """Which tokens of the excerpt were computed."""
    return report.active[report.kind != TokenKind.OMITTED]


def predicted_fraction(model: ModelConfig, reuse: ReuseConfig, prompt: PromptMap) -> float:
    """The same before anything is measured: what a signal would choose of the prompt is spread over it.

    Raises:
      InvalidRequestError: an option is wrong for the model.
    """
    method, num_layers = method_of(reuse).fitted(model.windows), model.num_layers
    probe = method.probe(prompt, lambda: np.zeros(len(prompt), int), num_layers)
    if probe is not None:
        return flops_fraction(model, reuse, _predicted_excerpt(prompt, probe, num_layers))
    phases = method.phases(prompt, num_layers)
    rows = [phases[0].forced]
    for phase in phases[1:]:
        candidates = np.flatnonzero(rows[-1] & ~phase.forced)
        rows.append(_with_some(phase.forced, candidates, min(phase.budget, len(candidates))))
    return flops_fraction(model, reuse, make_report(prompt, phases, num_layers, 0.0, np.stack(rows)))


def _predicted_excerpt(prompt: PromptMap, probe: Probe, num_layers: int) -> Report:
    """As if each piece got half of the focus that the one before it got."""
    excerpt = probe.excerpt(np.exp2(-probe.piece.astype(np.float32)))
    kept = PromptMap(prompt.tokens[excerpt.keep], np.full(excerpt.keep.sum(), TokenKind.FRESH, np.uint8))
    answered = make_report(kept, [Phase(0, kept.computed)], num_layers, 0.0, kept.computed[None])
    return report_of_excerpt(prompt, excerpt, answered, num_layers)


def _prompt_of(report: Report) -> PromptMap:
    """The map that the report was made from, but for the tokens and the places of the donors."""
    segments = tuple(
        Segment(each.start, each.length, each.donor_start, np.zeros(each.length, np.int64), exact=True)
        for each in report.segments
    )
    return PromptMap(np.zeros(report.prompt_tokens, np.int32), report.kind, segments)


def _rows(phases: Sequence[Phase], report: Report) -> list[Bool[np.ndarray, "tokens"]]:
    """What each phase computed. Of phases after the second only the number is known: it is spread over the second's."""
    first, *later = phases
    rows = [first.forced]
    for phase, computed in zip(later, report.phase_tokens[1:], strict=True):
        before = report.active if len(rows) == 1 else rows[-1]
        candidates = np.flatnonzero(before & ~phase.forced)
        rows.append(_with_some(phase.forced, candidates, max(computed - phase.num_forced, 0)))
    return rows


def _with_some(
    forced: Bool[np.ndarray, "tokens"], candidates: Int[np.ndarray, "candidates"], number: int
) -> Bool[np.ndarray, "tokens"]:
    """The forced rows and so many of the candidates, spread evenly over these."""
    rows = forced.copy()
    rows[candidates[(np.arange(number) * len(candidates)) // max(number, 1)]] = True
    return rows


def _signal(layers: _Layers, prompt: PromptMap, before: Bool[np.ndarray, "tokens"], phase: Phase) -> float:
    """A signal's operations: K and V of all rows at the boundary or a pass of the fresh rows, and their attention."""
    if phase.signal is None or phase.signal == "given":
        return 0
    end = phase.start + max(phase.probe_layers, 1)
    scored = 0 if phase.signal in _READS_NO_QUERIES else layers.score(prompt.fresh, phase.start, end)
    if not phase.probe_layers:
        return layers.keys_values * int(before.sum()) + scored
    share = max(_SCORED_LAYERS.get(phase.signal, 0), 1 / phase.probe_layers)
    return layers.run(prompt.fresh, phase.start, end) + share * scored
