"""Tasks on documents that read like real ones, of any length, for models that read English.

Each segment is one document: a report about a place, or the logbook of a ship. The facts that are asked for stand
between sentences of `prose`. The documents of a sample are all of one kind, and each has a fact of the kind asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsex_jax.eval import lexicon, notes, prose
from sparsex_jax.eval.prose import listed
from sparsex_jax.eval.samples import Body, BodySize, Question, numbers, person, pick, scatter

INSTRUCTION = "You are a helpful assistant. Answer the question from the documents below, in one short sentence.\n"

CODE = "The access code of the {locked} is {code}, and it may not be told to visitors."
KEEPER = "The {keeper} is {name}, who has been in charge since the spring."
DOG = "The dog {dog}, which waits at the door every day, belongs to {owner}."
STREET = "{owner} lives in {street} and came over to help with the flowers."
TODAY = "Today is a {day}.\n"
HOURS = "It opens at {1} on every {0}, at {3} on every {2} and at {5} on every {4}."
CARGO = "In the port of {port} the ship took {cargo} on board."
NUMBER = "One of the special numbers for {thing} is {number}."

CODE_QUESTION = "What is the access code of the {locked} in the {lower} of {town}?"
KEEPER_QUESTION = "Who is the {keeper} in the {lower} of {town}?"
STREET_QUESTION = "Who is the owner of the dog {dog}, and in which street does this person live?"
HOURS_QUESTION = "What kind of day is today, and at what time does the {lower} of {town} open on such a day?"
# Chat models say all of it, so that the answer needs room.
HOURS_ANSWER = "Today is a {day}, and the {lower} of {town} opens at {time}"
STREET_ANSWER = "The owner of the dog {dog} is {owner}, who lives in {street}"
CARGO_QUESTION = "What did the ship {ship} take on board in the port of {port}?"
NUMBERS_QUESTION = (
    "The documents mention {count} special numbers for {thing}, in different places. What are they? List all of them."
)

NUMBERS_EACH = 4  # the numbers of a thing, in `mv_niah`
DAYS = ("market day", "feast day", "school day")
TIMES = tuple(f"{hour}:{minute:02}" for hour in range(6, 10) for minute in range(60))
DOGS = listed("Bello, Rex, Pluto, Luna, Fips, Wotan, Molly, Hasso, Senta, Tyras, Nero, Bruno, Daisy, Ajax, Kasper")
DOG_NAMES = tuple(f"{dog}{second}" for second in ("", " the Second") for dog in DOGS)
TREES = listed(
    "Acorn, Birch, Cedar, Chestnut, Elder, Hazel, Juniper, Laurel, Linden, Maple, Myrtle, Poplar, Rowan, Yew"
)
STREETS = tuple(f"{tree} {way}" for way in ("Street", "Lane") for tree in TREES)
COLOURS, BIRDS = listed("Golden, Silver, Scarlet, Emerald, Crimson"), listed("Gull, Heron, Swan, Falcon, Petrel, Otter")
SHIPS = tuple(f"{colour} {bird}" for bird in BIRDS for colour in COLOURS)
GOODS = listed(
    "copper wire, silk ribbons, olive oil, roof slates, orange trees, church bells, glass bottles, garden tools"
)
PACKS = listed("sixty crates, ninety boxes, eighty bundles, seventy pallets")
CARGOES = tuple(f"{pack} of {goods}" for goods in GOODS for pack in PACKS)


def report_codes(rng: np.random.Generator, size: BodySize) -> Body:
    """Reports about places; a question asks for the access code in one of them."""
    return _about_places(rng, size, CODE, CODE_QUESTION, "code")


def report_people(rng: np.random.Generator, size: BodySize) -> Body:
    """The same reports; a question asks who runs one of the places."""
    return _about_places(rng, size, KEEPER, KEEPER_QUESTION, "name")


def _about_places(rng: np.random.Generator, size: BodySize, fact: str, question: str, answer: str) -> Body:
    places = _places(rng, size.num_segments)
    documents = [_document(rng, "report", place, [fact.format(**place)], size) for place in places]
    asked = pick(rng, places, size.num_questions)
    return Body(documents, [Question(question.format(**place), (place[answer],)) for place in asked])


def two_hop(rng: np.random.Generator, size: BodySize) -> Body:
    """Reports; some say whose a dog is, others where a person lives. A question asks where the owner of a dog lives.

    If there are several reports, no report has both: then a small model takes the street that stands next to the dog.
    """
    places = _places(rng, size.num_segments)
    number = max(len(places) // 2, 1)
    columns = _enough(rng, DOG_NAMES, number), _people(rng, number), _enough(rng, STREETS, number)
    chains = [{"dog": dog, "owner": owner, "street": street} for dog, owner, street in zip(*columns, strict=True)]
    told = [[DOG.format(**chain)] for chain in chains] + [[STREET.format(**chain)] for chain in chains]
    told = [told[0] + told[1]] if len(places) == 1 else [*told, *[[]] * (len(places) - len(told))]
    documents = [_document(rng, "report", *each, size) for each in zip(places, pick(rng, told, len(told)), strict=True)]
    asked = pick(rng, chains, size.num_questions)
    questions = [
        Question(STREET_QUESTION.format(**chain), (chain["street"],), (STREET_ANSWER.format(**chain),))
        for chain in asked
    ]
    return Body(documents, questions)


def changed(rng: np.random.Generator, size: BodySize) -> Body:
    """The instruction says what day it is, and the reports when places open on which days. A question asks when one
    opens today. When the reports were stored, it was another day."""
    places = _places(rng, size.num_segments)
    times = iter(_enough(rng, TIMES, len(DAYS) * len(places)))
    for place in places:
        place["hours"] = {day: next(times) for day in pick(rng, DAYS, len(DAYS))}
    told = [[HOURS.format(*itertools.chain.from_iterable(place["hours"].items()))] for place in places]
    documents = [_document(rng, "report", place, facts, size) for place, facts in zip(places, told, strict=True)]
    today, before = pick(rng, DAYS, 2)
    asked = pick(rng, places, size.num_questions)
    questions = []
    for place in asked:
        time = place["hours"][today]
        written = HOURS_ANSWER.format(**place, day=today, time=time)
        questions.append(Question(HOURS_QUESTION.format(**place), (time,), (written,)))
    return Body(documents, questions, TODAY.format(day=today), TODAY.format(day=before))


def log_cargo(rng: np.random.Generator, size: BodySize) -> Body:
    """Logbooks of ships; a question asks what one of them took on board."""
    ships = _ships(rng, size.num_segments)
    documents = [_document(rng, "log", ship, [CARGO.format(**ship)], size) for ship in ships]
    asked = pick(rng, ships, size.num_questions)
    return Body(documents, [Question(CARGO_QUESTION.format(**ship), (ship["cargo"],)) for ship in asked])


def mv_niah(rng: np.random.Generator, size: BodySize) -> Body:
    """Logbooks with several numbers for each of a few things, each in another one if there are enough. A question asks
    for all numbers of one thing."""
    things = pick(rng, lexicon.THINGS, max(2, size.num_questions))
    ships = _ships(rng, size.num_segments)
    told: list[list[str]] = [[] for _ in ships]
    questions = []
    for thing in things:
        values = numbers(rng, NUMBERS_EACH, 5)
        places = np.resize(rng.permutation(len(ships)), NUMBERS_EACH)
        for place, value in zip(places, values, strict=True):
            told[place].append(NUMBER.format(thing=thing, number=value))
        questions.append(Question(NUMBERS_QUESTION.format(count="four", thing=thing), tuple(values)))
    documents = [_document(rng, "log", ship, facts, size) for ship, facts in zip(ships, told, strict=True)]
    return Body(documents, questions[: size.num_questions])


def _places(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """What reports say about different places, no two of the same kind in one town."""
    pairs = [(kind, town) for town in lexicon.TOWNS for kind in notes.PLACE_KINDS]
    chosen = [pairs[i] for i in _spread(rng, len(pairs), number)]
    people, codes = _people(rng, number), numbers(rng, number, 4)
    return [
        kind._asdict() | {"lower": kind.place.lower(), "town": town, "name": name, "code": code}
        for (kind, town), name, code in zip(chosen, people, codes, strict=True)
    ]


def _ships(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    columns = _enough(rng, SHIPS, number), _enough(rng, CARGOES, number), _enough(rng, lexicon.TOWNS, number)
    return [{"ship": ship, "cargo": cargo, "port": port} for ship, cargo, port in zip(*columns, strict=True)]


def _people(rng: np.random.Generator, number: int) -> list[str]:
    """Different names."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[person(rng)] = None
    return list(found)


def _spread(rng: np.random.Generator, size: int, number: int) -> list[int]:
    """`number` places in a list of this size, all different if there are enough."""
    return np.resize(rng.permutation(size), number).tolist()


def _enough(rng: np.random.Generator, words: Sequence[str], number: int) -> list[str]:
    return [words[i] for i in _spread(rng, len(words), number)]


def _document(rng: np.random.Generator, kind: str, fields: dict[str, Any], facts: Sequence[str], size: BodySize) -> str:
    """A title, prose and the facts somewhere in it: an equal share of the body's tokens, about."""
    title = prose.TITLES[kind].format(**fields)
    left = size.num_tokens // size.num_segments - size.count(title + " ".join(facts))
    said: list[str] = []
    while left > 0:
        for sentence in prose.sentences(rng, kind):
            left -= size.count(" " + sentence)
            if left < 0:
                break
            said.append(sentence)
    return f"{title}{' '.join(scatter(rng, facts, said) if said else facts)}\n"
