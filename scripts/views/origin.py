"""How a result file was made, in words."""

from __future__ import annotations

import re

from views.tables import Document


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
