"""Markdown tables, and the cells that views share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]
Figures = dict[str, float | None]
GIB = 2**30
REMOVED_OPTIONS = ("focus", "per_segment", "sum_layers")  # runs kept here used them; ReuseConfig has not


def table(heading: Sequence[str], lines: Iterable[Sequence[str]], names: int = 1) -> str:
    """A Markdown table whose first `names` columns are text and whose others are numbers.

    >>> print(table(["method", "score"], [["full", "0.93"]]), end="")
    | method | score |
    | --- | --: |
    | full | 0.93 |
    """
    rule = ["---"] * names + ["--:"] * (len(heading) - names)
    return "".join(f"| {' | '.join(line)} |\n" for line in (heading, rule, *lines))


def method_name(text: str) -> str:
    """A method as code, marked if it has an option that exists no more.

    >>> method_name("sparsex:boundary_layer=8:sum_layers=true")
    '`sparsex:boundary_layer=8:sum_layers=true` †'
    >>> method_name("focus:pool_tokens=16")
    '`focus:pool_tokens=16`'
    """
    options = {setting.partition("=")[0] for setting in text.split(":")[1:]}
    return f"`{text}`" + " †" * (not options.isdisjoint(REMOVED_OPTIONS))


def pivot(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by work and implementation, in the file's order."""
    cells: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[row["work"]][row["implementation"]] = row
    return dict(cells)


def columns_of(cells: Mapping[Any, dict[str, Row]]) -> list[str]:
    """Every implementation that has a row, in order of appearance."""
    return list(dict.fromkeys(name for by_name in cells.values() for name in by_name))


def unit_of(rows: dict[str, Row]) -> str:
    """
    >>> unit_of({"fp8/fp8": {"unit": "ms a step"}})
    'ms a step'
    """
    return next(iter(rows.values()))["unit"]


def with_interval(row: Row) -> str:
    """
    >>> with_interval({"figure": 0.5, "low": 0.25, "high": 0.75})
    '0.50 [0.25, 0.75]'
    """
    return f"{row['figure']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def optional(figure: float | None, digits: int) -> str:
    """
    >>> optional(0.126, 2), optional(None, 2)
    ('0.13', '-')
    """
    return "-" if figure is None else f"{figure:.{digits}f}"
