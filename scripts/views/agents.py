"""Agents that read the same texts, and what their contexts take of the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from views.origin import provenance
from views.tables import GIB, Document, table

AGENTS = {
    "prompts": "prompt tokens/s",
    "answers": "new tokens/s",
    "computed": "computed",
    "hit rate": "found",
    "store": "store, GiB",
}
# Where a file has them.
AGENTS_KEEP = {"contexts, smaller than dense": "contexts, times smaller", "mirror, of dense": "mirror, of dense"}
AGENTS_DIGITS = {"prompts": ",.0f", "answers": ",.0f", "computed": ".2f", "hit rate": ".2f", "store": ".2f"}


def agents(document: Document) -> str:
    """For each workload and history: each way's worst first token by the number of agents, and what the most had."""
    cases: dict[tuple[str, str], dict[str, dict[int, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    limits: dict[tuple[str, str, str], float] = {}
    for row in document["rows"]:
        work, figure = row["work"].split(": ")
        workload, *number, shared = work.split(", ")
        if not number:
            limits[workload, shared, row["implementation"]] = row["figure"]
            continue
        by_number = cases[workload, shared][row["implementation"]]
        by_number.setdefault(int(number[0].split()[0]), {})[figure] = row["figure"]
    limit = f"agents within {document['settings']['limit']:g} s"
    tables = [agents_table(case, ways, limits, limit) for case, ways in cases.items()]
    return provenance(document) + "".join(f"\n{each}" for each in tables)


def agents_table(
    case: tuple[str, str],
    ways: Mapping[str, Mapping[int, Mapping[str, float]]],
    limits: Mapping[tuple[str, str, str], float],
    limit: str,
) -> str:
    workload, shared = case
    numbers = sorted({number for by_number in ways.values() for number in by_number})
    times = [f"{number} agents, s" for number in numbers]
    heading = [f"{workload}, {shared.removesuffix(' shared')} tokens shared", *times, limit, *AGENTS.values()]
    keep = [name for name in AGENTS_KEEP if any(name in each for by in ways.values() for each in by.values())]
    lines = []
    for way, by_number in ways.items():
        most = by_number[max(by_number)]
        worst = [f"{by_number[n]['TTFT, worst']:.2f}" if n in by_number else "-" for n in numbers]
        others = [f"{most[name] / (GIB if name == 'store' else 1):{digits}}" for name, digits in AGENTS_DIGITS.items()]
        kept = [f"{most[name]:.3g}" if name in most else "-" for name in keep]
        lines.append([way, *worst, f"{limits[workload, shared, way]:.0f}", *others, *kept])
    return table([*heading, *map(AGENTS_KEEP.__getitem__, keep)], lines)


def mirrors(document: Document) -> str:
    """What contexts of agents take of a store, and how many agents a store for four keeps."""
    debates, kept = defaultdict(dict), defaultdict(dict)
    for row in document["rows"]:
        work, figure = row["work"].split(": ")
        cases = debates if work.startswith("debate") else kept
        cases[work, row["implementation"]][figure] = row["figure"]
    heading = [
        "agents",
        "shared tokens",
        "answered",
        "a mirror, of dense",
        "the largest",
        "all together, GiB",
        "times smaller",
    ]
    lines = [_of_debate(*about, figures) for about, figures in debates.items()]
    turns = [[work, way, *(f"{figure:.3g}" for figure in figures.values())] for (work, way), figures in kept.items()]
    names = ["turns", "store", *(name for name in next(iter(kept.values())))]
    return provenance(document) + "\n" + table(heading, lines, names=3) + "\n" + table(names, turns, names=2)


def _of_debate(work: str, way: str, figures: Mapping[str, float]) -> list[str]:
    _, agents, shared = work.split(", ")
    shares = [f"{figures[name]:.3f}" for name in ("mirror, of dense", "largest mirror, of dense")]
    together = f"{figures['together'] / GIB:.2f}"
    return [agents.split()[0], shared.split()[0], way, *shares, together, f"{figures['smaller than dense']:.2f}"]


VIEWS = {
    "agents": agents,
    "mirrors": mirrors,
}
