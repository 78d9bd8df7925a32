"""Ctrl-C between two rounds of the loop instead of within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_at_the_end() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the context if Ctrl-C comes within it.

    In the middle of a round it could come between two entries of the same books, and pages would leak. The second
    Ctrl-C does not wait: a device may hang. Handlers that a program has set itself stay as they are.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
