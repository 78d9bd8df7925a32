"""Texts that are to be prefilled without adapters while nothing is in line, for adapters that share that (`rebase`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

MOST_TEXTS = 64  # that wait; the oldest gives way


class Text(NamedTuple):
    """A prompt with its answer, and where prompts find it."""

    namespace: str
    tokens: Int32[np.ndarray, "tokens"]


class NeutralTexts:
    """Which texts wait, the oldest first. A text that goes on takes the place of its beginning."""

    def __init__(self) -> None:
        self._waiting: list[Text] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, namespace: str, tokens: Int32[np.ndarray, "tokens"]) -> None:
        others = [one for one in self._waiting if not _begins(one, namespace, tokens)]
        self._waiting = [*others, Text(namespace, tokens)][-MOST_TEXTS:]

    @property
    def first(self) -> Text | None:
        return self._waiting[0] if self._waiting else None

    def drop(self, text: Text) -> None:
        """It was prefilled, or cannot be."""
        self._waiting = [one for one in self._waiting if one is not text]

    def forget(self, namespace: str) -> None:
        """Something of the namespace was forgotten. It may be in any of its texts, and none of them brings it back."""
        self._waiting = [one for one in self._waiting if one.namespace != namespace]


def _begins(text: Text, namespace: str, tokens: Int32[np.ndarray, "tokens"]) -> bool:
    return text.namespace == namespace and np.array_equal(text.tokens, tokens[: len(text.tokens)])
