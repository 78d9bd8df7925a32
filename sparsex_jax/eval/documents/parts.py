"""What the tasks on documents share: different people, things and places, and documents with facts between prose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsex_jax.eval import lexicon
from sparsex_jax.eval.documents import prose
from sparsex_jax.eval.documents.prose import listed
from sparsex_jax.eval.samples import BodySize, Question, person, pick, scatter

INSTRUCTION = "You are a helpful assistant. Answer the question from the documents below, in one short sentence.\n"

COLOURS = listed("green, blue, yellow, black, white, brown, purple, red, grey, pink, orange")
BOXES = listed("chest, trunk, cabinet, locker, safe, basket, suitcase, wardrobe, crate, casket, sack, cupboard")

Fill = Callable[[np.random.Generator], list[str]]


def people(rng: np.random.Generator, number: int) -> list[str]:
    """Different names."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[person(rng)] = None
    return list(found)


def unlike_people(rng: np.random.Generator, number: int) -> list[str]:
    """Different names. As far as there are enough, no two have a first or a last name in common."""
    return _unlike(rng, lexicon.FIRST_NAMES, lexicon.LAST_NAMES, number)


def unlike_boxes(rng: np.random.Generator, number: int) -> list[str]:
    """Different kinds of boxes. As far as there are enough, no two are of one colour or of one kind.

    A small model takes a white chest for a white locker.
    """
    return _unlike(rng, COLOURS, BOXES, number)


def _unlike(rng: np.random.Generator, first: Sequence[str], second: Sequence[str], number: int) -> list[str]:
    columns = enough(rng, first, number), enough(rng, second, number)
    return [f"{one} {two}" for one, two in zip(*columns, strict=True)]


def ask_about(
    rng: np.random.Generator, things: Sequence[Mapping[str, Any]], number: int, question: str, answer: str, written: str
) -> list[Question]:
    """Questions about `number` of the things, or about all if there are fewer.

    Args:
      question, written: the texts of a question and of its answer, with the names of a thing's fields in braces. An
        empty `written` is the answer as it is.
      answer: the field that holds the answer.
    """
    return [
        Question(question.format(**each), (each[answer],), (written.format(**each),) if written else ())
        for each in pick(rng, things, number)
    ]


def enough(rng: np.random.Generator, words: Sequence[str], number: int) -> list[str]:
    """`number` words, all different if there are enough."""
    return [words[i] for i in spread(rng, len(words), number)]


def spread(rng: np.random.Generator, size: int, number: int) -> list[int]:
    """`number` places in a list of this size, all different if there are enough."""
    return np.resize(rng.permutation(size), number).tolist()


def document(rng: np.random.Generator, kind: str, fields: dict[str, Any], facts: Sequence[str], size: BodySize) -> str:
    """A title, prose and the facts somewhere in it: an equal share of the body's tokens, about."""
    title = prose.TITLES[kind].format(**fields)
    left = size.num_tokens // size.num_segments - size.count(title + " ".join(facts))
    said = filling(rng, lambda some: prose.sentences(some, kind), left, size)
    return f"{title}{' '.join(scatter(rng, facts, said) if said else facts)}\n"


def filling(rng: np.random.Generator, more: Fill, num_tokens: int, size: BodySize) -> list[str]:
    """Pieces of text, of at most `num_tokens` tokens together. `more` gives another round of pieces each time."""
    said: list[str] = []
    while num_tokens > 0:
        for piece in more(rng):
            num_tokens -= size.count(" " + piece)
            if num_tokens < 0:
                break
            said.append(piece)
    return said


def joined(items: Sequence[str]) -> str:
    """
    >>> joined(["one", "two", "three"])
    'one, two and three'
    """
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
