"""Tasks on reports about places."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsex_jax.eval import lexicon, notes
from sparsex_jax.eval.documents.parts import (
    ask_about,
    document,
    enough,
    joined,
    people,
    spread,
    unlike_boxes,
    unlike_people,
)
from sparsex_jax.eval.samples import Body, BodySize, Question, numbers, pick

CODE = "The access code of the {locked} is {code}, and it may not be told to visitors."
KEEPER = "The {keeper} is {name}, who has been in charge since the spring."
# What a question asks for stands behind what it names, because a small model continues what it finds.
WILL = "Only the notary knows that the will of {owner} lies in the {box}."
BOX = "The {box}, number {number}, was put into a dry corner last week, because of the rain."
STONE = "The first stone of the new {lower} of {town} was laid by the {office}, and a large crowd looked on."
OFFICIALS = "The mayor is {mayor}, the judge is {judge}, the bishop is {bishop} and the general is {general}.\n"

CODE_QUESTION = "What is the access code of the {locked} in the {lower} of {town}?"
CODES_QUESTION = "What are the access codes of {rooms}?"
ROOM = "the {locked} in the {lower} of {town}"
CODES_ANSWER = "The access code of {room} is {code}"
KEEPER_QUESTION = "Who is the {keeper} in the {lower} of {town}?"
# It finds the second fact best when it has just written the words with which that fact begins.
WILL_QUESTION = (
    "What does the will of {owner} lie in, and which number does that have? "
    "Answer in this form: It lies in the BOX, number NUMBER."
)
WILL_ANSWER = "It lies in the {box}, number {number}"
STONE_QUESTION = (
    "Which official laid the first stone of the new {lower} of {town}, and what is this official's name? "
    "Answer in this form: It was laid by the OFFICE, and the OFFICE is NAME."
)
STONE_ANSWER = "It was laid by the {office}, and the {office} is {name}"

OFFICES = ("mayor", "judge", "bishop", "general")
CODES_ASKED = 3  # in `mq_codes`


def report_codes(rng: np.random.Generator, size: BodySize) -> Body:
    """Reports about places; a question asks for the access code in one of them."""
    return _about_places(rng, size, CODE, CODE_QUESTION, "code")


def report_people(rng: np.random.Generator, size: BodySize) -> Body:
    """The same reports; a question asks who runs one of the places."""
    return _about_places(rng, size, KEEPER, KEEPER_QUESTION, "name")


def _about_places(rng: np.random.Generator, size: BodySize, fact: str, question: str, answer: str) -> Body:
    places = _places(rng, size.num_segments)
    documents = [document(rng, "report", place, [fact.format(**place)], size) for place in places]
    return Body(documents, ask_about(rng, places, size.num_questions, question, answer, ""))


def two_hop(rng: np.random.Generator, size: BodySize) -> Body:
    """Reports; some say in which box the will of a person lies, others which number a box has. A question asks for the
    number of the box with one will. If there are several reports, no report has both facts."""
    places = _places(rng, size.num_segments)
    number = max(len(places) // 2, 1)
    columns = unlike_boxes(rng, number), unlike_people(rng, number), numbers(rng, number, 4)
    chains = [{"box": box, "owner": owner, "number": each} for box, owner, each in zip(*columns, strict=True)]
    told = [[WILL.format(**chain)] for chain in chains] + [[BOX.format(**chain)] for chain in chains]
    told = [told[0] + told[1]] if len(places) == 1 else [*told, *[[]] * (len(places) - len(told))]
    documents = [document(rng, "report", *each, size) for each in zip(places, pick(rng, told, len(told)), strict=True)]
    return Body(documents, ask_about(rng, chains, size.num_questions, WILL_QUESTION, "number", WILL_ANSWER))


def changed(rng: np.random.Generator, size: BodySize) -> Body:
    """The instruction names four officials, and each report says which one laid the first stone of the place. A
    question asks for the name of one who did. When the reports were stored, others were in office."""
    places = _places(rng, size.num_segments)
    for place, office in zip(places, enough(rng, OFFICES, len(places)), strict=True):
        place["office"] = office
    documents = [document(rng, "report", place, [STONE.format(**place)], size) for place in places]
    names = unlike_people(rng, 2 * len(OFFICES))
    today, before = (dict(zip(OFFICES, some, strict=True)) for some in (names[:4], names[4:]))
    named = [place | {"name": today[place["office"]]} for place in places]
    questions = ask_about(rng, named, size.num_questions, STONE_QUESTION, "name", STONE_ANSWER)
    return Body(documents, questions, OFFICIALS.format(**today), OFFICIALS.format(**before))


def mq_codes(rng: np.random.Generator, size: BodySize) -> Body:
    """The same reports; a question asks for the access codes in several places."""
    places = _places(rng, size.num_segments)
    documents = [document(rng, "report", place, [CODE.format(**place)], size) for place in places]
    asked = [pick(rng, places, CODES_ASKED) for _ in range(size.num_questions)]
    return Body(documents, [_about_codes(some) for some in asked])


def _about_codes(places: list[dict[str, Any]]) -> Question:
    rooms = [ROOM.format(**place) for place in places]
    codes = [place["code"] for place in places]
    written = [CODES_ANSWER.format(room=room, code=code) for room, code in zip(rooms, codes, strict=True)]
    return Question(CODES_QUESTION.format(rooms=joined(rooms)), tuple(codes), tuple(written))


def _places(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """What reports say about different places, no two of the same kind in one town."""
    pairs = [(kind, town) for town in lexicon.TOWNS for kind in notes.PLACE_KINDS]
    chosen = [pairs[i] for i in spread(rng, len(pairs), number)]
    keepers, codes = people(rng, number), numbers(rng, number, 4)
    return [
        kind._asdict() | {"lower": kind.place.lower(), "town": town, "name": name, "code": code}
        for (kind, town), name, code in zip(chosen, keepers, codes, strict=True)
    ]
