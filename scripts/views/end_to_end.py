"""Times to the first token of whole prompts, by method and length."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from views.origin import one_line, provenance
from views.tables import Document, Row, columns_of, table

CASE = re.compile(r"TTFT, (\d+) tokens(?:, (.* reused in .*))?")  # not of prefixes, which only one method finds
HEADLINE_TIMES = ("transformers, SDPA", "plain scan", "full", "sparsex l*=3, 15 %", "sparsex l*=0, 5 %", "naive")


def first_tokens(document: Document) -> dict[tuple[int, str], dict[str, Row]]:
    """Rows of times to the first token by (prompt tokens, how it was reused). What has no reuse goes with all."""
    cases: dict[tuple[int, str], dict[str, Row]] = defaultdict(dict)
    for row in document["rows"]:
        if (case := CASE.fullmatch(row["work"])) and case[2]:
            cases[int(case[1]), case[2]][row["implementation"]] = row
    for row in document["rows"]:
        if (case := CASE.fullmatch(row["work"])) and not case[2]:
            for (tokens, _), cells in cases.items():
                if tokens == int(case[1]):
                    cells[row["implementation"]] = row
    return dict(cases)


def case_names(cases: Iterable[tuple[int, str]]) -> list[str]:
    """What tells the cases apart: how long they are, or how they are interleaved."""
    cases = list(cases)
    differ = len({tokens for tokens, _ in cases}) > 1
    return [f"{tokens} tokens" if differ else reused for tokens, reused in cases]


def times_table(document: Document, names: Sequence[str] | None = None) -> str:
    """Milliseconds, and how many times faster than full recompute in the same run. None shows all implementations."""
    cases = first_tokens(document)
    lines = [[name, *(time_cell(cells, name) for cells in cases.values())] for name in names or columns_of(cases)]
    return table(["", *case_names(cases)], lines)


def time_cell(cells: dict[str, Row], name: str) -> str:
    if name not in cells:
        return "-"
    figure, full = cells[name]["figure"], cells["full"]["figure"]
    faster = "" if name == "full" or cells[name]["computed"] is None else f" ({full / figure:.1f}x)"
    return f"{figure:.{1 if figure < 10 else 0}f}{faster}"


def bounds_table(document: Document) -> str:
    """Share of token-layers computed, the time that the work takes at full recompute's pace, and the cost model's."""
    cases = first_tokens(document)
    some = next(iter(cases.values()))
    lines = []
    for name in [name for name, row in some.items() if row["computed"] is not None]:
        rows = [cells[name] for cells in cases.values()]
        lines.append([name, *(f"{r['computed']:.0%}, {r['bound']:.0f}, {r['predicted']:.0f}" for r in rows)])
    return table(["", *case_names(cases)], lines)


def end_to_end(document: Document) -> str:
    parts = [
        provenance(document),
        f"\nMilliseconds to the first token{how_reused(document)}:\n\n",
        times_table(document),
        "\nShare of token-layers computed; what the work takes at full recompute's pace, ms; the cost model's, ms:\n\n",
        bounds_table(document),
        decode_and_agents(document),
    ]
    return "".join(parts)


def how_reused(document: Document) -> str:
    """Says it where all cases agree and the columns do not."""
    ways = {reused for _, reused in first_tokens(document)}
    return f", {ways.pop()} segments" if len(ways) == 1 else ""


def decode_and_agents(document: Document) -> str:
    rows = [row for row in document["rows"] if not CASE.fullmatch(row["work"])]
    if not rows:
        return ""
    lines = []
    for row in rows:
        bound = f"{row['bound']:.1f} ({row['bound'] / row['figure']:.0%})" if row["bound"] else "-"
        lines.append([row["work"], row["implementation"], f"{row['figure']:.1f}", row["unit"], bound])
    heading = ["work", "method", "figure", "unit", "what its bytes take at the rate of a copy"]
    return "\n" + table(heading, lines, names=2)


def speed_headline(document: Document) -> str:
    """The README's table."""
    return times_table(document, HEADLINE_TIMES) + "\n" + one_line(document)


def checkouts(document: Document) -> str:
    """Milliseconds of two checkouts, and how many times as long the later one takes: for each method, by length."""
    cells: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in document["rows"]:
        cells[row["method"]][row["tokens"]] = row
    lengths = list(dict.fromkeys(row["tokens"] for row in document["rows"]))
    lines = [[method, *(checkout_cell(by_length[length]) for length in lengths)] for method, by_length in cells.items()]
    before, after = document["commits"]["before"], document["commits"]["after"]
    head = f"{provenance(document)}* Commits: before {before}, after {after}\n\n"
    return head + table(["ms before / after (ratio)", *(f"{length} tokens" for length in lengths)], lines)


def checkout_cell(row: Row) -> str:
    return f"{row['before_ms']:.1f} / {row['after_ms']:.1f} ({row['ratio']:.2f})"


VIEWS = {
    "end_to_end": end_to_end,
    "speed_headline": speed_headline,
    "checkouts": checkouts,
}
