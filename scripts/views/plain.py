"""All rows of a file, as they are."""

from __future__ import annotations

from views.origin import provenance
from views.tables import Document, Row, columns_of, pivot, table, unit_of


def works(document: Document) -> str:
    """All rows: a line for each work, a column for each implementation."""
    cells = pivot(document["rows"])
    names = columns_of(cells)
    lines = [
        [
            work,
            next(iter(row.values()))["unit"],
            *(number(row[name]["figure"]) if name in row else "-" for name in names),
        ]
        for work, row in cells.items()
    ]
    return f"{provenance(document)}\n{table(['work', 'unit', *names], lines, names=2)}"


def number(figure: float) -> str:
    """A count as it is, and what was measured with two decimals."""
    return str(figure) if isinstance(figure, int) else f"{figure:.2f}"


def ways(document: Document) -> str:
    """A line for each way, with a column for each of its figures."""
    cells = pivot(document["rows"])
    heading = ["way", *(f"{work.partition(': ')[2]}, {unit_of(by_name)}" for work, by_name in cells.items())]
    names = columns_of(cells)
    lines = [[name, *(f"{by_name[name]['figure']:.3g}" for by_name in cells.values())] for name in names]
    return f"{table(heading, lines)}\n{provenance(document)}"


def precision(document: Document) -> str:
    """Memory and times of each precision of weights and KV, and how many times as fast as the first."""
    cells, first = pivot(document["rows"]), document["rows"][0]["implementation"]
    heading = ["weights / KV", *(f"{work}, {unit_of(by_name)}" for work, by_name in cells.items())]
    lines = [
        [name.replace("/", " / "), *(precision_cell(by_name.get(name), by_name[first]) for by_name in cells.values())]
        for name in columns_of(cells)
    ]
    return f"{table(heading, lines)}\n{provenance(document)}"


def precision_cell(row: Row | None, first: Row) -> str:
    """A size, or a time and how many times as fast it is.

    >>> precision_cell({"figure": 2.0, "unit": "ms"}, {"figure": 4.0})
    '2.00 (2.00)'
    """
    if row is None:
        return "-"
    faster = f" ({first['figure'] / row['figure']:.2f})" if row["unit"].startswith("ms") else ""
    return f"{row['figure']:.2f}{faster}"


VIEWS = {
    "precision": precision,
    "works": works,
    "ways": ways,
}
