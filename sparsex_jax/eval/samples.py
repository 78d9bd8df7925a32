"""What a generated sample consists of, and the random choices that generators of all kinds of tasks make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sparsex_jax.eval import lexicon


@dataclasses.dataclass(frozen=True)
class Question:
    """A question. Its text ends so that the model continues with the answer.

    Attributes:
      answers: strings that a right answer contains.
      written: how the reference answer writes each of them. Empty: as they are.
    """

    text: str
    answers: tuple[str, ...]
    written: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The continuation that a perfect model writes."""
        return " " + ", ".join(self.written or self.answers) + "."


@dataclasses.dataclass(frozen=True)
class Sample:
    """The parts of a prompt: the instruction, the segments, and one of the questions.

    Attributes:
      segments: the reusable body. Each ends with a newline.
      questions: as many as were asked for, or as the body has answers to; at least one.
      earlier: the instruction of the prompt that the segments come from, if that matters. Empty: any.
    """

    task: str
    instruction: str
    segments: tuple[str, ...]
    questions: tuple[Question, ...]
    earlier: str = ""


@dataclasses.dataclass(frozen=True)
class BodySize:
    """The size of a body.

    Attributes:
      num_tokens: tokens in all segments together, about.
      num_segments: segments.
      num_questions: questions, at most.
      count: gives the number of tokens in a text.
    """

    num_tokens: int
    num_segments: int
    num_questions: int
    count: Callable[[str], int]

    def fits(self, tokens_each: int, least: int, most: int) -> int:
        """How many items of `tokens_each` tokens fill half of the body, but from `least` to `most`."""
        return min(max(self.num_tokens // (2 * tokens_each), least), most)


class Body(NamedTuple):
    """The generated part of a sample.

    Attributes:
      segments: the reusable body.
      questions: about the segments.
      opening: text that is added to the task's instruction.
      earlier: what stood there in the prompt that the segments come from, if that matters. Empty: anything.
    """

    segments: list[str]
    questions: list[Question]
    opening: str = ""
    earlier: str = ""


def scatter(rng: np.random.Generator, facts: Sequence[str], noise: Sequence[str]) -> list[str]:
    """Put the facts among the noise in their order: each at a random place in its own equal stretch of the noise."""
    places = (np.arange(len(facts)) + rng.random(len(facts))) / len(facts) * len(noise)
    following = iter([*zip(places.tolist(), facts, strict=True)])
    place, fact = next(following, (np.inf, ""))
    mixed: list[str] = []
    for number, sentence in enumerate(noise, start=1):
        while place < number:
            mixed.append(fact)
            place, fact = next(following, (np.inf, ""))
        mixed.append(sentence)
    return mixed


def cut(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    edges = np.linspace(0, len(items), parts + 1).astype(int)
    return [items[begin:end] for begin, end in itertools.pairwise(edges)]


def pick[Item](rng: np.random.Generator, items: Sequence[Item], number: int) -> list[Item]:
    """Different items in random order: `number`, or all if there are fewer."""
    return [items[i] for i in rng.permutation(len(items))[:number]]


def numbers(rng: np.random.Generator, number: int, digits: int) -> list[str]:
    """`number` different numbers of `digits` digits."""
    drawn: dict[int, None] = {}
    while len(drawn) < number:
        drawn |= dict.fromkeys(rng.integers(10 ** (digits - 1), 10**digits, number - len(drawn)).tolist())
    return [str(value) for value in drawn]


def person(rng: np.random.Generator) -> str:
    first, last = lexicon.FIRST_NAMES, lexicon.LAST_NAMES
    return f"{first[rng.integers(len(first))]} {last[rng.integers(len(last))]}"
