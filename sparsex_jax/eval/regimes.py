"""Caching regimes: the ways in which a sample's segments come into the store before the prompt that reuses them.

    joint         one earlier prompt, with another instruction, had all of them
    shuffled      one earlier prompt, with the same instruction, had all of them in another order
    independent   each is prefilled alone, and the prompt has them in another order
    preamble      as independent, but each is prefilled behind a short text whose KV is not kept
    company:N     as preamble, but the text is what a server knows beforehand: the instruction that prompts begin with,
                  and N segments of other samples of the task. Its KV is kept. Without N, as many as the body has.
    strangers:N   as company, but the segments are of another task, of another kind (`tasks.STRANGERS`)

Where a task says what its segments were behind (`Sample.earlier`), that is the instruction in all regimes but
`independent`. Parts are tokenised one by one and their ids joined, so that a segment has the same tokens in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import lexicon
from sparsex_jax.eval.samples import Sample
from sparsex_jax.reuse.methods import Full

Tokens = Int32[np.ndarray, "tokens"]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """The parts of a prompt that asks one of a sample's questions, as token ids.

    Attributes:
      earlier: the text that was before the segments when they were stored: before all of them, or before each.
      known: the instruction that the server saw before; the prompt's own, unless the task says otherwise.
      opening: the text before them in the prompt: the instruction, in the model's chat template if it has one.
      segments: the reusable body.
      closing: the text behind them: the question, and the template's end, at which the model answers.
      examples: segments of other samples, which the prompt does not have.
      stored: the segments in the order in which one earlier prompt had them behind the same opening. None if none had.
    """

    earlier: Tokens
    known: Tokens
    opening: Tokens
    segments: tuple[Tokens, ...]
    closing: Tokens
    examples: tuple[Tokens, ...] = ()
    stored: tuple[Tokens, ...] | None = None

    @property
    def prompt(self) -> Tokens:
        """The whole prompt."""
        return np.concatenate([self.opening, *self.segments, self.closing])

    @property
    def reordered(self) -> Tokens:
        """The whole prompt with the segments in the order of an earlier prompt, if one began as this one does."""
        segments = self.segments if self.stored is None else self.stored
        return np.concatenate([self.opening, *segments, self.closing])

    @property
    def company(self) -> Tokens:
        """The text that the regimes `company` and `strangers` prefill first."""
        return np.concatenate([self.known, *self.examples])


def tokenize(sample: Sample, tokenizer: Any, question: int = 0, examples: Sequence[str] = ()) -> Case:
    """Tokenise the parts of the prompt that asks one of the sample's questions.

    Args:
      question: index of the question.
      examples: segments of other samples.

    Raises:
      InvalidRequestError: the prompt has words for which the tokenizer has no token.
    """
    text = sample.questions[question].text
    opening, closing = _around(tokenizer, sample.instruction, text)
    earlier, _ = _around(tokenizer, sample.earlier or lexicon.EARLIER_INSTRUCTION, text)
    segments, others = (tuple(encode(tokenizer, text) for text in texts) for texts in (sample.segments, examples))
    case = Case(earlier, earlier if sample.earlier else opening, opening, segments, closing, others)
    if tokenizer.unk_token_id in case.prompt:
        raise InvalidRequestError(f"task={sample.task!r} has words that this model's tokenizer does not know")
    return case


def encode(tokenizer: Any, text: str, *, special: bool = False) -> Tokens:
    """The token ids of one part. With `special`, the tokenizer adds the tokens that it begins a text with."""
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)


def _around(tokenizer: Any, instruction: str, question: str) -> tuple[Tokens, Tokens]:
    """The tokens before and behind the body. If there is a chat template, they and the body are one user message."""
    if not tokenizer.chat_template:
        return encode(tokenizer, instruction, special=True), encode(tokenizer, question)
    body = "(body)"
    message = {"role": "user", "content": f"{instruction}{body}{question}"}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition(body)
    return encode(tokenizer, before), encode(tokenizer, after)


def _joint(engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
    prompt = np.concatenate([case.earlier, *case.segments])
    engine.prefill(prompt, reuse=Full(), namespace=namespace)
    return case


def _shuffled(engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
    prompt = np.concatenate([case.known, *case.segments])
    engine.prefill(prompt, reuse=Full(), namespace=namespace)
    return dataclasses.replace(_in_another_order(case, rng), stored=case.segments)


def _independent(engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
    for segment in case.segments:
        engine.remember(segment, namespace=namespace, company=False)
    return _in_another_order(case, rng)


def _preamble(engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
    for segment in case.segments:
        engine.remember(segment, namespace=namespace, preamble=case.earlier)
    return _in_another_order(case, rng)


def _company(engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
    engine.remember(case.company, namespace=namespace, company=False)
    for segment in case.segments:
        engine.remember(segment, namespace=namespace, preamble=case.company)
    return _in_another_order(case, rng)


def _in_another_order(case: Case, rng: np.random.Generator) -> Case:
    order = rng.permutation(len(case.segments))
    return dataclasses.replace(case, segments=tuple(case.segments[i] for i in order))


Store = Callable[[Engine, Case, str, np.random.Generator], Case]
REGIMES: dict[str, Store] = {
    "joint": _joint,
    "shuffled": _shuffled,
    "independent": _independent,
    "preamble": _preamble,
    "company": _company,
    "strangers": _company,
}
BEHIND_EXAMPLES = ("company", "strangers")


@dataclasses.dataclass(frozen=True)
class Regime:
    """A regime as its name says it: `joint`, or `company:2`.

    Attributes:
      kind: one of `REGIMES`.
      number: how many segments stand before each donor when it is made. None: as many as the body has.
    """

    kind: str
    number: int | None = None

    @classmethod
    def parse(cls, name: str) -> Regime:
        """The regime of a name.

        Raises:
          InvalidRequestError: there is no such regime, or it has no number, or the number is not an integer from 0 on.

        >>> Regime.parse("company:2")
        Regime(kind='company', number=2)
        """
        kind, colon, number = name.partition(":")
        if kind not in REGIMES:
            known = [f"{each}:N" if each in BEHIND_EXAMPLES else each for each in REGIMES]
            raise InvalidRequestError(f"regime={name!r} is unknown; there are: {', '.join(known)}")
        if not colon:
            return cls(kind)
        if kind not in BEHIND_EXAMPLES or not number.isdecimal():
            with_number = " and ".join(BEHIND_EXAMPLES)
            raise InvalidRequestError(f"regime={name!r}: only {with_number} have a number, an integer from 0 on")
        return cls(kind, int(number))

    def num_examples(self, num_segments: int) -> int:
        """How many segments of other samples it needs for a body of `num_segments`."""
        if self.kind not in BEHIND_EXAMPLES:
            return 0
        return num_segments if self.number is None else self.number

    def store(self, engine: Engine, case: Case, namespace: str, rng: np.random.Generator) -> Case:
        """Store a case's segments. The result has its segments in the order in which the prompt has them."""
        return REGIMES[self.kind](engine, case, namespace, rng)


def check_room(engine: Engine, case: Case, new_tokens: int, share: int = 1) -> None:
    """Check that the store holds a case's donors, its prompt and its new tokens at the same time, `share` times.

    Raises:
      InvalidRequestError: it does not. A method that recomputes everything would then evict the donors that the next
        method should reuse.
    """
    page_size = engine.config.page_size
    before = max(len(case.earlier), len(case.company))
    lengths = [before, *map(len, case.segments), len(case.prompt) + new_tokens]
    needed = share * sum(-(-length // page_size) for length in lengths)
    if needed > engine.config.num_pages:
        raise InvalidRequestError(
            f"store_tokens={engine.config.store_tokens} must be at least {needed * page_size} for {share} such prompts"
        )
