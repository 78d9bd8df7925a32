"""Plots of a quality bench. They need matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sparsex_jax.eval.maps import Maps
from sparsex_jax.eval.results import Summary
from sparsex_jax.reuse.prompt import TokenKind

matplotlib.use("agg")  # draws to files, so it needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter


def frontier(summaries: Sequence[Summary], path: Path, title: str = "") -> None:
    """Plot scores over computed fractions: a panel for each task and regime, a point with its interval for each method.

    A line joins the points of one method with different options (`sparsex:recompute_ratio=0.3`).
    """
    tasks, regimes = (list(dict.fromkeys(s[key] for s in summaries)) for key in ("task", "regime"))
    size = (max(3.4 * len(tasks), 6), 3.0 * len(regimes) + 1)
    figure, axes = plt.subplots(
        len(regimes), len(tasks), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for line, regime in zip(axes, regimes, strict=True):
        for panel, task in zip(line, tasks, strict=True):
            _frontier_panel(panel, [s for s in summaries if (s["task"], s["regime"]) == (task, regime)])
            panel.set_title(f"{task}, {regime}", fontsize=10)
        line[0].set_ylabel("score")
    for panel in axes[-1]:
        panel.set_xlabel("computed fraction of token-layers")
    _legend(figure, [*axes.ravel()])
    _save(figure, path, title)


def scores_over_time(summaries: Sequence[Summary], path: Path, title: str = "") -> None:
    """Plot scores over times to the first token, both the means of all tasks: a panel for each regime.

    The dashed line is full recompute's score, if that was measured.
    """
    regimes, tasks = (list(dict.fromkeys(s[key] for s in summaries)) for key in ("regime", "task"))
    shown = [s for s in summaries if s["task"] == tasks[-1]]
    size = (max(4.2 * len(regimes), 6), 4.4)
    figure, axes = plt.subplots(1, len(regimes), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for panel, regime in zip(axes[0], regimes, strict=True):
        own = [s for s in shown if s["regime"] == regime]
        _panel(panel, own, "ttft_s")
        for full in (s["mean"] for s in own if (s["method"], s["metric"]) == ("full", "score")):
            panel.axhline(full, ls="--", lw=0.8, color="grey")
        panel.set(xscale="log", xlabel="time to the first token, s (log)", ylim=(-0.02, 1.05))
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(regime, fontsize=10)
    axes[0, 0].set_ylabel("score" if len(tasks) == 1 else f"score, mean of {len(tasks) - 1} tasks")
    _legend(figure, [*axes[0]])
    _save(figure, path, title)


def _legend(figure: Any, panels: Sequence[Axes]) -> None:
    """One legend for what any of the panels shows."""
    named = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="outside lower center", ncols=6, fontsize=8)


def _frontier_panel(panel: Axes, summaries: Sequence[Summary]) -> None:
    _panel(panel, summaries, "computed_fraction")
    panel.set(xlim=(0, 1.05), ylim=(-0.02, 1.05))


def _panel(panel: Axes, summaries: Sequence[Summary], over: str) -> None:
    """A line for each method with its options, of scores over another metric."""
    work = {s["method"]: s["mean"] for s in summaries if s["metric"] == over}
    families: dict[str, list[Summary]] = {}
    for summary in (s for s in summaries if s["metric"] == "score"):
        families.setdefault(summary["method"].split(":")[0], []).append(summary)
    for name, scores in families.items():
        scores.sort(key=lambda s: work[s["method"]])
        mean, low, high = (np.array([s[key] for s in scores]) for key in ("mean", "low", "high"))
        x = [work[s["method"]] for s in scores]
        panel.errorbar(x, mean, [mean - low, high - mean], marker="o", ms=4, lw=1, capsize=2, label=name)
    panel.grid(alpha=0.3, which="both")


def heatmaps(maps: Maps, path: Path, title: str = "") -> None:
    """Plot key mass, K deviation and V deviation by layer and position. Bars on top mark the fresh tokens."""
    panels = {
        "key mass, log10 of its share": np.log10(np.maximum(maps.key_mass, 1e-7)),
        "K deviation": maps.key_deviation,
        "V deviation": maps.value_deviation,
    }
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 7), sharex=True, layout="constrained")
    for panel, (name, values) in zip(axes, panels.items(), strict=True):
        image = panel.imshow(values, aspect="auto", origin="lower", interpolation="nearest", cmap="magma")
        figure.colorbar(image, ax=panel, pad=0.01)
        fresh = np.flatnonzero(maps.kind == TokenKind.FRESH)
        panel.plot(fresh, np.full(len(fresh), len(values) - 0.5), "|", color="tab:cyan", clip_on=False)
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("layer")
    axes[-1].set_xlabel("position (fresh tokens marked)")
    _save(figure, path, title)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
