"""Workloads of a server: prompts in the order in which they come, and what is stored before. From seeds.

`chat`: several users, whose histories grow by a turn each time. `rag`: documents are stored one by one, and each
question comes with some of them in an order of its own. `agents`: each of a group of agents reads what the others
said, shuffled; it was stored where they said it. What a model answers changes nothing: a history goes on with the
turns of the workload.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import regimes
from sparsex_jax.eval.tasks import make_sample


class Workload(NamedTuple):
    """Token ids: what is stored before, each text alone, and the prompts in the order in which they come."""

    stored: list[np.ndarray]
    prompts: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """So many prompts, whose bodies have about so many tokens in so many pieces: turns, documents or outputs."""

    requests: int
    length: int
    pieces: int

    def __post_init__(self) -> None:
        for name, least in {"requests": 1, "length": 1, "pieces": 2}.items():
            if getattr(self, name) < least:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least {least}")


def chat(rng: np.random.Generator, tokenizer: Any, size: Size) -> Workload:
    """Users take turns at random. Their last prompts have the full length."""
    users = -(-size.requests // size.pieces)
    histories = [_cases("chat", rng, tokenizer, size.length, size.pieces, size.pieces) for _ in range(users)]
    prompts, turns = [], Counter[int]()
    for user in rng.permutation(np.repeat(np.arange(users), size.pieces))[: size.requests].tolist():
        case = histories[user][turns[user] % len(histories[user])]
        turns[user] += 1
        prompts.append(np.concatenate([case.opening, *case.segments[: turns[user]], case.closing]))
    return Workload([], prompts)


def rag(rng: np.random.Generator, tokenizer: Any, size: Size) -> Workload:
    """Half of the documents come with each question, a line with a new score before each."""
    number = 2 * size.pieces
    cases = _cases("qa", rng, tokenizer, 2 * size.length, number, size.requests)
    prompts = []
    for case in itertools.islice(itertools.cycle(cases), size.requests):
        found = [case.segments[i] for i in rng.permutation(number)[: size.pieces]]
        lines = [f"Document {i}, relevance {rng.random():.3f}:\n" for i in range(1, len(found) + 1)]
        headings = [regimes.encode(tokenizer, line) for line in lines]
        body = itertools.chain.from_iterable(zip(headings, found, strict=True))
        prompts.append(np.concatenate([case.opening, *body, case.closing]))
    return Workload(list(cases[0].segments), prompts)


def agents(rng: np.random.Generator, tokenizer: Any, size: Size) -> Workload:
    """Each agent said its piece behind the problem; now each reads the problem and all others."""
    stored, prompts = [], []
    length = size.length * size.pieces // (size.pieces - 1)
    for _ in range(-(-size.requests // size.pieces)):
        cases = _cases("agents", rng, tokenizer, length, size.pieces + 1, size.pieces)
        opening, (problem, *outputs) = cases[0].opening, cases[0].segments
        stored += [np.concatenate([opening, problem, output]) for output in outputs]
        for agent in range(size.pieces):
            others = [outputs[i] for i in rng.permutation(size.pieces) if i != agent]
            prompts.append(np.concatenate([opening, problem, *others, cases[agent % len(cases)].closing]))
    return Workload(stored, prompts[: size.requests])


WORKLOADS: dict[str, Callable[[np.random.Generator, Any, Size], Workload]] = {
    "chat": chat,
    "rag": rag,
    "agents": agents,
}


def make_workload(name: str, tokenizer: Any, size: Size, seed: int) -> Workload:
    """One of `WORKLOADS`; the same for the same seed.

    Args:
      tokenizer: a transformers tokenizer. Parts are tokenised one by one, so that a text has the same tokens anywhere.
    """
    return WORKLOADS[name](np.random.default_rng([seed, *name.encode()]), tokenizer, size)


def _cases(
    task: str, rng: np.random.Generator, tokenizer: Any, length: int, pieces: int, questions: int
) -> list[regimes.Case]:
    """The same body with one question after the other, as many as it has."""

    def count(text: str) -> int:
        return len(regimes.encode(tokenizer, text))

    sample = make_sample(task, rng, length, pieces, questions, count=count)
    return [regimes.tokenize(sample, tokenizer, question) for question in range(len(sample.questions))]
