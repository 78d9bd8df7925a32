"""Tasks on the logbooks of ships."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsex_jax.eval import lexicon
from sparsex_jax.eval.documents.parts import ask_about, document, enough, joined, unlike_boxes, unlike_people
from sparsex_jax.eval.documents.prose import listed
from sparsex_jax.eval.samples import Body, BodySize, Question, numbers, pick

CARGO = "In the port of {port} the ship took {cargo} on board."
NUMBER = "One of the special numbers for {thing} is {number}."
TRADER = "The trader {name} came on board in the port of {port} and left us a day later."
HANDED = "The key of the {box} went from {giver} to {taker}."
SOLD = "{who} bought {amount} of {goods} from us."

CARGO_QUESTION = "What did the ship {ship} take on board in the port of {port}?"
NUMBERS_QUESTION = (
    "The documents mention {count} special numbers for {thing}, in different places. What are they? List all of them."
)
TRADER_QUESTION = "In which {count} ports did the trader {name} come on board?"
TRADER_ANSWER = "The trader {name} came on board in the ports of {ports}"
KEY_QUESTION = (
    "Which three people had the key of the {box}, one after the other? "
    "Answer in this form: It went from NAME to NAME to NAME."
)
KEY_ANSWER = "It went from {first} to {second} to {third}"
SOLD_QUESTION = "Which kind of goods was bought most often in these logbooks?"
SOLD_ANSWER = "The goods that were bought most often in these logbooks are {goods}"

NUMBERS_EACH = 4  # the numbers of a thing, in `mv_niah`
PORTS_EACH = 3  # the ports of a trader, in `mv_ports`
SALES_EACH = 2  # the sales in a logbook, in `cwe_goods`
COLOURS, BIRDS = listed("Golden, Silver, Scarlet, Emerald, Crimson"), listed("Gull, Heron, Swan, Falcon, Petrel, Otter")
SHIPS = tuple(f"{colour} {bird}" for bird in BIRDS for colour in COLOURS)
GOODS = listed(
    "copper wire, silk ribbons, olive oil, roof slates, orange trees, church bells, glass bottles, garden tools"
)
PACKS = listed("sixty crates, ninety boxes, eighty bundles, seventy pallets")
CARGOES = tuple(f"{pack} of {goods}" for goods in GOODS for pack in PACKS)
WARES = listed(
    """sugar, pepper, cotton, honey, candles, ginger, lemons, almonds, leather, pottery, vinegar, mustard, walnuts,
    cinnamon, tobacco, indigo, saffron, marble, amber, timber, cork, soap, paper, linen"""
)
AMOUNTS = listed("a sack, two sacks, three boxes, half a crate, a whole crate, five baskets, a small box")


def log_cargo(rng: np.random.Generator, size: BodySize) -> Body:
    """Logbooks of ships; a question asks what one of them took on board."""
    ships = _ships(rng, size.num_segments)
    documents = [document(rng, "log", ship, [CARGO.format(**ship)], size) for ship in ships]
    return Body(documents, ask_about(rng, ships, size.num_questions, CARGO_QUESTION, "cargo", ""))


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
    documents = [document(rng, "log", ship, facts, size) for ship, facts in zip(ships, told, strict=True)]
    return Body(documents, questions[: size.num_questions])


def mv_ports(rng: np.random.Generator, size: BodySize) -> Body:
    """Each trader came on board in several ports, told in different logbooks; a question asks for the ports of one."""
    ships = _ships(rng, size.num_segments)
    names = unlike_people(rng, max(size.num_segments // PORTS_EACH, 2))
    ports = np.reshape(enough(rng, lexicon.TOWNS, PORTS_EACH * len(names)), (-1, PORTS_EACH)).tolist()
    facts = [[TRADER.format(name=name, port=port) for port in own] for name, own in zip(names, ports, strict=True)]
    documents = [
        document(rng, "log", ship, told, size) for ship, told in zip(ships, _dealt(rng, facts, len(ships)), strict=True)
    ]
    asked = pick(rng, list(zip(names, ports, strict=True)), size.num_questions)
    return Body(documents, [_about_trader(name, own) for name, own in asked])


def _about_trader(name: str, ports: list[str]) -> Question:
    text = TRADER_QUESTION.format(name=name, count="three")
    return Question(text, tuple(ports), (TRADER_ANSWER.format(name=name, ports=joined(ports)),))


def vt_keys(rng: np.random.Generator, size: BodySize) -> Body:
    """Keys go from one person to a second and from the second to a third, told in different logbooks; a
    question asks for the three who had one key."""
    ships = _ships(rng, size.num_segments)
    number = max(len(ships) // 2, 1)
    boxes, names = unlike_boxes(rng, number), np.reshape(unlike_people(rng, 3 * number), (-1, 3)).tolist()
    facts = [
        [HANDED.format(giver=giver, box=box, taker=taker) for giver, taker in ((one, two), (two, three))]
        for box, (one, two, three) in zip(boxes, names, strict=True)
    ]
    documents = [
        document(rng, "log", ship, told, size) for ship, told in zip(ships, _dealt(rng, facts, len(ships)), strict=True)
    ]
    asked = pick(rng, list(zip(boxes, names, strict=True)), size.num_questions)
    return Body(documents, [_about_key(box, *own) for box, own in asked])


def _about_key(box: str, first: str, second: str, third: str) -> Question:
    written = KEY_ANSWER.format(first=first, second=second, third=third)
    return Question(KEY_QUESTION.format(box=box), (first, second, third), (written,))


def cwe_goods(rng: np.random.Generator, size: BodySize) -> Body:
    """Logbooks that tell of sales: half of them are of the same goods, which the question asks for, and the others of
    different ones."""
    ships = _ships(rng, size.num_segments)
    number = max(SALES_EACH * len(ships), 6)
    common, *others = pick(rng, WARES, len(WARES))
    goods = [common] * (number // 2) + np.resize(others, number - number // 2).tolist()
    sales = [
        SOLD.format(goods=each, who=who, amount=amount)
        for each, who, amount in zip(goods, unlike_people(rng, number), enough(rng, AMOUNTS, number), strict=True)
    ]
    told = [part.tolist() for part in np.array_split(rng.permutation(sales), len(ships))]
    documents = [document(rng, "log", ship, facts, size) for ship, facts in zip(ships, told, strict=True)]
    return Body(documents, [Question(SOLD_QUESTION, (common,), (SOLD_ANSWER.format(goods=common),))])


def _dealt(rng: np.random.Generator, groups: list[list[str]], number: int) -> list[list[str]]:
    """Deal facts out to `number` documents, evenly: those of a group to different ones, if there are enough."""
    order = rng.permutation(number).tolist()
    told: list[list[str]] = [[] for _ in order]
    for at, fact in enumerate(fact for group in groups for fact in group):
        told[order[at % number]].append(fact)
    return told


def _ships(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    columns = enough(rng, SHIPS, number), enough(rng, CARGOES, number), enough(rng, lexicon.TOWNS, number)
    return [{"ship": ship, "cargo": cargo, "port": port} for ship, cargo, port in zip(*columns, strict=True)]
