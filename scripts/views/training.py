"""What models and adapters answer that were trained for these figures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from views.origin import provenance
from views.tables import Document, Row, pivot, table, with_interval


def training(document: Document) -> str:
    """Whole answers right, and in parentheses single tokens of answers, by task and length of the prompt."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in document["rows"]:
        task, tokens = re.match(r"(\w+), (\d+) tokens", row["work"]).groups()
        found[task][int(tokens)].append(row["figure"])
    lengths = sorted({tokens for by_length in found.values() for tokens in by_length})
    lines = []
    for task, by_length in found.items():
        cells = [f"{by_length[n][0]:.2f} ({by_length[n][1]:.2f})" if n in by_length else "-" for n in lengths]
        lines.append([task, *cells])
    return provenance(document) + "\n" + table(["task", *(f"{n} tokens" for n in lengths)], lines)


def adapters(document: Document) -> str:
    """For each variant: what each scheme of sharing answers right, loses and wins back, and how alike the roles are."""
    cells = pivot(document["rows"])
    variants = dict.fromkeys(work.partition(", ")[0] for work in cells)
    return provenance(document) + "".join(f"\n{_adapters(cells, variant)}" for variant in variants)


def _adapters(cells: Mapping[str, dict[str, Row]], variant: str) -> str:
    columns = [("find", "right"), ("trace", "right"), ("all", "right"), ("all", "lost"), ("all", "won back")]
    found = [cells[f"{variant}, {kind}: {metric}"] for kind, metric in columns]
    lines = [[name, *(_if_measured(by_scheme.get(name)) for by_scheme in found)] for name in found[2]]
    heading = [f"A: {variant}", *(kind if metric == "right" else metric for kind, metric in columns)]
    alike = {
        work.partition(": ")[2]: rows["isolated"]
        for work, rows in cells.items()
        if work.startswith(f"{variant}, roles")
    }
    said = ", ".join(f"{name} {row['figure']:.3f}" for name, row in alike.items())
    return table(heading, lines) + f"\nThe roles' runs over one text: {said}.\n"


def _if_measured(row: Row | None) -> str:
    return "-" if row is None or row["figure"] is None else with_interval(row)


VIEWS = {
    "training": training,
    "adapters": adapters,
}
