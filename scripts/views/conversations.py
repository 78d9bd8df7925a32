"""Conversations, turn by turn."""

from __future__ import annotations

from collections import defaultdict

from views.origin import one_line, provenance
from views.tables import Document, Figures, method_name, optional, table

ANSWERS = {
    "full": "The transcript is full recompute's, the same for all methods:",
    "own": "Each method goes on with its own answers:",
    "scripted": "The transcript is drawn from a seed, the same for all methods:",
}


def conversation_figures(document: Document) -> dict[str, dict[str, dict[str, Figures]]]:
    """Figures by answers, workload and method."""
    found: dict[str, dict[str, dict[str, Figures]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in document["rows"]:
        case, figure = row["work"].split(": ")
        workload, answers = case.split(", ")
        found[answers][workload][row["implementation"]][figure] = row["figure"]
    return found


def conversations(document: Document) -> str:
    """For each way to treat the answers a table of figures, and one of the work turn by turn."""
    parts = [provenance(document)]
    for answers, by_workload in conversation_figures(document).items():
        lines = [
            [workload, method_name(method), *conversation_cells(figures)]
            for workload, by_method in by_workload.items()
            for method, figures in by_method.items()
        ]
        heading = ["workload", "method", "requests", "work", "TTFT sum, s", "dearer", "slower"]
        heading += ["KL, first / last third", "top-1", "agreement"]
        parts.append(f"\n{ANSWERS[answers]}\n\n{table(heading, lines, names=2)}")
        parts.append(f"\nWork turn by turn, % of the prompt's token-layers:\n\n{turns_table(document, answers)}")
    return "".join(parts)


def conversation_cells(figures: Figures) -> list[str]:
    counts = [f"{figures['dearer']:.0f}", f"{figures['slower']:.0f}"]
    kl = " / ".join(optional(figures[f"KL, {third} third"], 3) for third in ("first", "last"))
    shares = [optional(figures[name], 2) for name in ("top-1", "agreement")]
    return [f"{figures['turns']:.0f}", f"{figures['work']:.2f}", f"{figures['TTFT sum']:.2f}", *counts, kl, *shares]


def turns_table(document: Document, answers: str) -> str:
    lines = []
    for turns in document["turns"]:
        if turns["answers"] == answers:
            pairs = zip(turns["work"], turns["prompt_tokens"], strict=True)
            shares = [f"{100 * work / (tokens * document['num_layers']):.0f}" for work, tokens in pairs]
            lines.append([turns["workload"], method_name(turns["method"]), " ".join(shares)])
    return table(["workload", "method", "requests in order"], lines, names=3)


def conversations_headline(document: Document) -> str:
    """The README's table: the prefix cache beside the first other method.

    Work and times are those of one transcript for both, so that turns compare. KL and agreement are those of a method
    that goes on with its own answers, where the file has them.
    """
    found = conversation_figures(document)
    same = next(found[answers] for answers in ("full", "scripted") if answers in found)
    free = found.get("own", same)
    method = next(name for name in document["settings"]["methods"] if name != "prefix")
    lines = [
        headline_line(name, by_method["prefix"], by_method[method], free[name][method])
        for name, by_method in same.items()
    ]
    heading = ["conversation", "requests", "work: prefix cache", f"`{method}`", "TTFT sum, s: prefix cache"]
    heading += [f"`{method}`", "turns with more work / slower", "KL, first / last third", "agreement"]
    return table(heading, lines) + "\n" + one_line(document)


def headline_line(name: str, prefix: Figures, method: Figures, free: Figures) -> list[str]:
    work, ttft = ([f"{figures[what]:.2f}" for figures in (prefix, method)] for what in ("work", "TTFT sum"))
    counts = f"{method['dearer']:.0f} / {method['slower']:.0f}"
    kl = " / ".join(optional(free[f"KL, {third} third"], 3) for third in ("first", "last"))
    return [name, f"{method['turns']:.0f}", *work, *ttft, counts, kl, optional(free["agreement"], 2)]


VIEWS = {
    "conversations": conversations,
    "conversations_headline": conversations_headline,
}
