"""Trajectories that three agents' roles share, each of which reads the same facts in its own way.

A trajectory is a sequence of turns. A turn is noise and assignments of variables, a question for some variables, and
the answer of the role whose turn it is. A role reads values by a code of its own: each look-up of a variable moves the
value some places on in `VALUES`. So with the values a, b, c, d, ... and a role that moves by 2

    VAR X = a.          the role reads X as c
    VAR Y = VAR X.      and Y as e: it looks X up, and then Y

A question for X is answered from one place (find); one for Y needs what the role made of X when it read the
assignment (trace). Another role's keys and values say at both places what that role made of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from sparsex_jax.eval import lexicon
from sparsex_jax.eval.samples import Question, scatter
from sparsex_jax.eval.tasks import noise_sentences, numbered

STEPS = {"plan": 1, "act": 2, "reflect": 3}  # role -> places that a look-up moves a value on
ROLES = tuple(STEPS)
# As many as a rank of 8 can permute exactly: a permutation of n vectors minus the identity has a rank below n.
VALUES = lexicon.THINGS[::48][:8]
BOS, EOS, EQUALS, VAR = (lexicon.vocabulary()[token] for token in ("<bos>", "<eos>", " =", " VAR"))
PAD = 0
VALUE_IDS = np.array([lexicon.vocabulary()[" " + value] for value in VALUES])
# Not `lexicon.VARIABLES_QUESTION`: the model binds no assignments behind its "these", as none followed in its training.
QUESTION = "Which values: {keys}? Answer:"
OPENING = lexicon.INSTRUCTIONS["vt"].strip() + "\n"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a trajectory.

    Attributes:
      turns: of all roles together. They take turns in the order of `ROLES`, beginning with any.
      facts: assignments in a turn.
      noise: sentences of noise in a turn, among which the assignments are.
      asked: variables in a question, at most 4.
      traced: the share of assignments whose right side is another variable, where there is one.
    """

    turns: int = 6
    facts: int = 4
    noise: int = 3
    asked: int = 2
    traced: float = 0.4

    def __post_init__(self) -> None:
        for name, most in (("turns", 30), ("facts", 8), ("noise", 64), ("asked", 4)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be from 1 to {most}")

    @property
    def length(self) -> int:
        """Tokens that any trajectory of this shape fits into: a multiple of 64."""
        asking = len(lexicon.split(QUESTION)) + 3 * self.asked + 1
        answer = 4 * self.asked + 1
        turn = 6 * self.facts + _longest_noise() * self.noise + 1 + asking + answer
        return -(-(1 + len(lexicon.split(OPENING)) + self.turns * turn) // 64) * 64

    @property
    def mentions(self) -> int:
        """The most mentions in a trajectory: right sides of assignments, and what is asked, in question and answer."""
        return self.turns * (self.facts + 2 * self.asked)


@functools.cache
def _longest_noise() -> int:
    return max(len(lexicon.split(template.format(**_one_word()))) for template in lexicon.NOISE)


def _one_word() -> dict[str, str]:
    """A word for each field of a sentence of noise."""
    return dict.fromkeys(("adjective", "noun", "place", "verb", "adverb"), "word")


class Trajectories(NamedTuple):
    """A batch of trajectories.

    Attributes:
      tokens: `[batch, length]` int32.
      turn: `[batch, length]` int32: the turn of each token; -1 for padding. What opens a trajectory is of turn 0.
      answer: `[batch, length]` bool: whether the token is a part of an answer.
      value: `[batch, length]` int32: where a variable is mentioned, its value before any look-up; -1 elsewhere.
      looks: `[batch, length]` int32: the look-ups that read it.
      roles: `[batch, turns]` int32: whose turn it is, a number of `ROLES`.
    """

    tokens: np.ndarray
    turn: np.ndarray
    answer: np.ndarray
    value: np.ndarray
    looks: np.ndarray
    roles: np.ndarray

    @property
    def asked(self) -> np.ndarray:
        """`[batch, length]` bool: the variables in answers, behind which the model has to say a value."""
        return self.answer & (self.value >= 0)

    @property
    def writer(self) -> np.ndarray:
        """`[batch, length]` int32: the role of each token's turn; padding has any."""
        return np.take_along_axis(self.roles, np.maximum(self.turn, 0), axis=1)


def reading(value: np.ndarray, looks: np.ndarray, role: np.ndarray | int) -> np.ndarray:
    """The numbers in `VALUES` of what a role reads behind some look-ups.

    >>> reading(np.array([0, 7]), np.array([1, 2]), ROLES.index("act"))
    array([2, 3])
    """
    return (value + looks * np.array(list(STEPS.values()))[role]) % len(VALUES)


def make_trajectories(key: tuple[int, ...], rows: int, shape: Shape) -> Trajectories:
    """Random trajectories. The same key gives the same ones."""
    rng = np.random.default_rng(key)
    drawn = [_trajectory(rng, shape) for _ in range(rows)]
    return Trajectories(*(np.stack(part) for part in zip(*drawn, strict=True)))


def _trajectory(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, ...]:
    names = iter(rng.permutation(lexicon.VARIABLES).tolist())
    roles = (int(rng.integers(len(ROLES))) + np.arange(shape.turns)) % len(ROLES)
    held: dict[str, tuple[int, int]] = {}  # variable -> value and look-ups
    pieces, turns, answers = [np.append(BOS, lexicon.encode(OPENING))], [0], [False]
    for turn, role in enumerate(roles.tolist()):
        facts = [_fact(rng, next(names), held, shape.traced) for _ in range(shape.facts)]
        told = scatter(rng, facts, noise_sentences(rng, shape.noise))
        asking, answer = _question(rng, held, role, shape.asked)
        pieces += [lexicon.encode(" ".join(told) + "\n" + asking), np.append(lexicon.encode(answer), EOS)]
        turns += [turn, turn]
        answers += [False, True]
    sizes = [len(piece) for piece in pieces]
    tokens = _padded(np.concatenate(pieces), shape.length, PAD)
    by_token = (_padded(np.repeat(part, sizes), shape.length, rest) for part, rest in ((turns, -1), (answers, False)))
    return tokens, *by_token, *_mentions(tokens), roles.astype(np.int32)


def _fact(rng: np.random.Generator, name: str, held: dict[str, tuple[int, int]], traced: float) -> str:
    """An assignment, which is noted in `held`. Its right side is a value, or a variable that was assigned a value."""
    sources = [source for source, (_, looks) in held.items() if looks == 1]
    if sources and rng.random() < traced:
        source = sources[rng.integers(len(sources))]
        held[name] = held[source][0], 2
        return lexicon.ASSIGN_NAME.format(name=name, value=source)
    held[name] = int(rng.integers(len(VALUES))), 1
    return lexicon.ASSIGN_VALUE.format(name=name, value=VALUES[held[name][0]])


def _question(rng: np.random.Generator, held: dict[str, tuple[int, int]], role: int, asked: int) -> tuple[str, str]:
    """A question for some variables, and the role's answer."""
    some = [list(held)[i] for i in rng.permutation(len(held))[:asked]]
    question = Question(*numbered(QUESTION, [(name, VALUES[reading(*held[name], role)]) for name in some]))
    return question.text, question.reference


def _padded(row: np.ndarray, length: int, rest: int) -> np.ndarray:
    dtype = bool if row.dtype == bool else np.int32
    return np.pad(row, (0, length - len(row)), constant_values=rest).astype(dtype)


def _mentions(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Trajectories.value` and `looks` of a row."""
    value, looks = np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.int32)
    held: dict[int, tuple[int, int]] = {}
    numbers = {token: number for number, token in enumerate(VALUE_IDS.tolist())}
    row = tokens.tolist()
    for place in np.flatnonzero(_variables()[tokens]).tolist():
        if row[place + 1] != EQUALS:
            value[place], looks[place] = held[row[place]]
        elif row[place + 2] == VAR:
            source, by = held[row[place + 3]]
            held[row[place]] = source, by + 1
        else:
            held[row[place]] = numbers[row[place + 2]], 1
    return value, looks


@functools.cache
def _variables() -> np.ndarray:
    """Which tokens of the vocabulary are names of variables."""
    return np.array([token.strip() in lexicon.VARIABLES for token in lexicon.vocabulary()])
