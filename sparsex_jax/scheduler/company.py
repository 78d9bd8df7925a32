"""Who keeps a text company: what it is prefilled behind when it is remembered.

A text that is prefilled alone begins with attention sinks, and has never seen a document of its kind before it, as it
will in prompts. So it is prefilled behind what the namespace has already, and that is dropped:

    | usual opening | other texts               | the text |
    | at most 1/4   | the rest of the budget    |
      ------------ dropped -------------------   kept

The opening is what more than half of the stored prompts begin with. The other texts are taken in runs that fill the
budget, in the order in which they were remembered; the last full run is the company. So a text has recent ones before
it, and as all that are remembered until the next run is full have the same, its KV is computed once for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import Entry, PageCache
from sparsex_jax.cache.children import TOKEN_BYTES, common_prefix
from sparsex_jax.cache.company import Company, text_digest

OPENING_SHARE = 4  # the opening has at most a quarter of the budget: other texts are of more use
LEAST_TEXTS = 2  # a longer text is cut, so that so many fit
MOST_PROMPTS = 1000  # whose beginnings are compared
BEGINNING = 32  # tokens of a text by which it is known to be a part of the opening

NumBase = Callable[[Int32[np.ndarray, "tokens"]], int]


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
    """What a namespace has to choose from.

    Attributes:
      opening: the tokens with which most of its prompts begin.
      texts: remembered texts, oldest first, each whole.
      most: how many tokens of a text are taken.
    """

    opening: Int32[np.ndarray, "opening"]
    texts: tuple[Int32[np.ndarray, "tokens"], ...]
    most: int

    @classmethod
    def of(cls, cache: PageCache, namespace: str, budget: int, num_base: NumBase = len) -> Neighbours:
        """The opening and the texts of a namespace that fit into so many tokens, of what no adapter acted on.

        Args:
          num_base: on how many leading tokens none acted, of keys that the cache has. By default all are tokens.
        """
        stored = itertools.islice(cache.beginnings(namespace, budget // OPENING_SHARE), MOST_PROMPTS)
        beginnings = (each[: TOKEN_BYTES * num_base(np.frombuffer(each, np.int32))] for each in stored)
        opening = usual_opening(filter(None, beginnings))
        room = budget - len(opening)
        most = room // LEAST_TEXTS
        texts = (one for one in cache.entries(namespace) if num_base(cache.text(one.handle)) == one.num_tokens)
        run = last_run(texts, room, most) if most else []
        return cls(opening, tuple(cache.text(entry.handle) for entry in run), most)

    @property
    def num_tokens(self) -> int:
        return len(self.opening) + sum(min(len(text), self.most) for text in self.texts)

    def company_of(self, text: Int32[np.ndarray, "tokens"], room: int) -> Company:
        """Those of them that a text is prefilled behind, in at most `room` tokens.

        A text that the opening has in it is a prompt's beginning, and stays alone.
        """
        if text[:BEGINNING].tobytes() in self.opening.tobytes():
            return Company.nobody()
        opening = self.opening[: max(room, 0)]
        left = room - len(opening)
        kept: list[Int32[np.ndarray, "tokens"]] = []
        for other in (other for other in reversed(self.texts) if not np.array_equal(other, text)):
            left -= min(len(other), self.most)
            if left < 0:
                break
            kept.insert(0, other)
        tokens = np.concatenate([opening, *(other[: self.most] for other in kept)]).astype(np.int32)
        return Company(opening, tokens, frozenset(map(text_digest, kept)))


def usual_opening(beginnings: Iterable[bytes]) -> Int32[np.ndarray, "tokens"]:
    """The longest beginning that more than half of them share, of one that nothing is compared with none.

    In order, those that share a beginning are neighbours, so more than half of them include the one in the middle.

    >>> usual_opening(np.int32(tokens).tobytes() for tokens in ([1, 2, 3], [1, 2, 4], [5, 6])).tolist()
    [1, 2]
    """
    ordered = sorted(beginnings)
    half = len(ordered) // 2
    if half == 0:
        return np.zeros(0, np.int32)
    shared = sorted((common_prefix(ordered[half], other) for other in ordered), reverse=True)
    return np.frombuffer(ordered[half], np.int32)[: shared[half]]


def last_run(entries: Iterable[Entry], room: int, most: int) -> list[Entry]:
    """The last run that is full, or the first one as far as it is.

    Args:
      room: tokens of a run.
      most: tokens of a text.
    """
    full: list[Entry] = []
    run: list[Entry] = []
    left = room
    for entry in entries:
        size = min(entry.num_tokens, most)
        if size > left:
            full, run, left = run, [], room
        run.append(entry)
        left -= size
    return full or run
