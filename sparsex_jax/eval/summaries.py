"""Means of the quality bench's rows, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sparsex_jax.eval.results import Summary
from sparsex_jax.eval.scores import UNITS

Row = dict[str, Any]  # the figures of one method on one sample
Cell = tuple[str, str, int]  # task, regime, sample
ALL_TASKS = "all"  # the name of a summary over several tasks
Z95 = 1.959964  # 95 % of a normal distribution are within this many standard deviations of its mean
_SHARES = ("score", "top1", "agreement")


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Means with 95 % intervals: a summary for each task, regime, method and metric.

    If there are several tasks, the task `all` summarises the rows of all of them. The metric `loss` is how much less a
    method scores than full recompute on the same samples; it is there only if full recompute was measured.
    """
    rows = with_loss(rows)
    several = len({row["task"] for row in rows}) > 1
    pooled = [row | {"task": ALL_TASKS} for row in rows] if several else []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in [*rows, *pooled]:
        groups.setdefault((row["task"], row["regime"], row["method"]), []).append(row)
    return [summary for key, group in groups.items() for summary in _summaries(key, group)]


def with_loss(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its `loss` against full recompute on the same sample, if that was measured."""
    best = {cell_of(row): row["score"] for row in rows if row["method"] == "full"}
    return [row | {"loss": best[cell_of(row)] - row["score"]} if best else row for row in rows]


def cell_of(row: Row) -> Cell:
    return row["task"], row["regime"], row["sample"]


def _summaries(key: tuple[str, str, str], group: Sequence[Row]) -> Iterable[Summary]:
    task, regime, method = key
    for metric, unit in {**UNITS, "loss": "share"}.items():
        values = np.array([row[metric] for row in group if metric in row], np.float64)
        if not len(values):
            continue
        low, high = wilson_interval(values) if metric in _SHARES else t_interval(values)
        summary = {"task": task, "regime": regime, "method": method, "metric": metric, "mean": float(values.mean())}
        yield summary | {"low": low, "high": high, "samples": len(values), "unit": unit}


def wilson_interval(values: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of values from 0 to 1, which treats each value as a coin toss.

    No distribution on [0, 1] has a larger variance than a coin toss of the same mean. So for shares the interval is
    too wide rather than too narrow, and it does not shrink to a point where all values are equal.
    """
    n, mean, z = len(values), float(values.mean()), Z95
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + z * z / (4 * n * n))
    # Rounded, the end next to a mean of 0 or 1 may miss it by a little.
    return min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. For a single value, both ends are that value."""
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return mean - half, mean + half
