"""Rows of the quality bench and of calibrations, in a file as they come, so that a stopped run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval.summaries import Cell, Row, cell_of

Key = tuple[Cell, str]  # a cell and a method


class RowLog:
    """Rows by cell and method, and the file of JSON lines that they are added to, if there is one.

    The first line of the file says what the rows were made with. Rows that were made with anything else do not get in.
    """

    def __init__(self, path: Path | None = None, made_with: Mapping[str, Any] | None = None) -> None:
        """Read what the file has, or begin one.

        Args:
          path: None keeps the rows in memory alone.
          made_with: whatever makes a row another one: the model, the device, sizes. As JSON has it.

        Raises:
          InvalidRequestError: the file has rows that were made with something else, or is no such file.
        """
        self._path = path
        self._rows: dict[Key, Row] = {}
        if path is not None:
            self._open(path, json.loads(json.dumps(made_with or {})))

    def _open(self, path: Path, made_with: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # without a line that a kill cut off
        head, *rows = _parsed(path, whole) or [{}]
        if rows:
            _check_same(path, head, made_with)
            self._rows |= {_key(row): row for row in rows}
        else:  # begun anew: a run that failed before its first row has made nothing
            whole = json.dumps({"made_with": made_with}, ensure_ascii=False) + "\n"
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def missing(self, batch: Sequence[Cell], methods: Sequence[str]) -> tuple[list[Cell], list[str]]:
        """The cells of which some method has no row yet, and the methods that have none in one of these."""
        cells = [cell for cell in batch if any((cell, method) not in self._rows for method in methods)]
        return cells, [method for method in methods if any((cell, method) not in self._rows for cell in cells)]

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the rows, and write them, but for those that are there already."""
        new = [row for row in rows if _key(row) not in self._rows]
        self._rows |= {_key(row): row for row in new}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)

    def of(self, cells: Iterable[Cell], methods: Sequence[str]) -> list[Row]:
        """The rows of these methods in these cells."""
        return [self._rows[cell, method] for cell in cells for method in methods]


def _key(row: Row) -> Key:
    return cell_of(row), row["method"]


def _parsed(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        if lines and "made_with" in lines[0] and all(_key(row) for row in lines[1:]):
            return lines
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"{path}: is no file of rows: {error!r}") from error
    if lines:
        raise InvalidRequestError(f"{path}: is no file of rows: its first line does not say what they were made with")
    return []


def _check_same(path: Path, head: dict[str, Any], made_with: dict[str, Any]) -> None:
    before = head["made_with"]
    names = [name for name in {**before, **made_with} if before.get(name) != made_with.get(name)]
    if names:
        differing = ", ".join(f"{name}={before.get(name)!r}, not {made_with.get(name)!r}" for name in names)
        raise InvalidRequestError(
            f"{path}: its rows were made with {differing}; write to another place, or delete the file"
        )
