"""Counts what a program that is compiled for GPUs launches, from its HLO."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id"}
_BEGINS = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = .*? ([a-z][a-z\-]*)\(")
_COLLECTIVES = re.compile(r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute")


@dataclasses.dataclass(frozen=True)
class Launches:
    """How often a program launches something.

    Attributes:
      kernels: of Pallas.
      others: of XLA's own: fusions, products, copies.
      collectives: of the network.
      questions: loops and branches that ask the host, which the GPU waits for.
    """

    kernels: int = 0
    others: int = 0
    collectives: int = 0
    questions: int = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(*(mine + its for mine, its in zip(self.counts, other.counts, strict=True)))

    def __mul__(self, times: int) -> Launches:
        return Launches(*(times * each for each in self.counts))

    def __truediv__(self, parts: int) -> Launches:
        """The launches of one of several equal parts, rounded."""
        return Launches(*(round(each / parts) for each in self.counts))

    @property
    def counts(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)


class Program:
    """The computations of a compiled program's text, as `Compiled.as_text` gives it."""

    def __init__(self, text: str) -> None:
        self._lines: dict[str, list[str]] = {}
        self._entry = ""
        for line in text.splitlines():
            if begins := _BEGINS.match(line):
                self._lines[begins[2]] = own = []
                self._entry = begins[2] if begins[1] else self._entry
            elif self._lines:
                own.append(line)

    def whole(self) -> Launches:
        """Of a run. A loop whose turns are not known counts as one turn, and a branch as the longest."""
        return self._of(self._entry)

    def turn(self) -> Launches:
        """Of a turn of that loop without loops in it which launches most kernels: of a chunk of rows through a layer,
        or of a decode step."""
        bodies = {body for lines in self._lines.values() for body in map(_body, lines) if body}
        innermost = [body for body in bodies if not self._loops(body)]
        return max(map(self._of, innermost), key=lambda each: each.kernels)

    def _loops(self, name: str) -> bool:
        """Whether a computation has loops, in branches of it too."""
        lines = self._lines[name]
        return any(_body(line) or any(map(self._loops, _branches(line))) for line in lines)

    def _of(self, name: str) -> Launches:
        return sum((self._launched(line) for line in self._lines[name]), Launches())

    def _launched(self, line: str) -> Launches:
        operation = _OPERATION.match(line)
        if not operation or operation[1] in _NOTHING or operation[1].endswith("-done"):
            return Launches()
        if "mosaic_gpu" in line or "triton_kernel_call" in line:
            return Launches(kernels=1)
        if _COLLECTIVES.match(operation[1]):
            return Launches(collectives=1)
        if operation[1] == "while":
            return self._loop(line)
        if operation[1] == "conditional":
            return max(map(self._of, _branches(line)), key=lambda each: sum(each.counts)) + Launches(questions=1)
        return Launches(others=1)

    def _loop(self, line: str) -> Launches:
        turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        once = self._of(_body(line))
        return once * int(turns[1]) if turns else once + Launches(questions=1)


def _body(line: str) -> str:
    """The name of a loop's body; empty where the line is no loop."""
    named = re.search(r" while\(.*body=%([\w.\-]+)", line)
    return named[1] if named else ""


def _branches(line: str) -> Iterator[str]:
    named = re.search(r"branch_computations=\{([^}]*)\}", line)
    names = named[1].split(",") if named else re.findall(r"(?:true|false)_computation=([^,\s]+)", line)
    return (name.strip().removeprefix("%") for name in names)
