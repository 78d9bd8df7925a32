"""Where the texts of entries stand in a prompt, whichever copy of them the prompt's KV would be taken from.

Each text is known by the hash of 8 tokens in its middle. Texts that begin alike differ there, and what stands before or
behind a text in a prompt may be tokenised together with its first or last characters. Who quotes less than half of a
text does not bring that text.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache.windows import WINDOW, run_around, window_hashes

_SALT = secrets.randbits(64)


class RememberedTexts:
    """The texts of a cache's entries, by one window of each."""

    def __init__(self) -> None:
        self._handles: dict[str, dict[int, set[int]]] = {}  # by namespace and hash
        self._known_by: dict[int, tuple[str, int]] = {}

    def add(self, handle: int, namespace: str, text: Int32[np.ndarray, "text"]) -> None:
        """Texts of fewer than 8 tokens are never found."""
        if len(text) < WINDOW:
            return
        (value,) = window_hashes(text[_place_in(text) :][:WINDOW], _SALT).tolist()
        self._handles.setdefault(namespace, {}).setdefault(value, set()).add(handle)
        self._known_by[handle] = namespace, value

    def remove(self, handle: int) -> None:
        if handle not in self._known_by:
            return
        namespace, value = self._known_by.pop(handle)
        handles = self._handles[namespace]
        handles[value].discard(handle)
        if not handles[value]:
            del handles[value]
        if not handles:
            del self._handles[namespace]

    def places(self, tokens: Int32[np.ndarray, "tokens"], namespace: str) -> Iterator[tuple[int, int]]:
        """Where in a prompt some entry's window may stand, and the entry's handle."""
        handles = self._handles.get(namespace)
        if not handles:
            return
        hashes = window_hashes(tokens, _SALT)
        for place in np.flatnonzero(np.isin(hashes, np.fromiter(handles, np.uint64, len(handles)))).tolist():
            for handle in handles[int(hashes[place])]:
                yield place, handle

    def check(self, texts: Mapping[int, tuple[str, Int32[np.ndarray, "text"]]]) -> None:
        """Raise AssertionError unless just these texts are known: by handle, with their namespaces."""
        fresh = RememberedTexts()
        for handle, (namespace, text) in texts.items():
            fresh.add(handle, namespace, text)
        assert (self._handles, self._known_by) == (fresh._handles, fresh._known_by)


def text_around(tokens: Int32[np.ndarray, "tokens"], place: int, text: Int32[np.ndarray, "text"]) -> tuple[int, int]:
    """From where to where a prompt and a text are equal around the text's window, which stands at `place`.

    Returns:
      Two indices of the prompt; equal ones if less than half of the text is there, or the hash lied.
    """
    begin, end = run_around(tokens, place, text, _place_in(text))
    return (begin, end) if 2 * (end - begin) >= len(text) else (place, place)


def _place_in(text: Int32[np.ndarray, "text"]) -> int:
    """Where in a text the window is by which it is known."""
    return (len(text) - WINDOW) // 2
