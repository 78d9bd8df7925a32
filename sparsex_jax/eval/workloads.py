"""Workloads of a server, generated from seeds: texts that are stored first, then prompts in the order they arrive.

    chat      several users take turns, and a user's history grows by a turn each time
    rag       documents are stored one by one; each question comes with some of them, in an order of its own
    agents    each of a group of agents reads the outputs of the others, shuffled; each output was stored behind the
              problem, where the agent wrote it

and each of `sparsex_jax.eval.conversations`, several of which are held at a time.

The prompts do not depend on what a model answers: histories go on with the workload's own turns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import regimes
from sparsex_jax.eval.conversations import (
    CONVERSATIONS,
    ConversationSize,
    encode_messages,
    make_conversation,
    scripted_requests,
)
from sparsex_jax.eval.tasks import make_sample


class Workload(NamedTuple):
    """Token ids, int32.

    Attributes:
      stored: texts that are stored first, each alone.
      prompts: in the order they arrive.
    """

    stored: list[np.ndarray]
    prompts: list[np.ndarray]

    def within(self, vocab_size: int) -> Workload:
        """The same with ids that a vocabulary has, for a tokenizer that is not the model's."""
        return Workload(*([tokens % vocab_size for tokens in texts] for texts in self))


@dataclasses.dataclass(frozen=True)
class WorkloadSize:
    """The size of a workload.

    Attributes:
      requests: how many prompts arrive, at least 1.
      length: tokens of each prompt's body, about. Of a conversation: 800 is its plain size.
      pieces: turns, documents or outputs in each body, or conversations at a time; at least 2.
    """

    requests: int
    length: int
    pieces: int

    def __post_init__(self) -> None:
        for name, least in {"requests": 1, "length": 1, "pieces": 2}.items():
            if getattr(self, name) < least:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least {least}")


def chat(rng: np.random.Generator, tokenizer: Any, size: WorkloadSize) -> Workload:
    """Users take turns in random order. Only a user's last prompt has the full length."""
    users = -(-size.requests // size.pieces)
    histories = [_cases("chat", rng, tokenizer, size.length, size.pieces, size.pieces) for _ in range(users)]
    prompts, turns = [], Counter[int]()
    for user in rng.permutation(np.repeat(np.arange(users), size.pieces))[: size.requests].tolist():
        case = histories[user][turns[user] % len(histories[user])]
        turns[user] += 1
        prompts.append(np.concatenate([case.opening, *case.segments[: turns[user]], case.closing]))
    return Workload([], prompts)


def rag(rng: np.random.Generator, tokenizer: Any, size: WorkloadSize) -> Workload:
    """Each question comes with half of the documents, each behind a line with its rank and a random relevance."""
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


def agents(rng: np.random.Generator, tokenizer: Any, size: WorkloadSize) -> Workload:
    """Each agent's output was stored behind the problem. Each prompt has the problem and the outputs of all others."""
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


def conversation(name: str, rng: np.random.Generator, tokenizer: Any, size: WorkloadSize) -> Workload:
    """Conversations of the same kind take turns in random order. Needs a tokenizer with a chat template."""
    turns = -(-size.requests // size.pieces)
    scaled = ConversationSize(turns, max(size.length / 800, 1.0))
    seeds = rng.integers(2**31, size=size.pieces).tolist()
    stored = [text for seed in seeds for text in make_conversation(name, scaled, seed).stored]
    held = [scripted_requests(name, scaled, seed) for seed in seeds]
    order = rng.permutation(np.repeat(np.arange(size.pieces), turns))[: size.requests].tolist()
    prompts = [encode_messages(tokenizer, next(held[each]).messages) for each in order]
    return Workload([regimes.encode(tokenizer, text) for text in stored], prompts)


WORKLOADS: dict[str, Callable[[np.random.Generator, Any, WorkloadSize], Workload]] = {
    "chat": chat,
    "rag": rag,
    "agents": agents,
    **{name: functools.partial(conversation, name) for name in CONVERSATIONS},
}


def make_workload(name: str, tokenizer: Any, size: WorkloadSize, seed: int) -> Workload:
    """Make one of `WORKLOADS`. The same seed makes the same workload.

    Args:
      tokenizer: a tokenizer of transformers. Parts are tokenised one by one, so that a text has the same tokens in
        every prompt.
    """
    return WORKLOADS[name](np.random.default_rng([seed, *name.encode()]), tokenizer, size)


def _cases(
    task: str, rng: np.random.Generator, tokenizer: Any, length: int, pieces: int, questions: int
) -> list[regimes.Case]:
    """The same body with one question after the other: `questions` cases, or as many as the body has questions for."""

    def count(text: str) -> int:
        return len(regimes.encode(tokenizer, text))

    sample = make_sample(task, rng, length, pieces, questions, count=count)
    return [regimes.tokenize(sample, tokenizer, question) for question in range(len(sample.questions))]
