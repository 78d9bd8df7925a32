"""Tasks, generated from seeds at any length: RULER's kinds (Hsieh et al., 2024), and chats, agents and notes.

Most use a closed vocabulary, for a small model that is trained on them. The notes are for models that read English.

A sample is what reuse meets in practice: a fresh instruction, a body of segments that are in the store, and a fresh
question. No answer depends on the order of the segments, so that a prompt can have them in any order.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsex_jax.eval import documents, lexicon, notes
from sparsex_jax.eval.samples import Body, BodySize, Question, Sample, cut, numbers, person, pick, scatter


def word_count(text: str) -> int:
    """The number of tokens that `lexicon.ruler_tokenizer` makes of a text: words, digits, capitals and punctuation."""
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
      task: one of `TASKS`.
      rng: all random choices come from it.
      num_tokens: tokens of the body by `count`, about. More, if facts that must be in it (needles, say) need more.
      num_segments: segments of the body.
      num_questions: questions, at most. `cwe` and `fwe` have one.
      count: gives the number of tokens in a text.

    Raises:
      ValueError: the task is unknown, or a size is below 1.
    """
    if task not in _TASKS:
        raise ValueError(f"task={task!r} is unknown; there are: {', '.join(TASKS)}")
    if min(num_tokens, num_segments, num_questions) < 1:
        raise ValueError("num_tokens, num_segments and num_questions must be at least 1")
    body = _TASKS[task](rng, BodySize(num_tokens, num_segments, num_questions, count))
    instruction = INSTRUCTIONS.get(task, notes.INSTRUCTION)
    earlier = instruction + body.earlier if body.earlier else ""
    return Sample(task, instruction + body.opening, tuple(body.segments), tuple(body.questions), earlier)


# Retrieval --------------------------------------------------------------------------------------------------


def niah(rng: np.random.Generator, size: BodySize) -> Body:
    """As many needles as questions; each question asks for one."""
    needles = _needles(rng, size.fits(20, 1, size.num_questions))
    questions = [Question(lexicon.NEEDLE_QUESTION.format(key=key), (value,)) for key, value in needles]
    return Body(_hidden_needles(rng, needles, size), questions)


def mq_niah(rng: np.random.Generator, size: BodySize) -> Body:
    """Many needles; each question asks for four."""
    needles = _needles(rng, size.fits(64, 4, 32))
    asked = [[needles[i] for i in rng.permutation(len(needles))[:4]] for _ in range(size.num_questions)]
    questions = [Question(*numbered(lexicon.NEEDLES_QUESTION, some)) for some in asked]
    return Body(_hidden_needles(rng, needles, size), questions)


def mk_niah(rng: np.random.Generator, size: BodySize) -> Body:
    """A needle in every segment; each question asks for one, and the others distract."""
    needles = _needles(rng, size.num_segments)
    share = dataclasses.replace(size, num_tokens=size.num_tokens // size.num_segments, num_segments=1)
    segments = [_hidden_needles(rng, [needle], share)[0] for needle in needles]
    asked = [needles[i] for i in rng.permutation(len(needles))[: size.num_questions]]
    return Body(segments, [Question(lexicon.NEEDLE_QUESTION.format(key=key), (value,)) for key, value in asked])


def numbered(text: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The fields of a question for several keys: its text, the values, and how the reference answer writes them.

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
    return list(zip(pick(rng, lexicon.THINGS, number), numbers(rng, number, 7), strict=True))


def _hidden_needles(rng: np.random.Generator, needles: Sequence[tuple[str, str]], size: BodySize) -> list[str]:
    return _hidden(rng, [lexicon.NEEDLE.format(key=key, value=value) for key, value in needles], size)


def vt(rng: np.random.Generator, size: BodySize) -> Body:
    """Chains of variables, each assigned from the one before; each question asks for the values of four.

    Two chains of three begin in the instruction and continue in up to two segments. The others stay in one segment. So
    no assignment depends on another segment, but most depend on the instruction, which is fresh in every prompt.
    RULER's chains all begin in the body, and it asks for all variables of one value.
    """
    values = pick(rng, lexicon.THINGS, size.fits(160, 4, max(8, size.num_questions)))
    names = iter(pick(rng, lexicon.VARIABLES, 5 * len(values)))
    opening: list[str] = []
    parts: list[list[list[str]]] = [
        [] for _ in range(size.num_segments)
    ]  # the chains, or ends of chains, in each segment
    held: list[list[tuple[str, str]]] = []  # (name, value) of the variables that can be asked for, by value
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
    """A question for four variables of different values. A value counts only behind the name of its variable."""
    asked = [held[i][int(rng.integers(len(held[i])))] for i in rng.permutation(len(held))[:4]]
    text, _, written = numbered(lexicon.VARIABLES_QUESTION, asked)
    return Question(text, tuple(answer.split(maxsplit=1)[1] for answer in written), written)


def _assignments(names: Sequence[str]) -> list[str]:
    """An assignment to each name from the name before it."""
    return [lexicon.ASSIGN_NAME.format(name=name, value=source) for source, name in itertools.pairwise(names)]


def tracked(rng: np.random.Generator, number: int, num_questions: int) -> tuple[list[str], list[Question]]:
    """A drill for `vt`: `number` interleaved chains of assignments without noise, and questions about them."""
    names = iter(pick(rng, lexicon.VARIABLES, len(lexicon.VARIABLES)))
    chains, held = [], []
    for value in pick(rng, lexicon.THINGS, min(number, len(lexicon.VARIABLES) // 5)):
        own = list(itertools.islice(names, int(rng.integers(2, 6))))
        chains.append([lexicon.ASSIGN_VALUE.format(name=own[0], value=value), *_assignments(own)])
        held.append([(name, value) for name in own[1:]])
    return _interleave(rng, chains), [_about_variables(rng, held) for _ in range(num_questions)]


def _interleave(rng: np.random.Generator, chains: Sequence[Sequence[str]]) -> list[str]:
    """All items in one list, at random, in which the items of each chain keep their order."""
    turns = rng.permutation(np.repeat(np.arange(len(chains)), [len(chain) for chain in chains]))
    following = [iter(chain) for chain in chains]
    return [next(following[turn]) for turn in turns]


# Counting ---------------------------------------------------------------------------------------------------


def cwe(rng: np.random.Generator, size: BodySize) -> Body:
    """Common words occur ten times as often as the others. The question asks for them, in alphabetical order."""
    total = _number_of_words(lexicon.THINGS, size)
    common = min(max(total // 100, 1), 10)
    rare = min(max(total // 3 - 10 * common, common), len(lexicon.THINGS) - common)
    words = pick(rng, lexicon.THINGS, common + rare)
    each = max(total // (10 * common + rare), 1)
    filling = np.resize(words[common:], max(total - each * 10 * common, each * rare))
    text = rng.permutation(np.concatenate([np.repeat(words[:common], 10 * each), filling])).tolist()
    question = lexicon.COMMON_QUESTION.format(number=common)
    return Body(_word_segments(lexicon.WORD_LIST, text, size), [Question(question, tuple(sorted(words[:common])))])


def fwe(rng: np.random.Generator, size: BodySize) -> Body:
    """Invented words whose frequencies fall with the square of their rank. The question asks for the first three."""
    total = max(_number_of_words(lexicon.CODED_WORDS, size), 30)
    words = pick(rng, lexicon.CODED_WORDS, 60)
    weights = np.arange(1, len(words) + 1) ** -2.0
    times = np.maximum(np.round(total * weights / weights.sum()).astype(int), [4, 3, 2] + [1] * (len(words) - 3))
    text = rng.permutation(np.repeat(words, times)).tolist()
    return Body(_word_segments(lexicon.CODED_LIST, text, size), [Question(lexicon.FREQUENT_QUESTION, tuple(words[:3]))])


def _number_of_words(words: Sequence[str], size: BodySize) -> int:
    """How many of these words fill the body."""
    return max(size.num_tokens * 64 // size.count(" ".join(words[:64])), size.num_segments)


def _word_segments(opening: str, words: Sequence[str], size: BodySize) -> list[str]:
    return [opening + " ".join(part) + "\n" for part in cut(words, size.num_segments)]


# Chats, agents and notes ------------------------------------------------------------------------------------


def qa(rng: np.random.Generator, size: BodySize) -> Body:
    """Documents about invented people; each question asks for one fact about one of them."""
    number = size.fits(60, 3, 24)
    people = dict.fromkeys(person(rng) for _ in range(number))
    facts = [[(name, *_fact(rng, kind)) for kind in lexicon.PERSON_FACTS] for name in people]
    told = [[said.format(name=name) for name, said, _, _ in some] for some in facts]
    asked = [fact for some in facts for fact in some]
    questions = [
        Question(lexicon.PERSON_QUESTION.format(question=question.format(name=name)), (value,))
        for name, _, question, value in (asked[i] for i in rng.permutation(len(asked))[: size.num_questions])
    ]
    return Body(_hidden(rng, [" ".join(document) for document in told], size), questions)


def chat(rng: np.random.Generator, size: BodySize) -> Body:
    """A long chat; in some turns the user tells a fact, and each question asks for one of these."""
    facts = [_fact(rng, kind) for kind in lexicon.CHAT_FACTS]
    kept = [facts[i] for i in rng.permutation(len(facts))[: size.fits(30, 2, len(facts))]]
    facts_told = [_turn(rng, said) for said, _, _ in kept]
    noise = _noise(rng, size.num_tokens - size.count("".join(facts_told)), size.num_segments, size.count, _turn)
    questions = [Question(lexicon.CHAT_QUESTION.format(question=question), (value,)) for _, question, value in kept]
    parts = cut(scatter(rng, facts_told, noise), size.num_segments)
    return Body(["".join(part) for part in parts], questions[: size.num_questions])


def _turn(rng: np.random.Generator, said: str) -> str:
    return lexicon.CHAT_TURN.format(user=said, assistant=lexicon.CHAT_REPLIES[rng.integers(len(lexicon.CHAT_REPLIES))])


def notes_codes(rng: np.random.Generator, size: BodySize) -> Body:
    """A note in each segment, each about another kind of place; a question asks for the access code in one of them."""
    return _notes(rng, size, notes.CODE_QUESTION, "code")


def notes_people(rng: np.random.Generator, size: BodySize) -> Body:
    """The same notes; a question asks who runs one of the places."""
    return _notes(rng, size, notes.KEEPER_QUESTION, "name")


def notes_years(rng: np.random.Generator, size: BodySize) -> Body:
    """The same notes; a question asks when one of the places was built."""
    return _notes(rng, size, notes.YEAR_QUESTION, "year")


def _notes(rng: np.random.Generator, size: BodySize, question: str, answer: str) -> Body:
    """A note for each segment, as far as there are kinds of places. The size does not change the length of a note."""
    number = min(size.num_segments, len(notes.PLACE_KINDS))
    kinds = [notes.PLACE_KINDS[i] for i in rng.permutation(len(notes.PLACE_KINDS))[:number]]
    fields = [
        kind._asdict() | {"lower": kind.place.lower(), "town": town, "code": code, "year": year, "name": person(rng)}
        for kind, town, code, year in zip(
            kinds,
            pick(rng, lexicon.TOWNS, number),
            numbers(rng, number, 4),
            (rng.permutation(300)[:number] + 1650).tolist(),
            strict=True,
        )
    ]
    segments = [_note(rng, at, each) for at, each in enumerate(fields, start=1)]
    asked = [fields[i] for i in rng.permutation(number)[: size.num_questions]]
    questions = [Question(question.format(**each), (str(each[answer]),)) for each in asked]
    return Body(segments, questions, notes.OPENING.format(count=notes.COUNTS[number - 1]))


def _note(rng: np.random.Generator, number: int, fields: dict[str, Any]) -> str:
    """A note with four sentences about its kind of place, and the facts between them."""
    one, two, three, four = (fields["sentences"][i] for i in rng.permutation(len(fields["sentences"]))[:4])
    said = [notes.TITLE, one, notes.KEEPER, two, notes.CODE, three, notes.YEAR, four]
    return notes.NOTE.format(text=" ".join(said), number=number, **fields).format(**fields)


def agents(rng: np.random.Generator, size: BodySize) -> Body:
    """A problem and the answers of several agents; each question asks what two of them said about one thing."""
    names = pick(rng, lexicon.FIRST_NAMES, max(size.num_segments - 1, 2))
    by_kind = [_different_facts(rng, kind, len(names)) for kind in lexicon.AGENT_FACTS]
    facts = [list(some) for some in zip(*by_kind, strict=True)]
    share = dataclasses.replace(size, num_tokens=size.num_tokens // len(names), num_segments=1)
    outputs = [
        f"{lexicon.AGENT_OPENING.format(name=name)} {_hidden(rng, [said for said, _, _ in some], share)[0]}"
        for name, some in zip(names, facts, strict=True)
    ]
    problem = lexicon.AGENT_PROBLEM.format(place=lexicon.PLACES[rng.integers(len(lexicon.PLACES))])
    questions = [_about_two(rng, names, facts) for _ in range(size.num_questions)]
    return Body(["".join(part) for part in cut([problem, *outputs], size.num_segments)], questions)


def _about_two(
    rng: np.random.Generator, names: Sequence[str], facts: Sequence[Sequence[tuple[str, str, str]]]
) -> Question:
    two, kind = rng.permutation(len(names))[:2].tolist(), int(rng.integers(len(facts[0])))
    asked = facts[0][kind][1].replace("{names}", "{keys}")
    pairs = [(f"Agent {names[i]}", facts[i][kind][2]) for i in two]
    return Question(*numbered(lexicon.AGENT_QUESTION.format(question=asked), pairs))


def _fact(rng: np.random.Generator, kind: tuple[str, str, tuple[str, ...] | None]) -> tuple[str, str, str]:
    """A fact of a kind: its sentence, the question for it and the answer. A kind without values gets a number."""
    said, question, values = kind
    value = values[rng.integers(len(values))] if values else numbers(rng, 1, 4)[0]
    return said.replace("{value}", value), question, value


def _different_facts(
    rng: np.random.Generator, kind: tuple[str, str, tuple[str, ...] | None], number: int
) -> list[tuple[str, str, str]]:
    """`number` facts of one kind, with different values as far as the kind has enough."""
    facts: dict[str, tuple[str, str, str]] = {}
    most = min(number, len(kind[2])) if kind[2] else number
    while len(facts) < most:
        fact = _fact(rng, kind)
        facts[fact[2]] = fact
    return [*facts.values(), *(_fact(rng, kind) for _ in range(number - most))]


# Parts of all tasks -----------------------------------------------------------------------------------------


def _hidden(rng: np.random.Generator, facts: Sequence[str], size: BodySize) -> list[str]:
    """Segments of noise, over which the facts are spread in their order."""
    noise = _noise(rng, size.num_tokens - size.count(" ".join(facts)), size.num_segments, size.count)
    return [" ".join(part) + "\n" for part in cut(scatter(rng, facts, noise), size.num_segments)]


def _noise(
    rng: np.random.Generator,
    num_tokens: int,
    least: int,
    count: Callable[[str], int],
    finish: Callable[[np.random.Generator, str], str] = lambda rng, sentence: sentence,
) -> list[str]:
    """At least `least` sentences, of about `num_tokens` tokens together. `finish` turns each into its final text."""
    probe = [finish(rng, sentence) for sentence in noise_sentences(rng, 32)]
    wanted = max(int(1.1 * 32 * num_tokens / count(" ".join(probe))), least)
    sentences = [finish(rng, sentence) for sentence in noise_sentences(rng, wanted)]
    return sentences[: max(round(wanted * num_tokens / count(" ".join(sentences))), least)]


def noise_sentences(rng: np.random.Generator, number: int) -> list[str]:
    """Sentences of the closed vocabulary that say nothing in particular."""
    drawn = rng.integers(0, 2**31, (number, _MOST_SLOTS + 1)).tolist()
    sentences = []
    for which, *choices in drawn:
        template, lists = _PATTERNS[which % len(_PATTERNS)]
        sentences.append(template % tuple(words[i % len(words)] for words, i in zip(lists, choices, strict=False)))
    return sentences


def _pattern(template: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """The template with `%s` in each slot, for the fast operator `%`, and the words for each slot."""
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    words = {field: getattr(lexicon, f"{field.upper()}S") for field in fields}
    return template.format(**dict.fromkeys(fields, "%s")), tuple(words[field] for field in fields)


_PATTERNS = [_pattern(template) for template in lexicon.NOISE]
_MOST_SLOTS = max(len(lists) for _, lists in _PATTERNS)


_TASKS: dict[str, Callable[[np.random.Generator, BodySize], Body]] = {
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
    **documents.TASKS,
}
TASKS = tuple(_TASKS)
# The tasks of the closed vocabulary, which a tiny model can learn.
CLOSED_TASKS = tuple(task for task in TASKS if task in lexicon.INSTRUCTIONS)
INSTRUCTIONS = lexicon.INSTRUCTIONS | documents.INSTRUCTIONS
# For each task, one whose segments are of another kind, with words that the same models know.
STRANGERS = (
    dict.fromkeys(CLOSED_TASKS, "chat")
    | {"chat": "qa"}
    | dict.fromkeys((task for task in TASKS if task.startswith("notes_")), "log_cargo")
    | documents.STRANGERS
)
