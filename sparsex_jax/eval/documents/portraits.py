"""A task on portraits of people."""

from __future__ import annotations

import numpy as np

from sparsex_jax.eval import lexicon
from sparsex_jax.eval.documents.parts import document, enough, unlike_people
from sparsex_jax.eval.documents.prose import listed
from sparsex_jax.eval.samples import Body, BodySize, Question, pick

JOBS = listed(
    """baker, plumber, dentist, gardener, painter, optician, tailor, librarian, blacksmith, lawyer, glazier, jeweller,
    saddler, weaver, chemist, translator, butcher, musician, beekeeper, geologist, cobbler, barber, joiner, furrier"""
)
LANGUAGES = listed(
    """Spanish, German, Italian, Swedish, Turkish, Polish, Greek, Danish, Korean, Arabic, Finnish, Hindi, French,
    Japanese, Portuguese, Hungarian, Dutch, Russian, Norwegian, Persian, Icelandic, Romanian, Welsh, Swahili"""
)
PETS = listed(
    """hamster, pony, canary, duckling, hedgehog, ferret, spaniel, terrier, poodle, llama, piglet, parrot, tortoise,
    donkey, goldfish, guinea pig, peacock, lizard, raven, goose, lamb, iguana, pigeon, tarantula"""
)
SPORTS = listed(
    """tennis, football, hockey, chess, golf, billiards, boules, skittles, poker, bridge, backgammon, snooker, rugby,
    lacrosse, cricket, badminton, baseball, volleyball, croquet, handball, squash, darts, draughts, dominoes"""
)
COLLECTIONS = listed(
    """teapots, postage stamps, old coins, butterflies, thimbles, buttons, sea shells, walking sticks, candlesticks,
    matchboxes, masks, pocket watches, fans, dolls, beer mats, fossils, tin soldiers, feathers, keys, bottle tops,
    cameras, snow globes, corkscrews, puppets"""
)
# The sentence with a fact, the question for it, and its possible values.
FACTS = (
    ("{name} lives in {value}.", "In which town does {name} live?", lexicon.TOWNS),
    ("{name} works as a {value}.", "What does {name} work as?", JOBS),
    ("{name} speaks {value} at home.", "Which language does {name} speak at home?", LANGUAGES),
    ("{name} keeps a {value} as a pet.", "Which animal does {name} keep as a pet?", PETS),
    ("{name} collects {value}.", "What does {name} collect?", COLLECTIONS),
    ("{name} plays {value} every weekend.", "What does {name} play every weekend?", SPORTS),
)


def qa_people(rng: np.random.Generator, size: BodySize) -> Body:
    """A portrait of a person in each segment, with some facts; a question asks for one fact about one of them."""
    names = unlike_people(rng, size.num_segments)
    values = [enough(rng, words, len(names)) for _, _, words in FACTS]
    asked: list[Question] = []
    documents = []
    for name, own in zip(names, zip(*values, strict=True), strict=True):
        told = [said.format(name=name, value=value) for (said, _, _), value in zip(FACTS, own, strict=True)]
        documents.append(document(rng, "portrait", {"name": name}, told, size))
        asked += [
            Question(text.format(name=name), (value,), (fact.rstrip("."),))
            for (_, text, _), value, fact in zip(FACTS, own, told, strict=True)
        ]
    return Body(documents, pick(rng, asked, size.num_questions))
