"""Programs compiled for TPUs, and what they are predicted to take."""

from __future__ import annotations

from collections import defaultdict

from views.origin import provenance
from views.tables import GIB, Document, Row, table


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


VIEWS = {
    "tpu_compiled": tpu_compiled,
    "tpu_vmem": tpu_vmem,
    "tpu_predicted": tpu_predicted,
}
