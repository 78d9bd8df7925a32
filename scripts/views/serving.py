"""A server under load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from views.origin import provenance
from views.tables import Document, Row, columns_of, method_name, pivot, table

# Of prompt tokens, and of token-layers. In files that have no "recomputed", "reused" is all that was found in segments.
SHARES = ("prefix", "approximate prefix", "reused", "recomputed", "fresh", "computed")


def serving(document: Document) -> str:
    """A table for each workload."""
    tables = [
        f"\n*{name}*, {rate:.2f} requests a second:\n\n{workload_table(document, name)}"
        for name, rate in document["rates"].items()
    ]
    return provenance(document) + "".join(tables)


def workload_table(document: Document, workload: str) -> str:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in document["rows"]:
        name, figure = row["work"].split(": ")
        if name == workload:
            found[row["implementation"]][figure] = row["figure"]
    heading = ["method", "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms", "generated, tokens/s"]
    shares = [name for name in SHARES if name in next(iter(found.values()))]
    heading += ["prompt, tokens/s", "goodput, 1/s", *shares]
    return table(heading, [serving_line(method, figures, shares) for method, figures in found.items()])


def serving_line(method: str, figures: dict[str, float], shares: Sequence[str]) -> list[str]:
    ttft = " / ".join(f"{figures[f'TTFT p{p}']:.2f}" for p in (50, 95, 99))
    gaps = " / ".join(f"{figures[f'ITL p{p}']:.0f}" for p in (50, 95, 99))
    rates = [f"{figures[name]:.1f}" for name in ("generated", "prompt")]
    percent = [f"{figures[name]:.0%}" for name in shares]
    return [method_name(method), ttft, gaps, *rates, f"{figures['goodput']:.2f}", *percent]


def routing(document: Document) -> str:
    """A table for each workload: a line for each policy, a column for each figure."""
    works = pivot(document["rows"])
    names = dict.fromkeys(work.partition(": ")[0] for work in works)
    tables = (routing_table({w: r for w, r in works.items() if w.startswith(f"{name}: ")}, name) for name in names)
    return provenance(document) + "".join(tables)


def routing_table(works: Mapping[str, dict[str, Row]], name: str) -> str:
    heading = ["policy", *(work.partition(": ")[2] for work in works)]
    lines = [
        [policy, *(routing_cell(by_policy[policy]) for by_policy in works.values())] for policy in columns_of(works)
    ]
    return f"\n*{name}*:\n\n{table(heading, lines)}"


def routing_cell(row: Row) -> str:
    """
    >>> routing_cell({"figure": 0.602, "unit": "share of tokens"}), routing_cell({"figure": 1.471, "unit": "s"})
    ('60 %', '1.47 s')
    """
    share = row["unit"].startswith("share")
    return f"{100 * row['figure']:.0f} %" if share else f"{row['figure']:.2f} {row['unit'].replace('requests', '')}"


def soak(document: Document) -> str:
    """What a server was like under a load that it cannot sustain."""
    lines = [[row["work"], f"{row['figure']:g} {row['unit']}"] for row in document["rows"]]
    return f"{table(['what', 'figure'], lines)}\n{provenance(document)}"


def structure(document: Document) -> str:
    """What a token takes with and without a structure."""
    lines = [
        [row["work"], f"{row['figure']:.2f}", f"{row['ratio']:.2f}" if "ratio" in row else ""]
        for row in document["rows"]
    ]
    host = ", ".join(f"{name} {microseconds:.0f}" for name, microseconds in document["host_us"].items())
    heading = ["answers", "ms a token", "of that without a structure"]
    return f"{table(heading, lines)}\nOn the host, microseconds: {host}.\n\n{provenance(document)}"


VIEWS = {
    "structure": structure,
    "soak": soak,
    "serving": serving,
    "routing": routing,
}
