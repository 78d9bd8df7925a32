"""Kernels beside what the device can do."""

from __future__ import annotations

from views.origin import provenance
from views.tables import Document, Row, columns_of, pivot, table

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


def experts(document: Document) -> str:
    """A layer of experts beside its floors."""
    lines = [
        [row["work"], row["implementation"], f"{row['figure']:.3f}", f"{row['tflops']:.0f}",
         f"{row['terabytes_per_second']:.2f}", f"{row['share']:.0%}" if row["share"] is not None else ""]
        for row in document["rows"]
    ]  # fmt: skip
    heading = ["work", "implementation", "ms", "TFLOP/s", "TB/s", "of the floor"]
    return f"{table(heading, lines, names=2)}\n{provenance(document)}"


VIEWS = {
    "kernels": kernels,
    "kernel_errors": kernel_errors,
    "experts": experts,
}
