"""Simulated fleets."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from views.origin import provenance
from views.tables import Document, Row, columns_of, pivot, table

FLEET_DIGITS = {"digests, B/s": ",.0f", "samples held": ",.0f", "requests": ",.0f"}
FLEET_PARTS = {
    "policies": ("hit rate", "computed", "TTFT p50", "TTFT p95", "TTFT p99", "good", "busiest of mean"),
    "scale": ("hit rate", "computed", "TTFT p50", "TTFT p95", "TTFT p99", "good", "busiest of mean"),
    "digests": ("hit rate", "TTFT p95", "digests, B/s", "samples held", "router, us a request", "router, cores"),
    "tuning": ("hit rate", "TTFT p50", "TTFT p95", "good", "busiest of mean", "capacity"),
    "tiers": ("hit rate", "loaded", "TTFT p50", "TTFT p95", "good", "tier 0 link", "tier 1 link", "network link"),
    "failures": ("failed", "hit rate", "busiest of mean", "TTFT p50 of others", "TTFT p95 of others", "good of others"),
    "bursts": ("hit rate", "TTFT p50", "TTFT p95", "TTFT p99", "good"),
    "routers": ("hit rate", "TTFT p50", "TTFT p95", "good", "busiest of mean", "digests, B/s", "router, cores"),
}


def fleet(part: str, document: Document) -> str:
    """A part of the simulated fleet's figures: a line for each case and policy."""
    parts = (part, "large") if part == "scale" else (part,)
    rows = [row for row in document["rows"] if row["part"] in parts and "line" not in row]
    cells: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        work, name = row["work"].split(": ")
        cells[work, row["implementation"]][name] = row["figure"]
    columns = FLEET_PARTS[part]
    lines = [[*about, *(fleet_figure(name, found.get(name)) for name in columns)] for about, found in cells.items()]
    return table(["case", "policy", *columns], lines, names=2)


def fleet_figure(name: str, figure: float | None) -> str:
    """
    >>> [fleet_figure(name, 1234.5) for name in ("digests, B/s", "TTFT p95")], fleet_figure("loaded", None)
    (['1,234', '1.23e+03'], '-')
    """
    return "-" if figure is None else f"{figure:{FLEET_DIGITS.get(name, '.3g')}}"


def fleet_limits(document: Document) -> str:
    """What a fleet asks of one router, and how much its hottest tenant asks of replicas, by the number of replicas."""
    cells, samples = defaultdict(dict), {}
    for row in document["rows"]:
        work, _, name = row["work"].partition(": ")
        if row["part"] == "memory":
            samples[int(work.split()[2])] = row["figure"]
        elif row["part"] in ("scale", "large") and row["implementation"] == "segments, router":
            cells[int(work.split(", ")[1].split()[0])][name] = row["figure"]
    lines = [_limits(replicas, found, samples[replicas]) for replicas, found in cells.items()]
    heading = ["replicas", "prompts/s", "router, us a prompt", "cores for them", "digests, kB/s", "samples held"]
    heading += ["bytes a sample", "router's digests, MB", "hottest tenant, replicas"]
    return table(heading, lines)


def _limits(replicas: int, found: Mapping[str, float], nbytes: float) -> list[str]:
    asked, each = found["prompts a second"], found["router, us a request"]
    cells = [f"{replicas}", f"{asked:,.0f}", f"{each:.0f}", f"{asked * each / 1e6:.3f}"]
    memory = found["samples held"] * nbytes / 1e6
    cells += [f"{found['digests, B/s'] / 1e3:,.1f}", f"{found['samples held']:,.0f}", f"{nbytes:.0f}", f"{memory:,.1f}"]
    return [*cells, f"{found['hottest tenant of mean']:.1f}"]


def fleet_capacity(document: Document) -> str:
    """Prompts a second and replica that are answered well: a line for each policy, a column for each traffic."""
    cells = pivot(row for row in document["rows"] if row["part"] == "capacity")
    names = columns_of(cells)
    lines = [[name, *(f"{by_name[name]['figure']:.2f}" for by_name in cells.values())] for name in names]
    return table(["policy", *(work.partition(",")[0] for work in cells)], lines)


def fleet_calibration(document: Document) -> str:
    """By file: how many rows, how far what is simulated is from them, and the row that is farthest."""
    groups: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in document["rows"]:
        if row["part"] == "calibration":
            groups[row["source"], row["fitted"]].append(row)
    lines = [
        _calibrated(source, "fitted" if fitted else "predicted", rows) for (source, fitted), rows in groups.items()
    ]
    heading = ["file", "rows are", "the farthest", "rows", "median error", "its error"]
    return provenance(document) + "\n" + table(heading, lines, names=3)


def _calibrated(source: str, how: str, rows: Sequence[Row]) -> list[str]:
    errors = sorted(abs(row["error"]) for row in rows)
    worst = max(rows, key=lambda row: abs(row["error"]))
    name = f"{worst['work'].partition(': ')[2]}, {worst['implementation']}"
    return [source, how, name, str(len(rows)), f"{errors[len(errors) // 2]:.1%}", f"{worst['error']:+.1%}"]


VIEWS = {
    "fleet_calibration": fleet_calibration,
    "fleet_capacity": fleet_capacity,
    "fleet_limits": fleet_limits,
    **{f"fleet_{part}": functools.partial(fleet, part) for part in FLEET_PARTS},
}
