"""Conversations of many turns, generated from seeds: each request holds the answers to the requests before it.

    rag_chat        notes in one order, questions about them, and every fourth turn another retrieval, which brings two
                    of the notes back in another order with one that is new
    round_robin_3   three agents take turns; each has its own system text and sees what all have said
    round_robin_8   the same with eight
    group_chat      four agents that share the first part of their system text, and before each turn a manager that
                    reads all of it and names the next speaker, as in AutoGen's SelectorGroupChat
    coding          a coding agent whose system text has a clock in its first line; files and test results come back
    tools           three agents whose tools return the same documents, each time in another order
    debate          four agents; each reads the others' last answers, in an order of its own

A conversation is a generator of requests, and is sent the text of each answer:

    conversation = make_conversation("rag_chat", ConversationSize(), seed=0)
    first = next_request(conversation.requests, None)
    second = next_request(conversation.requests, "The librarian is Adela Finch.")

What an answer says changes the requests behind it by its own text only: who speaks next, what is asked and what tools
return are drawn from the seed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval import lexicon, notes
from sparsex_jax.eval.tasks import noise_sentences
from sparsex_jax.text.chat import Chat
from sparsex_jax.text.encoding import encode_chat

Message = dict[str, str]


class Request(NamedTuple):
    """What a client sends.

    Attributes:
      speaker: who is to answer.
      messages: the whole chat, as `role` and `content`.
      new_tokens: the most tokens that the answer may have.
    """

    speaker: str
    messages: list[Message]
    new_tokens: int


Requests = Generator[Request, str, None]


class Conversation(NamedTuple):
    """A conversation that has not begun.

    Attributes:
      stored: texts that are stored before it begins, each alone.
      requests: see `next_request`.
    """

    stored: tuple[str, ...]
    requests: Requests


@dataclasses.dataclass(frozen=True)
class ConversationSize:
    """The size of a conversation.

    Attributes:
      turns: answers, those of a manager not counted; at least 1. With 15 of them, all prompts of a conversation
        together have 5,000 to 30,000 tokens.
      scale: how many times as long notes, files, tasks and system texts are; at least 1.
      new_tokens: the most tokens of an answer, at least 1.
    """

    turns: int = 15
    scale: float = 1.0
    new_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("turns", "scale", "new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least 1")


# Texts -------------------------------------------------------------------------------------------------------


class Texts:
    """Writes the texts of one conversation. All choices come from one generator."""

    def __init__(self, rng: np.random.Generator, scale: float) -> None:
        self.rng, self._scale = rng, scale

    def pick[T](self, items: Sequence[T], number: int) -> list[T]:
        """Some of the items, in random order."""
        return [items[i] for i in self.rng.permutation(len(items))[:number]]

    def one[T](self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def digits(self) -> str:
        """A number of four digits."""
        return str(self.rng.integers(1000, 10000))

    def padded(self, text: str, words: int) -> str:
        """A text with sentences behind it until it has `words` times the scale of them."""
        lacking = round(words * self._scale) - len(text.split())
        added: list[str] = []
        while sum(len(sentence.split()) for sentence in added) < lacking:
            added += noise_sentences(self.rng, 1)
        return " ".join([text, *added])

    def some_notes(self, number: int) -> list[Note]:
        """Notes about different kinds of places; number is at most that of the kinds there are."""
        return [self._note(kind) for kind in self.pick(notes.PLACE_KINDS, number)]

    def _note(self, kind: notes.PlaceKind) -> Note:
        town, name = self.one(lexicon.TOWNS), f"{self.one(lexicon.FIRST_NAMES)} {self.one(lexicon.LAST_NAMES)}"
        fields = kind._asdict() | {"lower": kind.place.lower(), "town": town, "name": name, "code": self.digits()}
        one, two, three, four, five = self.pick(kind.sentences, 5)
        said = [notes.TITLE, one, notes.KEEPER, two, three, notes.CODE, four, notes.YEAR, five]
        text = " ".join(said).format(**fields, year=self.rng.integers(1650, 1950))
        asked = (notes.CODE_QUESTION, notes.KEEPER_QUESTION, notes.YEAR_QUESTION)
        return Note(kind.place.lower(), self.padded(text, 60), tuple(each.format(**fields) for each in asked))

    def agents(self, number: int) -> list[Agent]:
        """Agents with different names and jobs."""
        names, jobs = self.pick(lexicon.FIRST_NAMES, number), self.pick(lexicon.JOBS, number)
        return [self._agent(name, job) for name, job in zip(names, jobs, strict=True)]

    def _agent(self, name: str, job: str) -> Agent:
        town, food, sport = self.one(lexicon.TOWNS), self.one(lexicon.FOODS), self.one(lexicon.SPORTS)
        text = (
            f"You are {name}, a {job} from {town}. You like {food} and {sport}. Speak as a {job} would: think of what "
            f"your work has taught you, of the people of {town}, and of what things cost. Say one thing in one short "
            "sentence, and do not repeat what others said before you."
        )
        return Agent(name, job, self.padded(text, 50))

    def source(self, name: str) -> str:
        """A file of Python functions."""
        number = round(2 * self._scale)
        functions = [self._function(i) for i in range(number)]
        return "\n\n".join([f'"""Helpers for {name}."""', *functions])

    def _function(self, number: int) -> str:
        verb, (noun, item), adjective = (
            self.one(lexicon.VERBS),
            self.pick(lexicon.NOUNS, 2),
            self.one(lexicon.ADJECTIVES),
        )
        words = {"name": f"{verb}_{noun}_{number}", "noun": noun, "item": item, "adjective": adjective}
        numbers = {"small": self.rng.integers(2, 9), "large": self.digits()}
        return self.one(_FUNCTIONS).format(**words, **numbers, doc=noise_sentences(self.rng, 1)[0])


class Note(NamedTuple):
    """A note about a place, with questions that it answers."""

    name: str
    text: str
    questions: tuple[str, ...]


class Agent(NamedTuple):
    """An agent and its system text."""

    name: str
    job: str
    system: str


_FUNCTIONS = (
    '''def {name}({noun}, {adjective}={small}):
    """{doc}"""
    found = [{item} for {item} in {noun} if {item}.size > {adjective}]
    if not found:
        raise ValueError("no {item} is larger than {adjective}")
    return sum({item}.size for {item} in found) / len(found)
''',
    '''def {name}({item}, *, limit={large}):
    """{doc}"""
    total = 0
    for {noun} in {item}.values():
        total += {noun}.weight * {small}
        if total >= limit:
            break
    return min(total, limit)
''',
    '''def {name}(path, {adjective}=False):
    """{doc}"""
    with open(path) as file:
        lines = [line.strip() for line in file if "{noun}" in line]
    pairs = dict(line.split("=", {small}) for line in lines)
    return pairs if {adjective} else pairs.get("{item}", {large})
''',
)


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _tool(text: str) -> Message:
    return {"role": "tool", "content": text}


# Questions about notes ---------------------------------------------------------------------------------------

_RETRIEVAL_EVERY = 4  # turns


def rag_chat(texts: Texts, size: ConversationSize) -> Conversation:
    """All notes are stored before. The chat shows four of them first."""
    kept = texts.some_notes(min(4 + size.turns // _RETRIEVAL_EVERY, len(notes.PLACE_KINDS)))
    return Conversation(tuple(note.text for note in kept), _questions(texts, size, kept))


def _questions(texts: Texts, size: ConversationSize, kept: Sequence[Note]) -> Requests:
    messages, known = [_system(notes.INSTRUCTION.strip())], list(kept[:4])
    for turn in range(size.turns):
        found = _retrieve(texts, turn // _RETRIEVAL_EVERY, known, kept) if turn % _RETRIEVAL_EVERY == 0 else []
        known += [note for note in found if note not in known]
        question = texts.one(texts.one(known).questions)
        messages.append(_user("\n\n".join([*(f"Note, from the {n.name}:\n{n.text}" for n in found), question])))
        messages.append(_assistant((yield Request("assistant", list(messages), size.new_tokens))))


def _retrieve(texts: Texts, retrieval: int, known: Sequence[Note], kept: Sequence[Note]) -> list[Note]:
    """First the four notes that are known; later two of them and the next one that is not, while there is one."""
    if retrieval == 0:
        return texts.pick(known, len(known))
    return texts.pick([*texts.pick(known, 2), *kept[len(known) : len(known) + 1]], 3)


# Agents that talk --------------------------------------------------------------------------------------------


def round_robin(agents: int, texts: Texts, size: ConversationSize) -> Conversation:
    """Each agent speaks three times or more."""
    turns = max(size.turns, 3 * agents)
    return Conversation((), _round_robin(texts, texts.agents(agents), turns, size.new_tokens))


def _round_robin(texts: Texts, agents: Sequence[Agent], turns: int, new_tokens: int) -> Requests:
    task = _task(texts)
    said: list[tuple[str, str]] = []
    for agent in itertools.islice(itertools.cycle(agents), turns):
        said.append((agent.name, (yield Request(agent.name, _seen_by(agent, task, said), new_tokens))))


def _task(texts: Texts) -> str:
    problem = lexicon.AGENT_PROBLEM.format(place=texts.one(lexicon.PLACES)).strip()
    return texts.padded(
        f"{problem} The money comes from the harbour fees of last year, and it is less than we hoped. The people of "
        "the old quarter want it near the market; those from the hill want it where the mill was. Winter is four "
        "months away. Each of you says one thing at a time, and in the end you should agree.",
        70,
    )


def _seen_by(agent: Agent, task: str, said: Sequence[tuple[str, str]]) -> list[Message]:
    """What others said are users' messages that begin with their names."""
    heard = [_assistant(text) if name == agent.name else _user(f"{name}: {text}") for name, text in said]
    return [_system(agent.system), _user(task), *heard]


_MANAGER_TOKENS = 4


def group_chat(texts: Texts, size: ConversationSize) -> Conversation:
    rules = texts.padded(
        "This is a chat of several people who plan something together. Say what you think in one short sentence. "
        "Do not speak for others. When you agree with what was said last, say so and add one detail. When you do not, "
        "say what you would do in its place and what it would cost. Stay with the question that was asked. Nobody "
        "needs to be polite, but nobody may be rude. The plan is written down by the clerk when all have spoken.",
        90,
    )
    agents = [agent._replace(system=f"{rules}\n\n{agent.system}") for agent in texts.agents(4)]
    return Conversation((), _group_chat(texts, agents, size))


def _group_chat(texts: Texts, agents: Sequence[Agent], size: ConversationSize) -> Requests:
    """No agent speaks twice in a row. The seed chooses the speakers, whatever the manager answers."""
    said, agent = [("user", _task(texts))], agents[0]
    for _ in range(size.turns):
        yield Request("manager", [_system(_choice(agents, said))], min(_MANAGER_TOKENS, size.new_tokens))
        agent = texts.one([other for other in agents if other.name != said[-1][0]])
        said.append((agent.name, (yield Request(agent.name, _seen_by(agent, said[0][1], said[1:]), size.new_tokens))))


def _choice(agents: Sequence[Agent], said: Sequence[tuple[str, str]]) -> str:
    """AutoGen's default prompt of the selector."""
    roles = "\n".join(f"{agent.name}: A {agent.job}." for agent in agents)
    names = [agent.name for agent in agents]
    history = "\n\n".join(f"{name}: {text}" for name, text in said)
    return (
        f"You are in a role play game. The following roles are available:\n{roles}.\nRead the following conversation. "
        f"Then select the next role from {names} to play. Only return the role.\n\n{history}\n\nRead the above "
        f"conversation. Then select the next role from {names} to play. Only return the role."
    )


def debate(texts: Texts, size: ConversationSize) -> Conversation:
    return Conversation((), _debate(texts, texts.agents(4), size))


def _debate(texts: Texts, agents: Sequence[Agent], size: ConversationSize) -> Requests:
    """Answers have three times the tokens, since they are all that comes back."""
    task, last = _task(texts), dict[str, str]()
    for agent in itertools.islice(itertools.cycle(agents), size.turns):
        others = [f"{name} says:\n{text}" for name, text in last.items() if name != agent.name]
        asked = [task, *texts.pick(others, len(others)), "What do you propose? Give your reasons."]
        messages = [_system(agent.system), _user("\n\n".join(asked))]
        last[agent.name] = yield Request(agent.name, messages, 3 * size.new_tokens)


# Tools -------------------------------------------------------------------------------------------------------

_STARTED = datetime.datetime(2026, 3, 2, 9, 0, 0)
_CODING_RULES = (
    "You are a coding agent in a repository of Python files. Work in small steps: read what you need, change one "
    "thing, run the tests, and say in one sentence what you do next. Never touch files that the task does not name. "
    "Keep functions short, raise ValueError where an argument is wrong, and write a docstring for whatever is public."
)
_STEPS = ("read", "read", "edit", "test", "read", "reread", "edit", "test")


def coding(texts: Texts, size: ConversationSize) -> Conversation:
    names = [f"{word}.py" for word in texts.pick(lexicon.THINGS, 5)]
    return Conversation((), _coding(Repository(texts, names), texts, size))


def _coding(files: Repository, texts: Texts, size: ConversationSize) -> Requests:
    rules = texts.padded(_CODING_RULES, 60)
    history = [_user(f"The tests of {', '.join(files.names)} fail. Find out why and mend it.")]
    for turn, step in enumerate(itertools.islice(itertools.cycle(_STEPS), size.turns)):
        clock = _STARTED + turn * datetime.timedelta(minutes=1, seconds=37)
        system = _system(f"Current time: {clock:%Y-%m-%d %H:%M:%S}\n{rules}")
        answer = yield Request("coder", [system, *history], size.new_tokens)
        history += [_assistant(answer), _tool(files.do(step))]


class Repository:
    """The files that a coding agent reads and changes, and what its tools return."""

    def __init__(self, texts: Texts, names: Sequence[str]) -> None:
        self.names, self._texts = list(names), texts
        self._contents = {name: texts.source(name.removesuffix(".py")) for name in names}
        self._read: list[str] = []

    def do(self, step: str) -> str:
        return {"read": self._next, "reread": self._again, "edit": self._edit, "test": self._test}[step]()

    def _show(self, name: str) -> str:
        return f"{name}:\n{self._contents[name]}"

    def _next(self) -> str:
        """A file that was not read yet, if there is one."""
        new = [name for name in self.names if name not in self._read]
        if not new:
            return self._again()
        self._read.append(new[0])
        return self._show(new[0])

    def _again(self) -> str:
        return self._show(self._texts.one(self._read))

    def _edit(self) -> str:
        """Another limit in one line of a file that was read. The whole file comes back."""
        name = self._texts.one(self._read)
        lines = self._contents[name].splitlines()
        at = self._texts.one([i for i, line in enumerate(lines) if line.startswith("def ")])
        lines[at] = lines[at].replace("):", f", most={self._texts.digits()}):")
        self._contents[name] = "\n".join(lines)
        return f"Changed line {at + 1}. {self._show(name)}"

    def _test(self) -> str:
        """A line for each function of each file."""
        lines = [
            f"tests/test_{name}::test_{line.split('(')[0][4:]} {self._texts.one(('PASSED', 'PASSED', 'FAILED'))}"
            for name, content in self._contents.items()
            for line in content.splitlines()
            if line.startswith("def ")
        ]
        return "\n".join(lines)


def tools(texts: Texts, size: ConversationSize) -> Conversation:
    """A document is two notes."""
    pairs = itertools.batched(texts.some_notes(12), 2)
    return Conversation((), _tools(texts, texts.agents(3), list(pairs), size))


def _tools(
    texts: Texts, agents: Sequence[Agent], documents: Sequence[Sequence[Note]], size: ConversationSize
) -> Requests:
    """Each turn hands the last answer and a new question to the next agent, whose tools return four documents."""
    last = "Nothing was found yet."
    for agent in itertools.islice(itertools.cycle(agents), size.turns):
        found = texts.pick(documents, 4)
        calls = _assistant("\n".join(f'open("{" and ".join(note.name for note in each)}")' for each in found))
        question = _user(f"{last}\n\nNow find out: {texts.one(texts.one(texts.one(found)).questions)}")
        returned = [_tool("\n\n".join(note.text for note in each)) for each in found]
        answer = yield Request(agent.name, [_system(agent.system), question, calls, *returned], size.new_tokens)
        last = f"{agent.name} says: {answer}"


# All of them -------------------------------------------------------------------------------------------------

CONVERSATIONS: dict[str, Callable[[Texts, ConversationSize], Conversation]] = {
    "rag_chat": rag_chat,
    "round_robin_3": functools.partial(round_robin, 3),
    "round_robin_8": functools.partial(round_robin, 8),
    "group_chat": group_chat,
    "coding": coding,
    "tools": tools,
    "debate": debate,
}


def make_conversation(name: str, size: ConversationSize, seed: int) -> Conversation:
    """Make one of `CONVERSATIONS`. The same seed makes the same one."""
    rng = np.random.default_rng([seed, *name.encode()])
    return CONVERSATIONS[name](Texts(rng, size.scale), size)


def scripted_answers(seed: int) -> Iterator[str]:
    """Endless short answers that no model gave, for prompts that must not depend on one."""
    rng = np.random.default_rng(seed)
    while True:
        yield " ".join(noise_sentences(rng, 2))


def scripted_requests(name: str, size: ConversationSize, seed: int) -> Iterator[Request]:
    """All requests of a conversation in which `scripted_answers` are given."""
    requests, answers = make_conversation(name, size, seed).requests, scripted_answers(seed)
    request = next_request(requests, None)
    while request is not None:
        yield request
        request = next_request(requests, next(answers))


def next_request(requests: Requests, answer: str | None) -> Request | None:
    """The request that follows an answer; that of None is the first. None behind the last one."""
    try:
        return requests.send(answer)  # type: ignore[arg-type]  # None starts a generator
    except StopIteration:
        return None


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Int32[np.ndarray, "tokens"]:
    """A chat in the tokenizer's template, as token ids.

    Raises:
      InvalidRequestError: the tokenizer has no chat template.
    """
    return np.asarray(encode_chat(Chat(messages), tokenizer), np.int32)
