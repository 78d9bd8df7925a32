"""Result files: a JSON file for each bench, model and device, and the same figures as Markdown tables."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sparsex_jax.errors import ResultFileError

# A mean with its 95 % interval: task, regime, method, metric, mean, low, high, samples, unit.
Summary = Mapping[str, Any]
_COLUMNS = ("computed_fraction", "flops_fraction", "kl", "top1", "agreement", "ttft_s", "speedup")


def file_content(
    bench: str, model: str, settings: Mapping[str, Any], summaries: Sequence[Summary], devices: int = 1
) -> dict[str, Any]:
    """The content of a JSON file: how the figures were made, and rows of (work, implementation, figure, unit)."""
    rows = [_row(summary) for summary in summaries]
    return {"bench": bench, "model": model} | provenance(devices) | {"settings": dict(settings), "rows": rows}


def provenance(devices: int = 1, kind: str | None = None) -> dict[str, Any]:
    """How figures were made: the command, device, machine, versions and commit.

    Args:
      devices: how many worked together. More than one are named so, and their files too: `2 x NVIDIA H100`.
      kind: of device. None asks JAX, which takes hold of its devices then.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": kind if devices == 1 else f"{devices} x {kind}",
        "machine": {"platform": f"{platform.system()}, {platform.machine()}", "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "sparsex": version("sparsex-jax")},
        "commit": commit(),
    }


def _row(summary: Summary) -> dict[str, Any]:
    mean, low, high = (float(f"{summary[key]:.5g}") for key in ("mean", "low", "high"))
    return {
        "work": f"{summary['task']}, {summary['regime']}: {summary['metric']}",
        "implementation": summary["method"],
        "figure": mean,
        "unit": summary["unit"],
        "low": low,
        "high": high,
        "samples": summary["samples"],
    }


def commit() -> str:
    """The commit of the checkout that runs, with `-dirty` if files were changed. Empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()


def write(content: Mapping[str, Any], summaries: Sequence[Summary], folder: Path) -> Path:
    """Write `<bench>-<model>-<device>.json` and `.md` to the folder. Returns the path of the JSON file."""
    path = write_json(content, folder)
    path.with_suffix(".md").write_text(markdown(content, summaries))
    return path


def write_json(content: Mapping[str, Any], folder: Path) -> Path:
    """Write the JSON file alone, for benches that make other tables or none. Returns its path.

    Raises:
      ResultFileError: it cannot be written. What was measured is on standard output then.
    """
    path = folder / f"{file_stem(content)}.json"
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        print(text)
        raise ResultFileError(f"{path} cannot be written: {error.strerror or error}; it is printed instead") from error
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the process is interrupted."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_rows(about: Mapping[str, Any], rows: Iterable[Any], folder: Path) -> Path:
    """Write the JSON file anew with each row. If a later row fails, or somebody interrupts the bench, the file has the
    rows before it. Returns the file's path.

    Args:
      about: the file's content but for the rows.
      rows: measured as they are asked for.

    Raises:
      ResultFileError: the folder cannot be written to; before anything is measured.
    """
    require_writable(folder)
    found: list[Any] = []
    for row in rows:
        found.append(row)
        write_json({**about, "rows": found}, folder)
    return folder / f"{file_stem(about)}.json"


def require_writable(folder: Path) -> None:
    """Make the folder if it is not there. Raises ResultFileError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultFileError(f"nothing can be written to {folder}: {error.strerror or error}") from error


def rows_of_file(content: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows of the file that `write_json` would write now; none if there is no such file."""
    path = folder / f"{file_stem(content)}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def file_stem(content: Mapping[str, Any]) -> str:
    """The name of a result file without its suffix: the bench, the model if there is one, and the device.

    >>> file_stem({"bench": "quality", "model": "models/Tiny", "device": "NVIDIA H100"})
    'quality-tiny-nvidia-h100'
    >>> file_stem({"bench": "e2e", "model": "llama-3.1-8b", "device": "cpu"})
    'e2e-llama-3.1-8b-cpu'
    """
    model = [Path(content["model"]).name.removesuffix(".gguf")] if "model" in content else []
    names = (content["bench"], *model, content["device"])
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in names)


def markdown(content: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    """A Markdown page with a table for each regime: each method's score in each task, and its other means."""
    numbers = ", ".join(f"{key} {value}" for key, value in content["settings"].items() if not isinstance(value, list))
    head = f"# {content['bench'].capitalize()} of {content['model']} on {content['device']}\n\n{numbers}.\n\n"
    notes = (
        "Task scores have Wilson's 95 % intervals, for shares too wide rather than too narrow. work: share of "
        "token-layers computed, FLOPs: of full recompute's operations; both with a signal's own pass. KL (nats), top-1 "
        "and agreement of the greedy continuation: against full recompute. TTFT: of each prompt alone; full / it: how "
        "many times as long full recompute's is.\n"
    )
    found = dict.fromkeys(summary["regime"] for summary in summaries)
    tables = [f"\n## {regime}\n\n{table([s for s in summaries if s['regime'] == regime])}" for regime in found]
    return head + notes + f"{content.get('note', '')}\n" * ("note" in content) + "".join(tables)


def table(summaries: Sequence[Summary]) -> str:
    """The Markdown table of one regime."""
    cells = {(s["method"], s["task"], s["metric"]): s for s in summaries}
    methods, tasks = (list(dict.fromkeys(s[key] for s in summaries)) for key in ("method", "task"))
    heading = ["method", *tasks, "work", "FLOPs", "KL", "top-1", "agreement", "TTFT, s", "full / it"]
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)]]
    for method in methods:
        scores = [score(cells[method, task, "score"]) for task in tasks]
        others = [_cell(cells.get((method, tasks[-1], metric))) for metric in _COLUMNS]
        lines.append([method, *scores, *others])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(summary: Summary | None) -> str:
    """A mean, if it was measured."""
    return "-" if summary is None else f"{summary['mean']:.3f}"


def score(summary: Summary) -> str:
    """A mean with its interval, as text.

    >>> score({"mean": 0.5, "low": 0.25, "high": 0.75})
    '0.50 [0.25, 0.75]'
    """
    return f"{summary['mean']:.2f} [{summary['low']:.2f}, {summary['high']:.2f}]"
