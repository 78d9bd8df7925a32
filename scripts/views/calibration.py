"""What a calibration selected."""

from __future__ import annotations

from views.origin import provenance
from views.tables import Document, table


def calibration(document: Document) -> str:
    """What was selected for each regime, and what it was measured to do."""
    measured, prompts = document["measured"], document["measured"]["prompts"]
    metric, limit = (measured["target"][key] for key in ("metric", "most"))
    asked = f"{'/'.join(prompts['tasks'])}, {prompts['num_tokens']} tokens in {prompts['num_segments']} segments"
    heading = ["regime", "selected", "FLOPs", metric, "confirmed", "score", "full's", "KL", "tried", "refuted"]
    lines = [_selected(*each, measured["full_scores"], metric) for each in measured["by_regime"].items()]
    target = f"* Asked: {asked}; {metric} <= {limit}. Where the selected is `prefix`, figures are of the nearest.\n"
    return provenance(document) + target + "\n" + table(heading, lines, names=2)


def _selected(regime: str, found: Document, full_scores: dict[str, float], metric: str) -> list[str]:
    figures = found["figures"][regime]
    means = [f"{value:.2f}" for value in (figures["score"], full_scores[regime], figures["kl"])]
    intervals = [_interval(figures.get(name)) for name in (metric, "confirmed")]
    chosen = f"`{found['basis']}`" if found["met"] else f"`prefix`; nearest: `{found['basis']}`"
    counts = [str(found[name]) for name in ("candidates", "refuted")]
    return [regime, chosen, f"{figures['flops_fraction']:.2f}", *intervals, *means, *counts]


def _interval(figure: Document | None) -> str:
    """A mean with its interval and the number of prompts."""
    if figure is None:
        return "-"
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}], {figure['samples']}"


VIEWS = {
    "calibration": calibration,
}
