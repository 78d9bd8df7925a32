"""Join runs of the quality bench that differ in tasks or regimes, such as processes for single tasks that share a GPU.

    sparsex bench quality --tasks vt ... --json > vt.json & sparsex bench quality --tasks cwe ... --json > cwe.json
    python scripts/join_quality.py vt.json cwe.json [--note "what a reader must know"]

Writes the JSON and the frontier's plot that one run over all tasks would have written to `scripts/results`.
The mean over all tasks is the mean of the tasks' means, and its interval follows from their intervals.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sparsex_jax.eval import results
from sparsex_jax.eval.summaries import ALL_TASKS

RESULTS = Path(__file__).resolve().parent / "results"
Summary = dict[str, Any]


def summaries_of(document: dict[str, Any]) -> list[Summary]:
    """The summaries in a result file, as `summaries.summarize` made them."""
    found = []
    for row in document["rows"]:
        cell, metric = row["work"].rsplit(": ", 1)
        task, regime = cell.split(", ")
        rest = {key: row[key] for key in ("low", "high", "samples", "unit")}
        found.append(
            {"task": task, "regime": regime, "method": row["implementation"], "metric": metric, "mean": row["figure"]}
            | rest
        )
    return found


def pooled(summaries: list[Summary]) -> list[Summary]:
    """A summary over all tasks for each regime, method and metric. All tasks have the same number of samples."""
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary["regime"], summary["method"], summary["metric"]), []).append(summary)
    return [_mean(group) for group in groups.values()]


def _mean(group: list[Summary]) -> Summary:
    def spread(end: str) -> float:
        return math.sqrt(sum((summary[end] - summary["mean"]) ** 2 for summary in group)) / len(group)

    mean = sum(summary["mean"] for summary in group) / len(group)
    samples = sum(summary["samples"] for summary in group)
    fields = {"task": ALL_TASKS, "mean": mean, "low": mean - spread("low"), "high": mean + spread("high")}
    return group[0] | fields | {"samples": samples}


def join(documents: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Summary]]:
    """The content of one result file for all runs, and its summaries.

    Raises:
      ValueError: the runs differ in more than tasks and regimes.
    """
    first, *others = documents
    same, varied = ("bench", "model", "device", "versions", "commit"), ("tasks", "regimes")
    for other in others:
        differing = [key for key in same if other[key] != first[key]]
        differing += [
            key for key, value in first["settings"].items() if key not in varied and other["settings"][key] != value
        ]
        if differing:
            raise ValueError(f"{other['settings']['tasks']} differs from the first in {', '.join(differing)}")
    asked = {key: list(dict.fromkeys(name for d in documents for name in d["settings"][key])) for key in varied}
    summaries = [
        summary for document in documents for summary in summaries_of(document) if summary["task"] != ALL_TASKS
    ]
    summaries += pooled(summaries)
    joined = results.file_content(first["bench"], first["model"], first["settings"] | asked, summaries)
    return joined | {key: first[key] for key in (*same, "machine")} | {"command": first["command"]}, summaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--bench", help="the first part of the file names; by default the runs' own, quality")
    parser.add_argument("--note", help="what a reader of the tables must know")
    options = parser.parse_args()
    joined, summaries = join([json.loads(path.read_text()) for path in options.documents])
    joined |= {name: text for name in ("bench", "note") if (text := getattr(options, name))}
    path = results.write_json(joined, RESULTS)
    from sparsex_jax.eval import plots

    settings = joined["settings"]
    title = f"{joined['model']}, {settings['length']} tokens, {settings['samples']} samples a point"
    plots.frontier(summaries, path.with_suffix(".png"), title)
    print(path)


if __name__ == "__main__":
    main()
