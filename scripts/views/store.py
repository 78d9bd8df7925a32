"""What is found in the store, and what comes back from the tiers below it."""

from __future__ import annotations

from collections import defaultdict

from views.origin import provenance
from views.tables import Document, pivot, table


def lookup(document: Document) -> str:
    """Milliseconds and tokens found; a work has two rows of each implementation."""
    cells: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in document["rows"]:
        cells[row["work"]][row["implementation"], row["unit"]] = row["figure"]
    names = list(dict.fromkeys(row["implementation"] for row in document["rows"]))
    lines = [[work, *(lookup_cell(by_name, name) for name in names)] for work, by_name in cells.items()]
    return provenance(document) + "\n" + table(["100,000 prompt tokens", *names], lines)


def lookup_cell(cells: dict[tuple[str, str], float], name: str) -> str:
    if (name, "ms") not in cells:
        return "-"
    found = cells.get((name, "tokens found"))
    time = cells[name, "ms"]
    return f"{time:.{1 if time >= 1 else 3}f} ms" + ("" if found is None else f", finds {found:.0f}")


def link(document: Document) -> str:
    """Rates by the size of pieces, then one table of all else."""
    cells = pivot(document["rows"])
    sizes = {work: by_name for work, by_name in cells.items() if work.startswith("pieces")}
    ways = ("down", "up", "both")
    rates = [[work, *(f"{by_name[way]['figure']:.1f}" for way in ways)] for work, by_name in sizes.items()]
    others = [row for row in document["rows"] if row["work"] not in sizes]
    lines = [[row["work"], row["implementation"], f"{row['figure']:.1f} {row['unit']}"] for row in others]
    tables = table(["GB/s", *ways], rates) + "\n" + table(["work", "how", "figure"], lines, names=2)
    return provenance(document) + "\n" + tables


def fetch(document: Document) -> str:
    """How fast blocks come from another replica and what that costs, then what a thread takes for their bytes."""
    cells = pivot(document["rows"])
    floor = cells.pop("one thread")
    names = ("first round", "later round", "processor, giving", "processor, asking")
    heading = ["blocks", *(f"{name}, {next(iter(cells.values()))[name]['unit']}" for name in names)]
    lines = [[work, *(f"{by_name[name]['figure']:.2f}" for name in names)] for work, by_name in cells.items()]
    others = [[name, f"{row['figure']:.2f}"] for name, row in floor.items()]
    tables = table(heading, lines) + "\n" + table(["one thread", "s/GB"], others)
    return provenance(document) + "\n" + tables


def restore(document: Document) -> str:
    """How long stored prefixes take to come back, measured and predicted."""
    rows = [
        [
            row["work"],
            row["implementation"],
            f"{row['figure']:.1f} {row['unit']}",
            "" if row["predicted"] is None else f"{row['predicted']:.1f}",
        ]
        for row in document["rows"]
    ]
    return provenance(document) + "\n" + table(["prefix", "how", "figure", "predicted"], rows, names=2)


def tiers(document: Document) -> str:
    """Times to the first token of sessions that come, and come back."""
    columns = ("figure", "worst", "loaded_tokens")
    rows = [[row["work"], *(f"{row[name]:.0f}" for name in columns)] for row in document["rows"]]
    return provenance(document) + "\n" + table(["sessions, tier", "median, ms", "worst, ms", "tokens loaded"], rows)


def segments(document: Document) -> str:
    """Times to the first token of a prompt whose segments are in host memory, beside those where they are not."""
    in_store = {row["work"]: row["figure"] for row in document["rows"] if row["implementation"] == "in the store"}
    rows = [
        [row["work"], row["implementation"], f"{row['figure']:.0f}", f"{row['figure'] / in_store[row['work']]:.2f}"]
        for row in document["rows"]
    ]
    return provenance(document) + "\n" + table(["prompt", "segments are", "ms", "times"], rows, names=2)


VIEWS = {
    "lookup": lookup,
    "link": link,
    "fetch": fetch,
    "restore": restore,
    "tiers": tiers,
    "segments": segments,
}
