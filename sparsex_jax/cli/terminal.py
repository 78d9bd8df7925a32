"""Printing, progress and errors, the same for every command.

Results go to standard output. Progress, notes and errors go to standard error, so that with `--json` standard output
has one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sparsex_jax.errors import SparsexError

_INTERRUPTED, _TERMINATED = 130, 143  # 128 and the number of the signal, as shells have it


def output() -> Console:
    """The console for results. It prints square brackets in texts of files and models as they are."""
    return Console(markup=False, highlight=False)


def messages() -> Console:
    """The console for progress, notes and errors."""
    return Console(stderr=True, markup=False, highlight=False)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error that the package raises on purpose into one red line and exit code 2: for commands and scripts."""
    try:
        yield
    except SparsexError as error:
        line = " ".join(str(error).split())
        messages().print(Text(f"error: {line}", style="bold red"), soft_wrap=True)
        raise SystemExit(2) from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script as commands run: an error that the package raises on purpose is one line, and so is Ctrl-C.

    SIGTERM ends it as an exception does, so that the processes which it started end with it.
    """
    signal.signal(signal.SIGTERM, _end)
    try:
        with clear_errors():
            main()
    except KeyboardInterrupt:
        messages().print("Interrupted.")
        raise SystemExit(_INTERRUPTED) from None


def _end(*_: Any) -> None:
    raise SystemExit(_TERMINATED)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on one line of standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def progress() -> Progress:
    """A progress bar. It disappears at the end, and is shown only if standard error is a terminal."""
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
    """Show a spinner with the text `what` while the block runs, if standard error is a terminal."""
    console = messages()
    with console.status(f"{what} ...") if console.is_terminal else contextlib.nullcontext():
        yield
