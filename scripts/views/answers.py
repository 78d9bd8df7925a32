"""Answers beside those of other implementations."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from views.origin import provenance
from views.tables import Document, Row, table


def answers(document: Document) -> str:
    """How many answers are equal to those of each reference, and where the others part."""
    by_reference: dict[str, list[Row]] = defaultdict(list)
    for row in document["rows"]:
        by_reference[row["reference"]].append(row)
    heading = [
        "reference",
        "computes",
        "equal",
        "near ties",
        "different",
        "same prompt tokens",
        "first tokens differ by",
    ]
    lines = [answer_counts(rows) for rows in by_reference.values()]
    parted = partings([row for row in document["rows"] if not row["equal"]])
    return f"{table(heading, lines, names=2)}\n{parted}{provenance(document)}"


def answer_counts(rows: Sequence[Row]) -> list[str]:
    equal, ties = sum(row["equal"] for row in rows), sum(row.get("near_tie", False) for row in rows)
    same = sum(row["same_prompt_tokens"] for row in rows)
    counts = [f"{count} of {len(rows)}" for count in (equal, ties, len(rows) - equal - ties, same)]
    reference = f"{rows[0]['reference']} {rows[0]['version']}"
    return [reference, rows[0]["computes"], *counts, f"{max(row['first_token_difference'] for row in rows):.1e}"]


def partings(rows: Sequence[Row]) -> str:
    """Where answers part: the place, what each side says there, and its margin over the other's token, in logits."""
    if not rows:
        return ""
    heading = ["reference", "prompt", "ours / theirs", "at token", "our margin", "their margin"]
    lines = [
        [row["reference"], row["prompt"], said(row), str(row["at"]), *(f"{margin:.3f}" for margin in row["margins"])]
        for row in rows
    ]
    return f"{table(heading, lines, names=3)}\n"


def said(row: Row) -> str:
    """
    >>> said({"texts": [" a", "\\n"]})
    '`" a"` / `"\\\\n"`'
    """
    return " / ".join(f"`{json.dumps(text, ensure_ascii=False)}`" for text in row["texts"])


VIEWS = {
    "answers": answers,
}
