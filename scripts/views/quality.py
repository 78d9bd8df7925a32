"""Scores of methods, and how far their answers are from full recompute's."""

from __future__ import annotations

from collections.abc import Sequence

from views.origin import one_line, provenance
from views.tables import Document, Row, method_name, table, with_interval

ALL_TASKS = "all"
BESIDE_SCORE = {
    "computed_fraction": "work",
    "flops_fraction": "FLOPs",
    "kl": "KL",
    "top1": "top-1",
    "agreement": "agreement",
    "ttft_s": "TTFT, s",
}
HEADLINE_METHODS = (
    "full",
    "naive",
    "epic",
    "cacheblend",
    "prophetkv",
    "sparsex:boundary_layer=0",
    "sparsex:boundary_layer=2",
    "sparsex:boundary_layer=4",
    "sparsex:boundary_layer=8",
)


def quality_cells(document: Document) -> dict[tuple[str, str, str, str], Row]:
    """Rows by (regime, method, task, metric)."""
    cells = {}
    for row in document["rows"]:
        cell, metric = row["work"].rsplit(": ", 1)
        task, regime = cell.split(", ")
        cells[regime, row["implementation"], task, metric] = row
    return cells


def quality(document: Document) -> str:
    """A table for each regime. Times are left out where the file says that they do not compare."""
    comparable = "Times to the first token" not in (document.get("note") or "")
    measured = {metric for *_, metric in quality_cells(document)}
    metrics = [metric for metric in BESIDE_SCORE if metric in measured and (metric != "ttft_s" or comparable)]
    tables = [f"\nRegime *{regime}*:\n\n{regime_table(document, regime, metrics)}" for regime in regimes_of(document)]
    return provenance(document) + "".join(tables)


def regimes_of(document: Document) -> list[str]:
    return list(dict.fromkeys(regime for regime, *_ in quality_cells(document)))


def regime_table(document: Document, regime: str, metrics: Sequence[str]) -> str:
    cells, tasks = quality_cells(document), document["settings"]["tasks"]
    shown = [*tasks, ALL_TASKS] if len(tasks) > 1 else tasks
    lines = []
    for method in document["settings"]["methods"]:
        scores = [with_interval(cells[regime, method, task, "score"]) for task in shown]
        beside = [f"{cells[regime, method, ALL_TASKS, metric]['figure']:.3f}" for metric in metrics]
        lines.append([method_name(method), *scores, *beside])
    return table(["method", *shown, *(BESIDE_SCORE[metric] for metric in metrics)], lines)


def quality_headline(document: Document) -> str:
    """Some methods, two tasks and the mean of all, in both regimes."""
    cells, shown = quality_cells(document), ("vt", "cwe", ALL_TASKS)
    pairs = [(regime, task) for regime in ("joint", "independent") for task in shown]
    lines = []
    for method in HEADLINE_METHODS:
        work = cells["joint", method, ALL_TASKS, "computed_fraction"]["figure"]
        scores = [f"{cells[regime, method, task, 'score']['figure']:.2f}" for regime, task in pairs]
        lines.append([method_name(method), f"{work:.2f}", *scores])
    tasks = [task if task != ALL_TASKS else "all five" for _, task in pairs]
    heading = [f"{regime}: {task}" for (regime, _), task in zip(pairs, tasks, strict=True)]
    return table(["method", "work", *heading], lines) + "\n" + one_line(document)


def quality_summary(document: Document) -> str:
    """The mean of all tasks by each method in the file's only regime, the share of the operations, and the time."""
    cells, (regime,) = quality_cells(document), regimes_of(document)
    lines = []
    for method in document["settings"]["methods"]:
        score, flops, ttft = (cells[regime, method, ALL_TASKS, name] for name in ("score", "flops_fraction", "ttft_s"))
        figures = with_interval(score), f"{flops['figure']:.2f}", f"{1e3 * ttft['figure']:.0f}"
        lines.append([method_name(method), *figures])
    return table(["method", "score", "FLOPs", "TTFT, ms"], lines) + "\n" + one_line(document)


VIEWS = {
    "quality": quality,
    "quality_headline": quality_headline,
    "quality_summary": quality_summary,
}
