"""The documents that the demo remembers, and its questions.

All of them are invented. Of ten questions about these notes, this one was picked because the small default model
answers it right with full recompute and gives another note's code with method `naive`. One question does not show how
often this happens; `sparsex bench quality` measures that. Of eleven questions to follow it, the model answers four
right with full recompute. The one here is one of those, and means nothing without the question before it.
"""

from __future__ import annotations

INSTRUCTION = "You are a helpful assistant. Answer in one short sentence from the notes."
QUESTION = "What is the access code of the dome?"
FOLLOW_UP = "And of the map room?"

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
}
# The order of the documents in the prompt, which is not the order in which they are remembered.
PROMPT_ORDER = ("library", "garden", "harbour", "observatory", "bakery")


def user_message() -> str:
    """All documents, each behind a heading, and the question."""
    notes = [f"Note {i}, from the {name}:\n{DOCUMENTS[name]}" for i, name in enumerate(PROMPT_ORDER, start=1)]
    return "\n\n".join(["Five notes came in today, in no particular order.", *notes, QUESTION])
