"""The documents that the demo remembers, and its questions.

All of them are invented. Each note has an access code, so eleven of them distract from the one that is asked for. Asked
for each of the twelve codes, the small default model gave 7 of them with full recompute, 1 with method `naive`, 3 with
`sparsex` and 11 with `excerpt`. The question here is one of those that full recompute answers right, and so is the one
that follows it. `sparsex bench quality` measures more questions than these.
"""

from __future__ import annotations

INSTRUCTION = "You are a helpful assistant. Answer in one short sentence from the notes."
QUESTION = "What is the access code of the signal box?"
FOLLOW_UP = "And what is the access code of the flour store?"

DOCUMENTS = {
    "harbour": (
        "Harbour office of Velmora. The harbour opens at dawn and closes when the bells ring. Boats longer than ten "
        "metres need a pilot. The harbour master is Jonas Pell. The access code of the lighthouse is 4173. Fuel is "
        "sold at the north pier, and fresh water is free for everyone who pays the mooring fee."
    ),
    "library": (
        "Library of Brenholt. Books may be kept for three weeks, maps for one day only. The reading room is heated in "
        "winter and has forty seats. The librarian is Adela Finch. The access code of the map room is 9268. Visitors "
        "leave their bags at the door and speak softly, since the ceiling carries every word."
    ),
    "bakery": (
        "Bakery of Tarnow. The ovens are lit at two in the morning and the first bread is sold at six. On feast days "
        "there is plum cake with caraway. The baker is Paul Okoro. The access code of the flour store is 7540. "
        "Apprentices sweep the yard, feed the cat and carry the loaves to the market square."
    ),
    "observatory": (
        "Observatory of Kestrel Hill. The dome opens on clear nights, and schools may visit on Fridays. The great "
        "telescope has a brass tube and a walnut stand. The astronomer is Lucia Marenko. The access code of the dome "
        "is 3615. Nobody may touch the lens, and lamps must be red after sunset."
    ),
    "garden": (
        "Botanical garden of Dolm. The glass house is warm all year and keeps orchids, ferns and one old lemon tree. "
        "Dogs wait outside. The gardener is Hana Weiss. The access code of the seed vault is 8092. Seeds are swapped "
        "on the first Sunday of the month, and tea is served beside the pond."
    ),
    "museum": (
        "Museum of Old Ketter. The clocks in the hall are wound on Mondays, when the house is closed to visitors. The "
        "stuffed bear by the stairs may be touched. The curator is Tomas Brandt. The access code of the coin cabinet "
        "is 5821. Umbrellas stay in the cloakroom, and drawings may be made in pencil only."
    ),
    "station": (
        "Railway station of Arden Cross. The first train leaves at five and the last one comes in at midnight. The "
        "waiting room has a stove and a shelf of old timetables. The station master is Ruth Calder. The access code of "
        "the signal box is 6407. Bicycles travel in the last carriage, and lost hats are kept for a year."
    ),
    "theatre": (
        "Theatre of Sankt Orla. Plays begin at eight, and nobody is let in after the second bell. The curtain was sewn "
        "by the sailors of the town. The director is Miriam Stolz. The access code of the costume room is 2956. Wigs "
        "are brushed before every show, and apples are sold in the interval."
    ),
    "mill": (
        "Water mill of Lower Fenwick. The wheel turns from March to November and is taken out when the stream freezes. "
        "Rye is ground on Tuesdays and barley on Thursdays. The miller is Edgar Voss. The access code of the grain "
        "loft is 1384. Sacks must be dry and tied, and children may feed the ducks."
    ),
    "clinic": (
        "Clinic of Maple Row. The doors open at seven, and urgent cases are seen at any hour of the night. The garden "
        "behind the house is for patients who learn to walk again. The head nurse is Irena Kolar. The access code of "
        "the medicine room is 7093. Flowers are welcome, and telephones are switched off in the wards."
    ),
    "school": (
        "School of Birch Lane. Lessons start at half past eight and end with a song. There is soup at noon, and on "
        "Wednesdays the older pupils cook it. The headmistress is Greta Lindqvist. The access code of the music room "
        "is 8512. Skates hang in the cellar, and the frog in the pond has no name yet."
    ),
    "brewery": (
        "Brewery of Castle Hollin. Beer is brewed in copper kettles and rests for six weeks in the rock. "
        "Guests taste three kinds and a cheese. The brewer is Oskar Demant. The access code of the ice cellar is 3178. "
        "Horses draw the wagon on market days, and empty barrels are washed twice."
    ),
}
# The order of the documents in the prompt, which is not the order in which they are remembered.
PROMPT_ORDER = (
    "library",
    "garden",
    "mill",
    "harbour",
    "clinic",
    "theatre",
    "observatory",
    "school",
    "bakery",
    "station",
    "museum",
    "brewery",
)


def user_message() -> str:
    """All documents, each behind a heading that was not remembered, and the question."""
    notes = [f"Note {i}:\n{DOCUMENTS[name]}" for i, name in enumerate(PROMPT_ORDER, start=1)]
    return "\n\n".join(["Twelve notes came in today, in no particular order.", *notes, QUESTION])
