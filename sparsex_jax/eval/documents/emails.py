"""A task on e-mails."""

from __future__ import annotations

import numpy as np

from sparsex_jax.eval.documents.parts import ask_about, document, enough, unlike_people
from sparsex_jax.eval.documents.prose import listed
from sparsex_jax.eval.samples import Body, BodySize, numbers

ROOM = "We shall meet to talk about the {subject} in room {room}, right after lunch."
ROOM_QUESTION = "In which room is the meeting about the {subject}?"
ROOM_ANSWER = "The meeting about the {subject} is in room {room}"

WHAT = listed("website, brochure, trade fair, customer survey, office move, price list, newsletter, annual report")
WHICH = listed("new, Danish, Spanish, autumn, spring, Norwegian, northern, regional, internal, Swiss")
SUBJECTS = tuple(f"{which} {what}" for which in WHICH for what in WHAT)


def email_rooms(rng: np.random.Generator, size: BodySize) -> Body:
    """An e-mail about a meeting in each segment; a question asks for the room of one meeting."""
    number = size.num_segments
    names = unlike_people(rng, 2 * number)
    columns = enough(rng, SUBJECTS, number), numbers(rng, number, 3), names[:number], names[number:]
    mails = [
        {"subject": subject, "room": room, "sender": sender, "name": name}
        for subject, room, sender, name in zip(*columns, strict=True)
    ]
    documents = [document(rng, "email", mail, [ROOM.format(**mail)], size) for mail in mails]
    return Body(documents, ask_about(rng, mails, size.num_questions, ROOM_QUESTION, "room", ROOM_ANSWER))
