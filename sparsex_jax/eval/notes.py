"""Short notes about places that read like real ones, for models that read English and were not trained on the tasks.

The sentences of the other tasks do not follow from each other, which confuses a small chat model more than any reuse
does. Most words of these notes are not in the closed vocabulary of `lexicon`.
"""

from __future__ import annotations

from typing import NamedTuple


class PlaceKind(NamedTuple):
    """A kind of place.

    Attributes:
      place: what it is called.
      keeper: who runs it.
      locked: which part of it is locked with a code.
      sentences: other facts about it.
    """

    place: str
    keeper: str
    locked: str
    sentences: tuple[str, ...]


# The facts that every note tells, between its sentences.
KEEPER = "The {keeper} is {name}."
CODE = "The access code of the {locked} is {code}."
YEAR = "It was built in {year}."
TITLE = "{place} of {town}."
NOTE = "Note {number}, from the {lower}:\n{text}\n"

CODE_QUESTION = "What is the access code of the {locked}?"
KEEPER_QUESTION = "Who is the {keeper}?"
YEAR_QUESTION = "In which year was the {lower} built?"
INSTRUCTION = "You are a helpful assistant. Answer in one short sentence from the notes.\n"
OPENING = "{count} came in today, in no particular order.\n"
_WORDS = "Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve Thirteen Fourteen"
COUNTS = ("One note", *(f"{word} notes" for word in _WORDS.split()))

PLACE_KINDS = (
    PlaceKind(
        "Harbour",
        "harbour master",
        "lighthouse",
        (
            "It opens at dawn and closes when the bells ring.",
            "Boats longer than ten metres need a pilot.",
            "Fuel is sold at the north pier.",
            "Fresh water is free for everyone who pays the mooring fee.",
            "Nets may be dried on the sea wall.",
        ),
    ),
    PlaceKind(
        "Library",
        "librarian",
        "map room",
        (
            "Books may be kept for three weeks, maps for one day only.",
            "The reading room is heated in winter and has forty seats.",
            "Visitors leave their bags at the door.",
            "Readers speak softly, since the ceiling carries every word.",
            "Newspapers are kept for a month.",
        ),
    ),
    PlaceKind(
        "Bakery",
        "baker",
        "flour store",
        (
            "The ovens are lit at two in the morning and the first bread is sold at six.",
            "On feast days there is plum cake with caraway.",
            "Apprentices sweep the yard and feed the cat.",
            "The loaves are carried to the market square.",
            "Rye bread is baked on Tuesdays only.",
        ),
    ),
    PlaceKind(
        "Observatory",
        "astronomer",
        "dome",
        (
            "It is open on clear nights, and schools may visit on Fridays.",
            "The great telescope has a brass tube and a walnut stand.",
            "Nobody may touch the lens.",
            "Lamps must be red after sunset.",
            "Comets are drawn by hand in a large book.",
        ),
    ),
    PlaceKind(
        "Botanical garden",
        "gardener",
        "seed vault",
        (
            "The glass house is warm all year and keeps orchids and ferns.",
            "Dogs wait outside.",
            "Seeds are swapped on the first Sunday of the month.",
            "Tea is served beside the pond.",
            "One old lemon tree still bears fruit.",
        ),
    ),
    PlaceKind(
        "Theatre",
        "director",
        "costume room",
        (
            "Plays begin at eight and end before the last tram leaves.",
            "The balcony creaks, so nobody may stand there.",
            "Tickets are cheaper on Mondays.",
            "The curtain was sewn by the weavers of the town.",
            "Children sit in the front rows.",
        ),
    ),
    PlaceKind(
        "Swimming pool",
        "lifeguard",
        "boiler room",
        (
            "The water is changed every night.",
            "Caps are worn in all lanes.",
            "Beginners keep to the shallow end.",
            "On hot days the queue reaches the street.",
            "Towels can be rented at the desk.",
        ),
    ),
    PlaceKind(
        "Railway station",
        "station master",
        "signal box",
        (
            "Trains to the coast leave every hour.",
            "The waiting room has a stove and two long benches.",
            "Bicycles travel in the last carriage.",
            "The clock above the gate is four minutes fast.",
            "Parcels are handed out until noon.",
        ),
    ),
    PlaceKind(
        "Hospital",
        "head nurse",
        "medicine cabinet",
        (
            "Visitors may come between two and four.",
            "Flowers are not allowed in the rooms on the second floor.",
            "Soup is served at noon and at six.",
            "The lift is kept free for patients.",
            "A doctor is on call every night.",
        ),
    ),
    PlaceKind(
        "School",
        "headmistress",
        "science cupboard",
        (
            "Lessons start at eight, on Saturdays at nine.",
            "The older pupils look after the rabbits.",
            "Lunch is eaten in the hall under the clock.",
            "Caps and coats hang in the corridor.",
            "There is no homework in the harvest weeks.",
        ),
    ),
    PlaceKind(
        "Brewery",
        "master brewer",
        "hop loft",
        (
            "Beer rests in the cellar for six weeks.",
            "The horses are fed with what is left of the grain.",
            "Bottles are washed in the yard.",
            "Guests may taste the dark beer on Thursdays.",
            "The copper kettle is polished once a month.",
        ),
    ),
    PlaceKind(
        "Museum",
        "curator",
        "coin cabinet",
        (
            "The old ship stands in the first hall.",
            "Guided tours begin at eleven.",
            "Drawing is allowed, and flash lights are not.",
            "A whale's jaw hangs over the stairs.",
            "Postcards are sold at the exit.",
        ),
    ),
    PlaceKind(
        "Mill",
        "miller",
        "grain cellar",
        (
            "It grinds when the wind comes from the west.",
            "Farmers wait their turn in the yard.",
            "The sails are mended in spring.",
            "Sacks weigh fifty kilos.",
            "Owls nest under the roof.",
        ),
    ),
    PlaceKind(
        "Post office",
        "postmaster",
        "letter vault",
        (
            "Letters are sorted twice a day.",
            "Heavy parcels go by boat.",
            "Stamps are sold at the left window.",
            "The bench outside is for those who read their letters at once.",
            "Telegrams cost double after seven.",
        ),
    ),
)
