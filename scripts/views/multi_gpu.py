"""One model on several numbers of devices: figures, gains and what all-reduces take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from views.origin import provenance
from views.tables import Document, Row, table


def multi_gpu(document: Document) -> str:
    """Each work on each number of devices: its figure, the gain over the fewest devices, the all-reduces' share."""
    measured = [row for row in document["rows"] if row["figure"] is not None]
    numbers = sorted({row["devices"] for row in measured})
    cells: dict[tuple[str, str, str], dict[int, Row]] = defaultdict(dict)
    for row in measured:
        cells[row["work"], row["implementation"], row["unit"]][row["devices"]] = row
    lines = [[*names, *(on_devices(row, number) for number in numbers)] for names, row in cells.items()]
    heading = ["work", "method", "unit", *(f"{number} device{'s' * (number > 1)}" for number in numbers)]
    shown = [provenance(document), table(heading, lines, names=3), speedups(measured, numbers), reasons(document)]
    return "\n".join(filter(None, shown))


def on_devices(by_number: dict[int, Row], number: int) -> str:
    """
    >>> on_devices({1: {"figure": 90.0, "unit": "ms"}, 2: {"figure": 50.0, "unit": "ms", "all_reduces": 5.0}}, 2)
    '50.00 (1.80 times, all-reduces 10 %)'
    """
    if number not in by_number:
        return "-"
    row, first = by_number[number], by_number[min(by_number)]
    beside = []
    if row is not first and row["unit"].startswith("ms"):
        beside.append(f"{first['figure'] / row['figure']:.2f} times")
    if row.get("all_reduces") is not None:
        beside.append(f"all-reduces {100 * row['all_reduces'] / row['figure']:.0f} %")
    return f"{row['figure']:.2f}" + f" ({', '.join(beside)})" * bool(beside)


def speedups(measured: Sequence[Row], numbers: Sequence[int]) -> str:
    """How many times as fast as full recompute each other method is, on each number of devices."""
    figures = {(row["work"], row["implementation"], row["devices"]): row["figure"] for row in measured}
    names = [(work, name) for work, name, _ in figures if name.startswith("sparsex") and "TTFT" in work]
    lines = []
    for work, name in dict.fromkeys(names):
        pairs = [(figures.get((work, "full", number)), figures.get((work, name, number))) for number in numbers]
        lines.append([work, name, *(f"{full / it:.2f}" if full and it else "-" for full, it in pairs)])
    heading = ["full recompute's time / it", "method", *map(str, numbers)]
    return table(heading, lines, names=2) if lines else ""


def reasons(document: Document) -> str:
    """What was not measured, and why."""
    left_out = [row for row in document["rows"] if row["figure"] is None]
    return "".join(f"* Not measured on {row['devices']}: {row['work']}: {row['why']}\n" for row in left_out)


VIEWS = {"multi_gpu": multi_gpu}
