"""What every command does with a terminal: print, wait and fail.

Results go to standard output. Whatever is said meanwhile, and errors, go to standard error, so that `--json`
leaves one object on standard output and nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sparsex_jax.errors import SparsexError


def output() -> Console:
    """The console for results. Texts come from files and models, so nothing in them is markup."""
    return Console(markup=False, highlight=False)


def messages() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, markup=False, highlight=False)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """An error that the package raises on purpose becomes one red line and exit code 2."""
    try:
        yield
    except SparsexError as error:
        line = " ".join(str(error).split())
        messages().print(Text(f"error: {line}", style="bold red"), soft_wrap=True)
        raise typer.Exit(2) from error


def print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def progress() -> Progress:
    """A progress bar that disappears when done, and never shows up in a pipe or a log."""
    console = messages()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner beside what takes long."""
    console = messages()
    with console.status(f"{what} ...") if console.is_terminal else contextlib.nullcontext():
        yield
