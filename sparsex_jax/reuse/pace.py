"""How fast stored prefixes are restored: as predicted, corrected by what was measured since."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sparsex_jax.reuse.cost import Speeds

_WEIGHT = 0.2  # of the newest measurement
_MOST = 4.0  # times longer or shorter than expected; what is beyond counts as this
_FORGET = 0.9
_FEW = 3
# Where speeds were not measured: seconds of a row in a layer, and of a key that it attends to. The first prefix that is
# computed corrects them.
_ROW, _KEY = 1e-6, 1e-10


class Factor:
    """How many times longer something takes than predicted.

    Attributes:
      value: the factor, as measured lately.
    """

    def __init__(self, value: float = 1.0, *, known: bool = True) -> None:
        """
        Args:
          known: whether it rests on a measurement. If not, the fastest of the first few counts in full: some of them
            are of programs that were compiled meanwhile.
        """
        self.value, self._first, self._measured = value, value, _FEW if known else 0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._measured > 0

    def correct(self, expected: float, took: float) -> None:
        """Take in how long something took that by this factor was expected to take so long."""
        if min(expected, took) <= 0:
            return
        ratio = took / expected
        if self._measured == _FEW:
            self.value *= min(max(ratio, 1 / _MOST), _MOST) ** _WEIGHT
        else:
            self.value *= min(ratio, 1.0) if self.known else ratio
            self._first, self._measured = self.value, self._measured + 1

    def forget(self) -> None:
        """Move a little back to what it was at first. What was slow once would never be tried again otherwise."""
        self.value = self._first * (self.value / self._first) ** _FORGET


class Pace:
    """Seconds of computing and of loading.

    Attributes:
      compute, link: how many times longer than predicted both take.
    """

    def __init__(self, speeds: Speeds | None, bytes_per_s: float, *, known: bool = True) -> None:
        """
        Args:
          speeds: of prefills. None: not measured.
          bytes_per_s: of the link.
          known: whether that was measured.
        """
        self._speeds, self._bytes_per_s = speeds, bytes_per_s
        self.compute, self.link = Factor(known=speeds is not None), Factor(known=known)

    def load_seconds(self, nbytes: int | float) -> float:
        """Of so many bytes, by all that is known now."""
        return self.link.value * nbytes / self._bytes_per_s

    def predicted_cells(
        self, spans: Sequence[tuple[int, int]], groups: Sequence[Sequence[int | None]]
    ) -> Float[np.ndarray, "groups chunks"]:
        """Seconds of computing each chunk, from one position up to another, in each group of layers with these windows.

        Without the factor `compute`.
        """
        seconds = np.array([[self._layers_seconds(windows, *span) for span in spans] for windows in groups])
        seconds[0] += self._speeds.start if self._speeds else 0.0
        return seconds

    def _layers_seconds(self, windows: Sequence[int | None], start: int, end: int) -> float:
        rows, keys = end - start, (start + end) / 2
        if self._speeds is None:
            return sum((rows * (_ROW + _KEY * min(keys, window or keys)) for window in windows), start=0.0)
        return self._speeds.of_plan(rows).layers_seconds(np.arange(start, end), windows)
