"""Write the tables of the READMEs from the JSON files in `scripts/results`.

    python scripts/report_results.py            # rewrites the tables in place
    python scripts/report_results.py --check    # exits with 1 if a table is not what its file says

A README is prose with blocks in it. A block names a view of a result file, and everything between its two lines is
generated:

    <!-- results: quality quality-ruler-tiny-nvidia-h100-80gb-hbm3.json -->
    <!-- end -->

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
READMES = (ROOT / "README.md", RESULTS / "README.md")

BLOCK = re.compile(r"(<!-- results: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
REMOVED_OPTIONS = ("focus", "per_segment", "sum_layers")  # runs kept here used them; ReuseConfig has not
GIB = 2**30

Document = dict[str, Any]
Row = dict[str, Any]
View = Callable[[Document], str]


# Markdown ---------------------------------------------------------------------------------------------------


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


# How a file was made ----------------------------------------------------------------------------------------


def provenance(document: Document) -> str:
    """Command, device, versions, commit, settings and note of a result file."""
    facts = [device_of(document), versions_of(document), commit_of(document)]
    lines = [f"* Command: `{document.get('command', 'python scripts/report_tpu.py')}`"]
    lines.append(f"* Run on: {'; '.join(filter(None, facts))}")
    if settings := settings_of(document):
        lines.append(f"* Settings: {settings}")
    if note := document.get("note"):
        lines.append(f"* Note in the file: {note}")
    return "\n".join(lines) + "\n"


def one_line(document: Document) -> str:
    """The same for a README that links to the rest, without the names of all methods."""
    command = re.sub(r"--methods \S+ ", "", document["command"])
    return f"{device_of(document)}, {versions_of(document)}, {commit_of(document)}: `{command}`\n"


def device_of(document: Document) -> str:
    """The accelerator, or the CPU and how many cores it had."""
    device, cores = document.get("device", "cpu"), document.get("machine", {}).get("cpus")
    if "steps" in document:
        return "no device: compiled for chips that were described to the compiler"
    if device != "cpu":
        return device
    return f"CPU, {cores} cores" if cores else "CPU"


def versions_of(document: Document) -> str:
    names = {"jax": "JAX", "numpy": "NumPy", "python": "Python"}
    versions = document.get("versions", {}).items()
    return ", ".join(f"{names.get(name, name)} {version}" for name, version in versions if name != "sparsex")


def commit_of(document: Document) -> str:
    """
    >>> commit_of({"commit": "a5090a26bfd2221a4bea04b1215fcfe3e066e466-dirty"})
    'commit a5090a26bfd2 with uncommitted changes'
    """
    commit, _, dirty = document.get("commit", "").partition("-")
    return f"commit {commit[:12]}" + " with uncommitted changes" * bool(dirty) if commit else ""


def settings_of(document: Document) -> str:
    settings = document.get("settings", {}).items()
    return ", ".join(f"{key} {value}" for key, value in settings if not isinstance(value, list))


# Quality ----------------------------------------------------------------------------------------------------

ALL_TASKS = "all"
BESIDE_SCORE = {
    "computed_fraction": "work",
    "flops_fraction": "FLOPs",
    "kl": "KL",
    "top1": "top-1",
    "agreement": "agreement",
    "ttft_s": "TTFT, s",
}


def quality_cells(document: Document) -> dict[tuple[str, str, str, str], Row]:
    """Rows by (regime, method, task, metric)."""
    cells = {}
    for row in document["rows"]:
        cell, metric = row["work"].rsplit(": ", 1)
        task, regime = cell.split(", ")
        cells[regime, row["implementation"], task, metric] = row
    return cells


def quality(document: Document) -> str:
    """A table for each regime. Times are left out where the file says that they do not compare."""
    comparable = "Times to the first token" not in (document.get("note") or "")
    measured = {metric for *_, metric in quality_cells(document)}
    metrics = [metric for metric in BESIDE_SCORE if metric in measured and (metric != "ttft_s" or comparable)]
    tables = [f"\nRegime *{regime}*:\n\n{regime_table(document, regime, metrics)}" for regime in regimes_of(document)]
    return provenance(document) + "".join(tables)


def regimes_of(document: Document) -> list[str]:
    return list(dict.fromkeys(regime for regime, *_ in quality_cells(document)))


def regime_table(document: Document, regime: str, metrics: Sequence[str]) -> str:
    cells, tasks = quality_cells(document), document["settings"]["tasks"]
    shown = [*tasks, ALL_TASKS] if len(tasks) > 1 else tasks
    lines = []
    for method in document["settings"]["methods"]:
        scores = [with_interval(cells[regime, method, task, "score"]) for task in shown]
        beside = [f"{cells[regime, method, ALL_TASKS, metric]['figure']:.3f}" for metric in metrics]
        lines.append([method_name(method), *scores, *beside])
    return table(["method", *shown, *(BESIDE_SCORE[metric] for metric in metrics)], lines)


def with_interval(row: Row) -> str:
    """
    >>> with_interval({"figure": 0.5, "low": 0.25, "high": 0.75})
    '0.50 [0.25, 0.75]'
    """
    return f"{row['figure']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


HEADLINE_METHODS = (
    "full",
    "naive",
    "epic",
    "cacheblend",
    "prophetkv",
    "sparsex:boundary_layer=0",
    "sparsex:boundary_layer=2",
    "sparsex:boundary_layer=4",
    "sparsex:boundary_layer=8",
)


def quality_headline(document: Document) -> str:
    """Some methods, two tasks and the mean of all, in both regimes."""
    cells, shown = quality_cells(document), ("vt", "cwe", ALL_TASKS)
    pairs = [(regime, task) for regime in ("joint", "independent") for task in shown]
    lines = []
    for method in HEADLINE_METHODS:
        work = cells["joint", method, ALL_TASKS, "computed_fraction"]["figure"]
        scores = [f"{cells[regime, method, task, 'score']['figure']:.2f}" for regime, task in pairs]
        lines.append([method_name(method), f"{work:.2f}", *scores])
    tasks = [task if task != ALL_TASKS else "all five" for _, task in pairs]
    heading = [f"{regime}: {task}" for (regime, _), task in zip(pairs, tasks, strict=True)]
    return table(["method", "work", *heading], lines) + "\n" + one_line(document)


def quality_summary(document: Document) -> str:
    """The mean of all tasks by each method in the file's only regime, the share of the operations, and the time."""
    cells, (regime,) = quality_cells(document), regimes_of(document)
    lines = []
    for method in document["settings"]["methods"]:
        score, flops, ttft = (cells[regime, method, ALL_TASKS, name] for name in ("score", "flops_fraction", "ttft_s"))
        figures = with_interval(score), f"{flops['figure']:.2f}", f"{1e3 * ttft['figure']:.0f}"
        lines.append([method_name(method), *figures])
    return table(["method", "score", "FLOPs", "TTFT, ms"], lines) + "\n" + one_line(document)


# End to end -------------------------------------------------------------------------------------------------

CASE = re.compile(r"TTFT, (\d+) tokens(?:, (.* reused in .*))?")  # not of prefixes, which only one method finds


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


def works(document: Document) -> str:
    """All rows: a line for each work, a column for each implementation."""
    cells = pivot(document["rows"])
    names = columns_of(cells)
    lines = [
        [
            work,
            next(iter(row.values()))["unit"],
            *(f"{row[name]['figure']:.2f}" if name in row else "-" for name in names),
        ]
        for work, row in cells.items()
    ]
    return f"{provenance(document)}\n{table(['work', 'unit', *names], lines, names=2)}"


HEADLINE_TIMES = ("transformers, SDPA", "plain scan", "full", "sparsex l*=3, 15 %", "sparsex l*=0, 5 %", "naive")


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


# Kernels ----------------------------------------------------------------------------------------------------


OURS = ("hopper", "triton")


def kernels(document: Document) -> str:
    """Milliseconds, and the rate as a share of what a large product or a copy reaches in the same run."""
    cells = pivot(document["rows"])
    names = sorted(columns_of(cells), key=lambda name: name not in OURS)
    lines = [[work, *(kernel_cell(by_name.get(name), cells) for name in names)] for work, by_name in cells.items()]
    return provenance(document) + "\n" + table(["work", *names], lines)


def kernel_cell(row: Row | None, cells: dict[str, dict[str, Row]]) -> str:
    if row is None:
        return "-"
    if "matmul 8192" not in cells:
        return f"{row['figure']:.2f}"
    peak = cells["matmul 8192"]["xla"]["tflops"]
    bandwidth = cells["copy 1 GB"]["xla"]["terabytes_per_second"]
    compute, memory = row["tflops"] / peak, row["terabytes_per_second"] / bandwidth
    rate = f"{row['tflops']:.0f} TFLOP/s" if compute > memory else f"{row['terabytes_per_second']:.2f} TB/s"
    return f"{row['figure']:.2f} ({rate}, {max(compute, memory):.0%})"


def kernel_errors(document: Document) -> str:
    cells = pivot(document["rows"])
    names = columns_of(cells)
    lines = []
    for work, by_name in cells.items():
        lines.append([work, *(f"{by_name[name]['figure']:.2e}" if name in by_name else "-" for name in names)])
    return provenance(document) + "\n" + table(["work", *names], lines)


# The host ---------------------------------------------------------------------------------------------------


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


# Link -------------------------------------------------------------------------------------------------------


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


# Tiers ------------------------------------------------------------------------------------------------------


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


# Serving ----------------------------------------------------------------------------------------------------


# Of prompt tokens, and of token-layers. In files that have no "recomputed", "reused" is all that was found in segments.
SHARES = ("prefix", "approximate prefix", "reused", "recomputed", "fresh", "computed")


def experts(document: Document) -> str:
    """A layer of experts beside its floors."""
    lines = [
        [row["work"], row["implementation"], f"{row['figure']:.3f}", f"{row['tflops']:.0f}",
         f"{row['terabytes_per_second']:.2f}", f"{row['share']:.0%}" if row["share"] is not None else ""]
        for row in document["rows"]
    ]  # fmt: skip
    heading = ["work", "implementation", "ms", "TFLOP/s", "TB/s", "of the floor"]
    return f"{table(heading, lines, names=2)}\n{provenance(document)}"


def precision(document: Document) -> str:
    """Memory and times of each precision of weights and KV, and how many times as fast as the first."""
    cells, first = pivot(document["rows"]), document["rows"][0]["implementation"]
    heading = ["weights / KV", *(f"{work}, {unit_of(by_name)}" for work, by_name in cells.items())]
    lines = [
        [name.replace("/", " / "), *(precision_cell(by_name.get(name), by_name[first]) for by_name in cells.values())]
        for name in columns_of(cells)
    ]
    return f"{table(heading, lines)}\n{provenance(document)}"


def unit_of(rows: dict[str, Row]) -> str:
    """
    >>> unit_of({"fp8/fp8": {"unit": "ms a step"}})
    'ms a step'
    """
    return next(iter(rows.values()))["unit"]


def precision_cell(row: Row | None, first: Row) -> str:
    """A size, or a time and how many times as fast it is.

    >>> precision_cell({"figure": 2.0, "unit": "ms"}, {"figure": 4.0})
    '2.00 (2.00)'
    """
    if row is None:
        return "-"
    faster = f" ({first['figure'] / row['figure']:.2f})" if row["unit"].startswith("ms") else ""
    return f"{row['figure']:.2f}{faster}"


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


def structure(document: Document) -> str:
    """What a token takes with and without a structure."""
    lines = [
        [row["work"], f"{row['figure']:.2f}", f"{row['ratio']:.2f}" if "ratio" in row else ""]
        for row in document["rows"]
    ]
    host = ", ".join(f"{name} {microseconds:.0f}" for name, microseconds in document["host_us"].items())
    heading = ["answers", "ms a token", "of that without a structure"]
    return f"{table(heading, lines)}\nOn the host, microseconds: {host}.\n\n{provenance(document)}"


def soak(document: Document) -> str:
    """What a server was like under a load that it cannot sustain."""
    lines = [[row["work"], f"{row['figure']:g} {row['unit']}"] for row in document["rows"]]
    return f"{table(['what', 'figure'], lines)}\n{provenance(document)}"


def serving(document: Document) -> str:
    """A table for each workload."""
    tables = [
        f"\n*{name}*, {rate:.2f} requests a second:\n\n{workload_table(document, name)}"
        for name, rate in document["rates"].items()
    ]
    return provenance(document) + "".join(tables)


def workload_table(document: Document, workload: str) -> str:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in document["rows"]:
        name, figure = row["work"].split(": ")
        if name == workload:
            found[row["implementation"]][figure] = row["figure"]
    heading = ["method", "TTFT p50 / p95 / p99, s", "ITL p50 / p95 / p99, ms", "generated, tokens/s"]
    shares = [name for name in SHARES if name in next(iter(found.values()))]
    heading += ["prompt, tokens/s", "goodput, 1/s", *shares]
    return table(heading, [serving_line(method, figures, shares) for method, figures in found.items()])


def serving_line(method: str, figures: dict[str, float], shares: Sequence[str]) -> list[str]:
    ttft = " / ".join(f"{figures[f'TTFT p{p}']:.2f}" for p in (50, 95, 99))
    gaps = " / ".join(f"{figures[f'ITL p{p}']:.0f}" for p in (50, 95, 99))
    rates = [f"{figures[name]:.1f}" for name in ("generated", "prompt")]
    percent = [f"{figures[name]:.0%}" for name in shares]
    return [method_name(method), ttft, gaps, *rates, f"{figures['goodput']:.2f}", *percent]


def routing(document: Document) -> str:
    """A table for each workload: a line for each policy, a column for each figure."""
    works = pivot(document["rows"])
    names = dict.fromkeys(work.partition(": ")[0] for work in works)
    tables = (routing_table({w: r for w, r in works.items() if w.startswith(f"{name}: ")}, name) for name in names)
    return provenance(document) + "".join(tables)


def routing_table(works: Mapping[str, dict[str, Row]], name: str) -> str:
    heading = ["policy", *(work.partition(": ")[2] for work in works)]
    lines = [
        [policy, *(routing_cell(by_policy[policy]) for by_policy in works.values())] for policy in columns_of(works)
    ]
    return f"\n*{name}*:\n\n{table(heading, lines)}"


def routing_cell(row: Row) -> str:
    """
    >>> routing_cell({"figure": 0.602, "unit": "share of tokens"}), routing_cell({"figure": 1.471, "unit": "s"})
    ('60 %', '1.47 s')
    """
    share = row["unit"].startswith("share")
    return f"{100 * row['figure']:.0f} %" if share else f"{row['figure']:.2f} {row['unit'].replace('requests', '')}"


# Conversations ----------------------------------------------------------------------------------------------

Figures = dict[str, float | None]


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


ANSWERS = {
    "full": "The transcript is full recompute's, the same for all methods:",
    "own": "Each method goes on with its own answers:",
    "scripted": "The transcript is drawn from a seed, the same for all methods:",
}


def conversation_cells(figures: Figures) -> list[str]:
    counts = [f"{figures['dearer']:.0f}", f"{figures['slower']:.0f}"]
    kl = " / ".join(optional(figures[f"KL, {third} third"], 3) for third in ("first", "last"))
    shares = [optional(figures[name], 2) for name in ("top-1", "agreement")]
    return [f"{figures['turns']:.0f}", f"{figures['work']:.2f}", f"{figures['TTFT sum']:.2f}", *counts, kl, *shares]


def optional(figure: float | None, digits: int) -> str:
    """
    >>> optional(0.126, 2), optional(None, 2)
    ('0.13', '-')
    """
    return "-" if figure is None else f"{figure:.{digits}f}"


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


# Drift, calibration, training -------------------------------------------------------------------------------


DRIFT = {
    "hit rate": "tokens found",
    "computed_fraction": "work",
    "score": "score",
    "full": "score of full recompute",
    "agreement": "agreement",
    "kl": "KL of the first token",
}


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


def calibration(document: Document) -> str:
    """What was selected for each regime, and what it was measured to do."""
    measured, prompts = document["measured"], document["measured"]["prompts"]
    metric, limit = (measured["target"][key] for key in ("metric", "most"))
    asked = f"{'/'.join(prompts['tasks'])}, {prompts['num_tokens']} tokens in {prompts['num_segments']} segments"
    heading = ["regime", "selected", "FLOPs", metric, "confirmed", "score", "full's", "KL", "tried", "refuted"]
    lines = [_selected(*each, measured["full_scores"], metric) for each in measured["by_regime"].items()]
    target = f"* Asked: {asked}; {metric} <= {limit}. Where the selected is `prefix`, figures are of the nearest.\n"
    return provenance(document) + target + "\n" + table(heading, lines, names=2)


def _selected(regime: str, found: Document, full_scores: dict[str, float], metric: str) -> list[str]:
    figures = found["figures"][regime]
    means = [f"{value:.2f}" for value in (figures["score"], full_scores[regime], figures["kl"])]
    intervals = [_interval(figures.get(name)) for name in (metric, "confirmed")]
    chosen = f"`{found['basis']}`" if found["met"] else f"`prefix`; nearest: `{found['basis']}`"
    counts = [str(found[name]) for name in ("candidates", "refuted")]
    return [regime, chosen, f"{figures['flops_fraction']:.2f}", *intervals, *means, *counts]


def _interval(figure: Document | None) -> str:
    """A mean with its interval and the number of prompts."""
    if figure is None:
        return "-"
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}], {figure['samples']}"


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


# Fleets -----------------------------------------------------------------------------------------------------

FLEET_DIGITS = {"digests, B/s": ",.0f", "samples held": ",.0f", "requests": ",.0f"}
FLEET_PARTS = {
    "policies": ("hit rate", "computed", "TTFT p50", "TTFT p95", "TTFT p99", "good", "busiest of mean"),
    "scale": ("hit rate", "computed", "TTFT p50", "TTFT p95", "TTFT p99", "good", "busiest of mean"),
    "digests": ("hit rate", "TTFT p95", "digests, B/s", "samples held", "router, us a request", "router, cores"),
    "tuning": ("hit rate", "TTFT p50", "TTFT p95", "good", "busiest of mean", "capacity"),
    "tiers": ("hit rate", "loaded", "TTFT p50", "TTFT p95", "good", "tier 0 link", "tier 1 link", "network link"),
    "failures": ("failed", "hit rate", "busiest of mean", "TTFT p50 of others", "TTFT p95 of others", "good of others"),
    "bursts": ("hit rate", "TTFT p50", "TTFT p95", "TTFT p99", "good"),
    "routers": ("hit rate", "TTFT p50", "TTFT p95", "good", "busiest of mean", "digests, B/s", "router, cores"),
}


def fleet(part: str, document: Document) -> str:
    """A part of the simulated fleet's figures: a line for each case and policy."""
    parts = (part, "large") if part == "scale" else (part,)
    rows = [row for row in document["rows"] if row["part"] in parts and "line" not in row]
    cells: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        work, name = row["work"].split(": ")
        cells[work, row["implementation"]][name] = row["figure"]
    columns = FLEET_PARTS[part]
    lines = [[*about, *(fleet_figure(name, found.get(name)) for name in columns)] for about, found in cells.items()]
    return table(["case", "policy", *columns], lines, names=2)


def fleet_figure(name: str, figure: float | None) -> str:
    """
    >>> [fleet_figure(name, 1234.5) for name in ("digests, B/s", "TTFT p95")], fleet_figure("loaded", None)
    (['1,234', '1.23e+03'], '-')
    """
    return "-" if figure is None else f"{figure:{FLEET_DIGITS.get(name, '.3g')}}"


def fleet_limits(document: Document) -> str:
    """What a fleet asks of one router, and how much its hottest tenant asks of replicas, by the number of replicas."""
    cells, samples = defaultdict(dict), {}
    for row in document["rows"]:
        work, _, name = row["work"].partition(": ")
        if row["part"] == "memory":
            samples[int(work.split()[2])] = row["figure"]
        elif row["part"] in ("scale", "large") and row["implementation"] == "segments, router":
            cells[int(work.split(", ")[1].split()[0])][name] = row["figure"]
    lines = [_limits(replicas, found, samples[replicas]) for replicas, found in cells.items()]
    heading = ["replicas", "prompts/s", "router, us a prompt", "cores for them", "digests, kB/s", "samples held"]
    heading += ["bytes a sample", "router's digests, MB", "hottest tenant, replicas"]
    return table(heading, lines)


def _limits(replicas: int, found: Mapping[str, float], nbytes: float) -> list[str]:
    asked, each = found["prompts a second"], found["router, us a request"]
    cells = [f"{replicas}", f"{asked:,.0f}", f"{each:.0f}", f"{asked * each / 1e6:.3f}"]
    memory = found["samples held"] * nbytes / 1e6
    cells += [f"{found['digests, B/s'] / 1e3:,.1f}", f"{found['samples held']:,.0f}", f"{nbytes:.0f}", f"{memory:,.1f}"]
    return [*cells, f"{found['hottest tenant of mean']:.1f}"]


def fleet_capacity(document: Document) -> str:
    """Prompts a second and replica that are answered well: a line for each policy, a column for each traffic."""
    cells = pivot(row for row in document["rows"] if row["part"] == "capacity")
    names = columns_of(cells)
    lines = [[name, *(f"{by_name[name]['figure']:.2f}" for by_name in cells.values())] for name in names]
    return table(["policy", *(work.partition(",")[0] for work in cells)], lines)


def fleet_calibration(document: Document) -> str:
    """By file: how many rows, how far what is simulated is from them, and the row that is farthest."""
    groups: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in document["rows"]:
        if row["part"] == "calibration":
            groups[row["source"], row["fitted"]].append(row)
    lines = [
        _calibrated(source, "fitted" if fitted else "predicted", rows) for (source, fitted), rows in groups.items()
    ]
    heading = ["file", "rows are", "the farthest", "rows", "median error", "its error"]
    return provenance(document) + "\n" + table(heading, lines, names=3)


def _calibrated(source: str, how: str, rows: Sequence[Row]) -> list[str]:
    errors = sorted(abs(row["error"]) for row in rows)
    worst = max(rows, key=lambda row: abs(row["error"]))
    name = f"{worst['work'].partition(': ')[2]}, {worst['implementation']}"
    return [source, how, name, str(len(rows)), f"{errors[len(errors) // 2]:.1%}", f"{worst['error']:+.1%}"]


# TPU --------------------------------------------------------------------------------------------------------


def tpu_compiled(document: Document) -> str:
    heading = ["chip", "devices", "step", "arguments", "store", "alias", "temporary", "peak", "collectives"]
    heading += ["compiled in, s"]
    lines = []
    for step in document["steps"]:
        sizes = [step[f"{key}_bytes"] for key in ("argument", "store", "alias", "temp", "peak")]
        cells = [f"{size / GIB:.2f}" if size is not None else "-" for size in sizes]
        place = [step["chip"], str(step["devices"]), step["step"]]
        lines.append([*place, *cells, collectives(step), str(step["compile_s"])])
    return provenance(document) + "\n" + table(heading, lines, names=3)


def collectives(step: Row) -> str:
    """How many of each kind, and the bytes of their results together. A loop's body counts once."""
    counts: dict[str, int] = defaultdict(int)
    for each in step["collectives"]:
        counts[each["kind"]] += each["count"]
    total = sum(each["bytes"] for each in step["collectives"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{kinds}; {total / 2**20:.1f} MiB" if counts else "none"


def tpu_vmem(document: Document) -> str:
    """The most VMEM of each kernel in any step, MiB, double buffers included."""
    most: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for step in document["steps"]:
        place = most[step["chip"], step["devices"]]
        for name, size in step["kernel_vmem_bytes"].items():
            place[name] = max(place.get(name, 0), size)
    names = sorted({name for sizes in most.values() for name in sizes})
    lines = [
        [f"{chip} x {devices}", *(f"{sizes[n] / 2**20:.1f}" if n in sizes else "-" for n in names)]
        for (chip, devices), sizes in most.items()
    ]
    return table(["devices", *names], lines)


def tpu_predicted(document: Document) -> str:
    lines = []
    for row in document["predictions"]:
        place = [f"{row['chip']} x {row['chips']}", str(row["tokens"])]
        times = [f"{row['full_s']:.3f}", f"{row['sparsex_s']:.3f}", f"{row['ratio']:.1f}"]
        lines.append([*place, *times, "yes" if row["donors_fit"] else "no"])
    return table(["chips", "tokens", "full, s", "SparseX, s", "ratio", "fits"], lines)


# The pages --------------------------------------------------------------------------------------------------


def ways(document: Document) -> str:
    """A line for each way, with a column for each of its figures."""
    cells = pivot(document["rows"])
    heading = ["way", *(f"{work.partition(': ')[2]}, {unit_of(by_name)}" for work, by_name in cells.items())]
    names = columns_of(cells)
    lines = [[name, *(f"{by_name[name]['figure']:.3g}" for by_name in cells.values())] for name in names]
    return f"{table(heading, lines)}\n{provenance(document)}"


VIEWS: dict[str, View] = {
    "quality": quality,
    "quality_headline": quality_headline,
    "quality_summary": quality_summary,
    "end_to_end": end_to_end,
    "speed_headline": speed_headline,
    "kernels": kernels,
    "kernel_errors": kernel_errors,
    "lookup": lookup,
    "link": link,
    "restore": restore,
    "tiers": tiers,
    "segments": segments,
    "experts": experts,
    "precision": precision,
    "answers": answers,
    "structure": structure,
    "soak": soak,
    "works": works,
    "serving": serving,
    "routing": routing,
    "conversations": conversations,
    "conversations_headline": conversations_headline,
    "drift": drift,
    "orders": orders,
    "agents": agents,
    "mirrors": mirrors,
    "calibration": calibration,
    "checkouts": checkouts,
    "training": training,
    "adapters": adapters,
    "ways": ways,
    "fleet_calibration": fleet_calibration,
    "fleet_capacity": fleet_capacity,
    "fleet_limits": fleet_limits,
    **{f"fleet_{part}": functools.partial(fleet, part) for part in FLEET_PARTS},
    "tpu_compiled": tpu_compiled,
    "tpu_vmem": tpu_vmem,
    "tpu_predicted": tpu_predicted,
}


def refreshed(text: str) -> str:
    """A README whose blocks say what their files say.

    Raises:
      KeyError: a block names no view.
      FileNotFoundError: a block names no file.
    """

    def block(match: re.Match[str]) -> str:
        begin, view, name, end = match.groups()
        return f"{begin}\n{VIEWS[view](json.loads((RESULTS / name).read_text()))}\n{end}"

    return BLOCK.sub(block, text)


def files_shown(text: str) -> set[str]:
    """The names of the result files that a README's blocks show."""
    return {match[3] for match in BLOCK.finditer(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if something would change")
    options = parser.parse_args()
    stale = [path for path in READMES if refreshed(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is not what its files say' if options.check else 'rewritten'}")
        if not options.check:
            path.write_text(refreshed(path.read_text()))
    sys.exit(options.check and bool(stale))


if __name__ == "__main__":
    main()
