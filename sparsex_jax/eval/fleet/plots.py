"""Plots of a fleet's result file. They need matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # draws to files, so it needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = Mapping[str, Any]
_NAMES = {"hit rate": "hit rate", "TTFT p95": "TTFT p95, s", "busiest of mean": "busiest replica / mean"}


def plot_all(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write a plot for each part that has rows. Returns their paths: `<stem>-<part>.png`."""
    parts: dict[str, Callable[[Sequence[Row], Path], None]] = {
        "calibration": calibration,
        "policies": policies,
        "scale": scale,
        "failures": failures,
    }
    written = []
    for part, draw in parts.items():
        own = [row for row in rows if row["part"] in ((part, "large") if part == "scale" else (part,))]
        if own:
            path = stem.with_name(f"{stem.name}-{part}.png")
            draw(own, path)
            written.append(path)
    return written


def calibration(rows: Sequence[Row], path: Path) -> None:
    """What is predicted over what was measured, in seconds."""
    figure, panel = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    for fitted, label, marker in ((True, "fitted", "o"), (False, "predicted", "x")):
        own = [row for row in rows if row["fitted"] == fitted]
        unit = [1e-3 if row["unit"] == "ms" else 1.0 for row in own]
        measured = [row["measured"] * each for row, each in zip(own, unit, strict=True)]
        predicted = [row["figure"] * each for row, each in zip(own, unit, strict=True)]
        panel.loglog(measured, predicted, marker, ms=5, alpha=0.7, label=label)
    panel.loglog([0.01, 10], [0.01, 10], lw=0.8, color="grey")
    panel.set(xlabel="measured, s", ylabel="simulated, s")
    panel.grid(alpha=0.3)
    panel.legend()
    _save(figure, path)


def policies(rows: Sequence[Row], path: Path) -> None:
    """For each traffic, the hit rate of each policy over its TTFT p95."""
    cells = _cells(rows)
    loads = list(dict.fromkeys(work for work, _, _ in cells))
    figure, axes = plt.subplots(1, len(loads), figsize=(3.6 * len(loads), 3.8), squeeze=False, layout="constrained")
    for panel, work in zip(axes[0], loads, strict=True):
        for name, style in _styles(name for each, name, _ in cells if each == work):
            panel.plot(cells[work, name, "TTFT p95"], cells[work, name, "hit rate"], label=name, ms=7, **style)
        panel.set(title=work, xlabel=_NAMES["TTFT p95"], ylim=(0, 1))
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("hit rate")
    _legend(figure, axes[0])
    _save(figure, path)


def scale(rows: Sequence[Row], path: Path) -> None:
    """Hit rate, balance and TTFT p95 of each policy over the number of replicas."""
    cells = _cells(rows)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    for panel, column in zip(axes, _NAMES, strict=True):
        for name, style in _styles(name for _, name, _ in cells):
            points = sorted((_replicas(work), cells[work, own, column]) for work, own, _ in _keys(cells, column, name))
            panel.plot(*zip(*points, strict=True), label=name, ms=5, lw=1, **(style | {"ls": style["ls"] or "-"}))
        panel.set(xscale="log", xlabel="replicas", ylabel=_NAMES[column])
        panel.grid(alpha=0.3)
    _legend(figure, axes)
    _save(figure, path)


def failures(rows: Sequence[Row], path: Path) -> None:
    """TTFT p95 and hit rate over time, for each scenario."""
    lines = [row for row in rows if "line" in row]
    scenarios = list(dict.fromkeys(row["work"].partition(":")[0] for row in lines))
    size = (3.8 * len(scenarios), 5.2)
    figure, axes = plt.subplots(2, len(scenarios), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for (above, below), scenario in zip(axes.T, scenarios, strict=True):
        for row in (row for row in lines if row["work"].startswith(scenario)):
            times, hits, ttft, _ = zip(*row["line"], strict=True)
            above.semilogy(times, ttft, lw=1, label=row["implementation"])
            below.plot(times, hits, lw=1, label=row["implementation"])
            above.axvline(row["figure"], lw=0.6, color="grey")
        above.set(title=scenario, ylabel=_NAMES["TTFT p95"])
        below.set(xlabel="s", ylabel="hit rate", ylim=(0, 1))
    _legend(figure, axes.ravel())
    _save(figure, path)


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """Figures by work, implementation and name."""
    cells = {}
    for row in rows:
        work, name = row["work"].split(": ")
        cells[work, row["implementation"], name] = row["figure"]
    return cells


def _keys(cells: Mapping[tuple[str, str, str], float], column: str, name: str) -> list[tuple[str, str, str]]:
    return [key for key in cells if key[1:] == (name, column)]


def _replicas(work: str) -> int:
    """
    >>> _replicas("mixture, 100 replicas")
    100
    """
    return int(work.split(", ")[1].split()[0])


def _styles(names: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """A colour for each policy; round markers where segments are reused, crosses where prefixes are."""
    own = list(dict.fromkeys(names))
    colours: dict[str, str] = {}
    for name in own:
        colours.setdefault(name.partition(", ")[2], f"C{len(colours)}")
    return [
        (name, {"color": colours[name.partition(", ")[2]], "marker": "xo"[name.startswith("segments")], "ls": ""})
        for name in own
    ]


def _legend(figure: Any, panels: Iterable[Axes]) -> None:
    """One legend for what any of the panels shows."""
    named = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize=8)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
