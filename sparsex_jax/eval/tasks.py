"""Tasks like RULER's, and two kinds of real use, generated from seeds at any length.

Most are made of a closed vocabulary, for a model trained on them; the notes are for models that read English.

A sample is what reuse sees in practice: a fresh instruction, a body of segments that are in the store, and a
fresh question. No answer depends on the order of the segments, so that they can come back in another order.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsex_jax.eval import lexicon, notes


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose text ends so that the model goes on with the answer.

    Attributes:
      answers: strings that the answer must contain.
      written: how the reference writes each of them; by default as it is.
    """

    text: str
    answers: tuple[str, ...]
    written: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """What a perfect model goes on with."""
        return " " + ", ".join(self.written or self.answers) + "."


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt in parts: instruction, segments, one of the questions.

    Attributes:
      segments: the reusable body; each ends with a newline.
      questions: as many as were wanted, or as the body has room for; at least one.
    """

    task: str
    instruction: str
    segments: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is wanted; `count` gives the tokens of a text."""

    num_tokens: int
    num_segments: int
    num_questions: int
    count: Callable[[str], int]

    def fits(self, tokens_each: int, least: int, most: int) -> int:
        """How many items fill at most half of the body, within these bounds."""
        return min(max(self.num_tokens // (2 * tokens_each), least), most)


class Body(NamedTuple):
    """Segments, what can be asked about them, and what the instruction says beside its usual text."""

    segments: list[str]
    questions: list[Question]
    opening: str = ""


def word_count(text: str) -> int:
    """The number of tokens under `lexicon.ruler_tokenizer`: words, digits, capital letters, punctuation."""
    return len(lexicon.split(text))


def make_sample(
    task: str,
    rng: np.random.Generator,
    num_tokens: int,
    num_segments: int = 4,
    num_questions: int = 1,
    count: Callable[[str], int] = word_count,
) -> Sample:
    """Generate a sample of a task.

    Args:
      num_tokens: about so many tokens of body, by `count`. What must be in it (the needles, say) is in it all the same.
      num_questions: at most so many; a body has one question for `cwe` and `fwe`.

    Raises:
      ValueError: no such task, or a size below 1.
    """
    if task not in _TASKS:
        raise ValueError(f"task={task!r} is unknown; there are: {', '.join(TASKS)}")
    if min(num_tokens, num_segments, num_questions) < 1:
        raise ValueError("num_tokens, num_segments and num_questions must be at least 1")
    body = _TASKS[task](rng, Size(num_tokens, num_segments, num_questions, count))
    instruction = lexicon.INSTRUCTIONS.get(task, notes.INSTRUCTION)
    return Sample(task, instruction + body.opening, tuple(body.segments), tuple(body.questions))


# Retrieval --------------------------------------------------------------------------------------------------


def niah(rng: np.random.Generator, size: Size) -> Body:
    """One needle, one asked; for more questions more needles."""
    needles = _needles(rng, size.fits(20, 1, size.num_questions))
    questions = [Question(lexicon.NEEDLE_QUESTION.format(key=key), (value,)) for key, value in needles]
    return Body(_hidden_needles(rng, needles, size), questions)


def mq_niah(rng: np.random.Generator, size: Size) -> Body:
    """Many needles, four asked at a time."""
    needles = _needles(rng, size.fits(64, 4, 32))
    asked = [[needles[i] for i in rng.permutation(len(needles))[:4]] for _ in range(size.num_questions)]
    questions = [Question(*numbered(lexicon.NEEDLES_QUESTION, some)) for some in asked]
    return Body(_hidden_needles(rng, needles, size), questions)


def mk_niah(rng: np.random.Generator, size: Size) -> Body:
    """A needle in every segment, one asked: the others distract."""
    needles = _needles(rng, size.num_segments)
    share = dataclasses.replace(size, num_tokens=size.num_tokens // size.num_segments, num_segments=1)
    segments = [_hidden_needles(rng, [needle], share)[0] for needle in needles]
    asked = [needles[i] for i in rng.permutation(len(needles))[: size.num_questions]]
    return Body(segments, [Question(lexicon.NEEDLE_QUESTION.format(key=key), (value,)) for key, value in asked])


def numbered(text: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The fields of a question for several keys at once: its text, the values, and how the reference writes them.

    >>> numbered("Which? {keys}", [("a", "1"), ("b", "2")])
    ('Which? first a, second b', ('1', '2'), ('first a 1', 'second b 2'))
    """
    each = [
        {"ordinal": ordinal, "key": key, "value": value}
        for ordinal, (key, value) in zip(lexicon.ORDINALS, pairs, strict=False)
    ]
    keys = ", ".join(lexicon.NUMBERED.format(**fields) for fields in each)
    written = tuple(lexicon.NUMBERED_ANSWER.format(**fields) for fields in each)
    return text.format(keys=keys), tuple(value for _, value in pairs), written


def _needles(rng: np.random.Generator, number: int) -> list[tuple[str, str]]:
    return list(zip(_pick(rng, lexicon.THINGS, number), _numbers(rng, number, 7), strict=True))


def _hidden_needles(rng: np.random.Generator, needles: Sequence[tuple[str, str]], size: Size) -> list[str]:
    return _hidden(rng, [lexicon.NEEDLE.format(key=key, value=value) for key, value in needles], size)


def vt(rng: np.random.Generator, size: Size) -> Body:
    """Chains of variables, each assigned the one before; asked are the values of four.

    Two chains of three begin in the instruction and go on in up to two segments; the others stay in one segment. So no
    assignment needs another segment before it, but what most of them mean depends on text that is new in every prompt.
    RULER's chains all begin in the body, and it asks for all variables of a value.
    """
    values = _pick(rng, lexicon.THINGS, size.fits(160, 4, max(8, size.num_questions)))
    names = iter(_pick(rng, lexicon.VARIABLES, 5 * len(values)))
    opening: list[str] = []
    parts: list[list[list[str]]] = [[] for _ in range(size.num_segments)]  # chains, or ends of them, by segment
    held: list[list[tuple[str, str]]] = []  # the variables of each value that can be asked
    for number, value in enumerate(values):
        first, *others = itertools.islice(names, int(rng.integers(4, 6)))
        held.append([(name, value) for name in others])
        start = lexicon.ASSIGN_VALUE.format(name=first, value=value)
        if number % 3 == 2:
            parts[rng.integers(len(parts))].append([start, *_assignments([first, *others])])
            continue
        opening.append(start)
        cut = int(rng.integers(len(others)))
        for part in (others[:cut], others[cut:]):
            parts[rng.integers(len(parts))].append(_assignments([first, *part]))
    questions = [_about_variables(rng, held) for _ in range(size.num_questions)]
    share = dataclasses.replace(size, num_tokens=size.num_tokens // len(parts), num_segments=1)
    segments = [_hidden(rng, _interleave(rng, own), share)[0] for own in parts]
    return Body(segments, questions, " ".join(rng.permutation(opening)) + "\n")


def _about_variables(rng: np.random.Generator, held: Sequence[Sequence[tuple[str, str]]]) -> Question:
    """Four variables of different values. An answer counts only beside the name of its variable."""
    asked = [held[i][int(rng.integers(len(held[i])))] for i in rng.permutation(len(held))[:4]]
    text, _, written = numbered(lexicon.VARIABLES_QUESTION, asked)
    return Question(text, tuple(answer.split(maxsplit=1)[1] for answer in written), written)


def _assignments(names: Sequence[str]) -> list[str]:
    """Each name assigned from the one before."""
    return [lexicon.ASSIGN_NAME.format(name=name, value=source) for source, name in itertools.pairwise(names)]


def tracked(rng: np.random.Generator, number: int, num_questions: int) -> tuple[list[str], list[Question]]:
    """The drill of `vt`: so many chains of assignments and nothing else, mixed, and questions about them."""
    names = iter(_pick(rng, lexicon.VARIABLES, len(lexicon.VARIABLES)))
    chains, held = [], []
    for value in _pick(rng, lexicon.THINGS, min(number, len(lexicon.VARIABLES) // 5)):
        own = list(itertools.islice(names, int(rng.integers(2, 6))))
        chains.append([lexicon.ASSIGN_VALUE.format(name=own[0], value=value), *_assignments(own)])
        held.append([(name, value) for name in own[1:]])
    return _interleave(rng, chains), [_about_variables(rng, held) for _ in range(num_questions)]


def _interleave(rng: np.random.Generator, chains: Sequence[Sequence[str]]) -> list[str]:
    """One list of all, in which each chain keeps its order."""
    turns = rng.permutation(np.repeat(np.arange(len(chains)), [len(chain) for chain in chains]))
    following = [iter(chain) for chain in chains]
    return [next(following[turn]) for turn in turns]


# Counting ---------------------------------------------------------------------------------------------------


def cwe(rng: np.random.Generator, size: Size) -> Body:
    """Common words stand ten times as often as the others; asked are the common ones, answered alphabetically."""
    total = _number_of_words(lexicon.THINGS, size)
    common = min(max(total // 100, 1), 10)
    rare = min(max(total // 3 - 10 * common, common), len(lexicon.THINGS) - common)
    words = _pick(rng, lexicon.THINGS, common + rare)
    each = max(total // (10 * common + rare), 1)
    filling = np.resize(words[common:], max(total - each * 10 * common, each * rare))
    text = rng.permutation(np.concatenate([np.repeat(words[:common], 10 * each), filling])).tolist()
    question = lexicon.COMMON_QUESTION.format(number=common)
    return Body(_word_segments(lexicon.WORD_LIST, text, size), [Question(question, tuple(sorted(words[:common])))])


def fwe(rng: np.random.Generator, size: Size) -> Body:
    """Invented words whose frequencies fall with the square of their rank; asked are the three most frequent."""
    total = max(_number_of_words(lexicon.CODED_WORDS, size), 30)
    words = _pick(rng, lexicon.CODED_WORDS, 60)
    weights = np.arange(1, len(words) + 1) ** -2.0
    times = np.maximum(np.round(total * weights / weights.sum()).astype(int), [4, 3, 2] + [1] * (len(words) - 3))
    text = rng.permutation(np.repeat(words, times)).tolist()
    return Body(_word_segments(lexicon.CODED_LIST, text, size), [Question(lexicon.FREQUENT_QUESTION, tuple(words[:3]))])


def _number_of_words(words: Sequence[str], size: Size) -> int:
    """How many of such words fill the body."""
    return max(size.num_tokens * 64 // size.count(" ".join(words[:64])), size.num_segments)


def _word_segments(opening: str, words: Sequence[str], size: Size) -> list[str]:
    return [opening + " ".join(part) + "\n" for part in _cut(words, size.num_segments)]


# Use --------------------------------------------------------------------------------------------------------


def qa(rng: np.random.Generator, size: Size) -> Body:
    """Documents about invented people; asked is one fact about one of them."""
    number = size.fits(60, 3, 24)
    people = dict.fromkeys(_name(rng) for _ in range(number))
    facts = [[(name, *_fact(rng, kind)) for kind in lexicon.PERSON_FACTS] for name in people]
    told = [[said.format(name=name) for name, said, _, _ in some] for some in facts]
    asked = [fact for some in facts for fact in some]
    questions = [
        Question(lexicon.PERSON_QUESTION.format(question=question.format(name=name)), (value,))
        for name, _, question, value in (asked[i] for i in rng.permutation(len(asked))[: size.num_questions])
    ]
    return Body(_hidden(rng, [" ".join(document) for document in told], size), questions)


def chat(rng: np.random.Generator, size: Size) -> Body:
    """A long history of turns in some of which the user tells a fact; asked is one of them."""
    facts = [_fact(rng, kind) for kind in lexicon.CHAT_FACTS]
    kept = [facts[i] for i in rng.permutation(len(facts))[: size.fits(30, 2, len(facts))]]
    facts_told = [_turn(rng, said) for said, _, _ in kept]
    noise = _noise(rng, size.num_tokens - size.count("".join(facts_told)), size.num_segments, size.count, _turn)
    questions = [Question(lexicon.CHAT_QUESTION.format(question=question), (value,)) for _, question, value in kept]
    parts = _cut(_scatter(rng, facts_told, noise), size.num_segments)
    return Body(["".join(part) for part in parts], questions[: size.num_questions])


def _turn(rng: np.random.Generator, said: str) -> str:
    return lexicon.CHAT_TURN.format(user=said, assistant=lexicon.CHAT_REPLIES[rng.integers(len(lexicon.CHAT_REPLIES))])


def notes_codes(rng: np.random.Generator, size: Size) -> Body:
    """A note a segment, about a place of another kind; asked is the access code that one of them tells."""
    return _notes(rng, size, notes.CODE_QUESTION, "code")


def notes_people(rng: np.random.Generator, size: Size) -> Body:
    """The same notes; asked is who runs one of the places."""
    return _notes(rng, size, notes.KEEPER_QUESTION, "name")


def notes_years(rng: np.random.Generator, size: Size) -> Body:
    """The same notes; asked is when one of the places was built."""
    return _notes(rng, size, notes.YEAR_QUESTION, "year")


def _notes(rng: np.random.Generator, size: Size, question: str, answer: str) -> Body:
    """As many notes as segments, while there are kinds of places; a note has the length that it has."""
    number = min(size.num_segments, len(notes.KINDS))
    kinds = [notes.KINDS[i] for i in rng.permutation(len(notes.KINDS))[:number]]
    fields = [
        kind._asdict() | {"lower": kind.place.lower(), "town": town, "code": code, "year": year, "name": _name(rng)}
        for kind, town, code, year in zip(
            kinds,
            _pick(rng, lexicon.TOWNS, number),
            _numbers(rng, number, 4),
            (rng.permutation(300)[:number] + 1650).tolist(),
            strict=True,
        )
    ]
    segments = [_note(rng, at, each) for at, each in enumerate(fields, start=1)]
    asked = [fields[i] for i in rng.permutation(number)[: size.num_questions]]
    questions = [Question(question.format(**each), (str(each[answer]),)) for each in asked]
    return Body(segments, questions, notes.OPENING.format(count=notes.COUNTS[number - 1]))


def _note(rng: np.random.Generator, number: int, fields: dict[str, Any]) -> str:
    """Four of the kind's sentences, with the facts between them."""
    one, two, three, four = (fields["sentences"][i] for i in rng.permutation(len(fields["sentences"]))[:4])
    said = [notes.TITLE, one, notes.KEEPER, two, notes.CODE, three, notes.YEAR, four]
    return notes.NOTE.format(text=" ".join(said), number=number, **fields).format(**fields)


def agents(rng: np.random.Generator, size: Size) -> Body:
    """A problem and what agents answered to it; asked is the same thing of two of them."""
    names = _pick(rng, lexicon.FIRST_NAMES, max(size.num_segments - 1, 2))
    by_kind = [_different_facts(rng, kind, len(names)) for kind in lexicon.AGENT_FACTS]
    facts = [list(some) for some in zip(*by_kind, strict=True)]
    share = dataclasses.replace(size, num_tokens=size.num_tokens // len(names), num_segments=1)
    outputs = [
        f"{lexicon.AGENT_OPENING.format(name=name)} {_hidden(rng, [said for said, _, _ in some], share)[0]}"
        for name, some in zip(names, facts, strict=True)
    ]
    problem = lexicon.AGENT_PROBLEM.format(place=lexicon.PLACES[rng.integers(len(lexicon.PLACES))])
    questions = [_about_two(rng, names, facts) for _ in range(size.num_questions)]
    return Body(["".join(part) for part in _cut([problem, *outputs], size.num_segments)], questions)


def _about_two(
    rng: np.random.Generator, names: Sequence[str], facts: Sequence[Sequence[tuple[str, str, str]]]
) -> Question:
    two, kind = rng.permutation(len(names))[:2].tolist(), int(rng.integers(len(facts[0])))
    asked = facts[0][kind][1].replace("{names}", "{keys}")
    pairs = [(f"Agent {names[i]}", facts[i][kind][2]) for i in two]
    return Question(*numbered(lexicon.AGENT_QUESTION.format(question=asked), pairs))


def _fact(rng: np.random.Generator, kind: tuple[str, str, tuple[str, ...] | None]) -> tuple[str, str, str]:
    """What is said, how it is asked and the answer; facts without a list of values are numbers."""
    said, question, values = kind
    value = values[rng.integers(len(values))] if values else _numbers(rng, 1, 4)[0]
    return said.replace("{value}", value), question, value


def _different_facts(
    rng: np.random.Generator, kind: tuple[str, str, tuple[str, ...] | None], number: int
) -> list[tuple[str, str, str]]:
    """Facts of one kind with different values, as far as there are so many."""
    facts: dict[str, tuple[str, str, str]] = {}
    most = min(number, len(kind[2])) if kind[2] else number
    while len(facts) < most:
        fact = _fact(rng, kind)
        facts[fact[2]] = fact
    return [*facts.values(), *(_fact(rng, kind) for _ in range(number - most))]


def _name(rng: np.random.Generator) -> str:
    first, last = lexicon.FIRST_NAMES, lexicon.LAST_NAMES
    return f"{first[rng.integers(len(first))]} {last[rng.integers(len(last))]}"


# What tasks are made of -------------------------------------------------------------------------------------


def _hidden(rng: np.random.Generator, facts: Sequence[str], size: Size) -> list[str]:
    """Segments of noise with the facts in it, in their order, all over."""
    noise = _noise(rng, size.num_tokens - size.count(" ".join(facts)), size.num_segments, size.count)
    return [" ".join(part) + "\n" for part in _cut(_scatter(rng, facts, noise), size.num_segments)]


def _noise(
    rng: np.random.Generator,
    num_tokens: int,
    least: int,
    count: Callable[[str], int],
    finish: Callable[[np.random.Generator, str], str] = lambda rng, sentence: sentence,
) -> list[str]:
    """Sentences of about so many tokens, at least `least` of them; `finish` makes of a sentence what is wanted."""
    probe = [finish(rng, sentence) for sentence in _sentences(rng, 32)]
    wanted = max(int(1.1 * 32 * num_tokens / count(" ".join(probe))), least)
    sentences = [finish(rng, sentence) for sentence in _sentences(rng, wanted)]
    return sentences[: max(round(wanted * num_tokens / count(" ".join(sentences))), least)]


def _sentences(rng: np.random.Generator, number: int) -> list[str]:
    drawn = rng.integers(0, 2**31, (number, _MOST_SLOTS + 1)).tolist()
    sentences = []
    for which, *choices in drawn:
        template, lists = _PATTERNS[which % len(_PATTERNS)]
        sentences.append(template % tuple(words[i % len(words)] for words, i in zip(lists, choices, strict=False)))
    return sentences


def _pattern(template: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """For `%`, which is fast: the template with `%s` for each slot, and the words that may stand there."""
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    words = {field: getattr(lexicon, f"{field.upper()}S") for field in fields}
    return template.format(**dict.fromkeys(fields, "%s")), tuple(words[field] for field in fields)


_PATTERNS = [_pattern(template) for template in lexicon.NOISE]
_MOST_SLOTS = max(len(lists) for _, lists in _PATTERNS)


def _scatter(rng: np.random.Generator, facts: Sequence[str], noise: Sequence[str]) -> list[str]:
    """The facts between the noise, in their order: each falls somewhere in a stretch of its own."""
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


def _cut(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    edges = np.linspace(0, len(items), parts + 1).astype(int)
    return [items[begin:end] for begin, end in itertools.pairwise(edges)]


def _pick(rng: np.random.Generator, words: Sequence[str], number: int) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:number]]


def _numbers(rng: np.random.Generator, number: int, digits: int) -> list[str]:
    """Different numbers of so many digits."""
    drawn: dict[int, None] = {}
    while len(drawn) < number:
        drawn |= dict.fromkeys(rng.integers(10 ** (digits - 1), 10**digits, number - len(drawn)).tolist())
    return [str(value) for value in drawn]


_TASKS: dict[str, Callable[[np.random.Generator, Size], Body]] = {
    "niah": niah,
    "mq_niah": mq_niah,
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "qa": qa,
    "chat": chat,
    "agents": agents,
    "mk_niah": mk_niah,
    "notes_codes": notes_codes,
    "notes_people": notes_people,
    "notes_years": notes_years,
}
TASKS = tuple(_TASKS)
# Those made of the closed vocabulary alone, which a tiny model can learn.
CLOSED_TASKS = tuple(task for task in TASKS if task in lexicon.INSTRUCTIONS)
