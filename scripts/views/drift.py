"""Methods over a long run, and over one set of prompts in several orders."""

from __future__ import annotations

from collections import defaultdict

from views.origin import provenance
from views.tables import Document, method_name, table

DRIFT = {
    "hit rate": "tokens found",
    "computed_fraction": "work",
    "score": "score",
    "full": "score of full recompute",
    "agreement": "agreement",
    "kl": "KL of the first token",
}


def drift(document: Document) -> str:
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in document["rows"]:
        part, figure = row["work"].split(": ")
        found[row["implementation"], part][figure] = row["figure"]
    lines = [
        [method_name(method), part, *(f"{figures[name]:.2f}" for name in DRIFT)]
        for (method, part), figures in found.items()
    ]
    return provenance(document) + "\n" + table(["method", "part", *DRIFT.values()], lines, names=2)


def orders(document: Document) -> str:
    """The means of each method over the same prompts, for each order in which they came."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in document["rows"]:
        order, figure = row["work"].split(": ")
        found[row["implementation"], order][figure] = row["figure"]
    same = {method: figures["same answer"] for (method, order), figures in found.items() if order == "all orders"}
    shown = {name: heading for name, heading in DRIFT.items() if name != "kl"}
    lines = [
        [method_name(method), order, *(f"{figures[name]:.2f}" for name in shown), f"{same[method]:.2f}"]
        for (method, order), figures in found.items()
        if order != "all orders"
    ]
    heading = ["method", "prompts in", *shown.values(), "same answer in all orders"]
    return provenance(document) + "\n" + table(heading, lines, names=2)


VIEWS = {
    "drift": drift,
    "orders": orders,
}
