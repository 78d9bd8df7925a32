"""Types of the numbers that benches take. What is wrong is said before anything is loaded or measured."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """An integer of 1 or more.

    Raises:
      ArgumentTypeError: it is none.

    >>> count("3")
    3
    """
    number = int(text) if text.removeprefix("-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of 1 or more")
    return number


def positive(text: str) -> float:
    """A finite number above 0.

    Raises:
      ArgumentTypeError: it is none.

    >>> positive("0.5")
    0.5
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number
