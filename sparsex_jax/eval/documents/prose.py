"""Sentences for documents that read like real ones: reports about places, ships' logbooks, portraits and e-mails.

They have no number of four digits or more and no name of `lexicon`, so that no fact that is asked for is in them by
chance. `fill` draws what stands in their braces.
"""

from __future__ import annotations

import string

import numpy as np


def listed(text: str) -> tuple[str, ...]:
    """The items of a text with commas between them."""
    return tuple(" ".join(each.split()) for each in text.split(","))


TITLES = {
    "report": "Report on the {lower} of {town}\n",
    "log": "Logbook of the ship {ship}\n",
    "portrait": "Portrait of {name}\n",
    "email": "From: {sender}\nTo: {name}\nSubject: {subject}\n\nDear {name},\n",
}

WORDS: dict[str, tuple[str, ...]] = {
    "who": listed(
        """Mrs Albright, Mr Pemberton, Miss Oakley, old Mr Teague, the widow Sorrel, Mr Farthing, Mrs Quillan, young Mr
        Bracken, Miss Larkin, Mr Dunmore, Mrs Hathaway, Mr Ingleby, Miss Winslow, Mr Cobb, Mrs Ferris, Mr Radley"""
    ),
    "thing": listed(
        """a wooden bench, a brass bell, a set of blue curtains, an iron stove, a long ladder, a barrel of tar, two oil
        lamps, a painted sign, a new lock, a stack of chairs, a handcart, a glass cupboard, a box of nails, a rain
        gauge, a weather vane, a roll of canvas"""
    ),
    "part": listed(
        """north wall, main gate, back staircase, upper floor, east roof, front door, cellar, yard, west window, side
        entrance, loft, drain, chimney, porch"""
    ),
    "month": listed("January, February, March, April, May, June, July, August, September, October, November, December"),
    "day": listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "some": listed("three, four, five, six, seven, eight, nine, ten, eleven, twelve, fifteen, twenty, thirty, forty"),
    "wind": listed("north, north-east, east, south-east, south, south-west, west, north-west"),
    "sea": listed("calm, slight, choppy, rough, heavy, very heavy, grey and short, long and oily"),
    "mate": listed(
        """the first mate, the second mate, the boatswain, the cook, the carpenter, the cabin boy, the sailmaker, the
        purser, the helmsman, the surgeon, the lookout"""
    ),
    "gear": listed(
        """the main sheet, the fore topsail, the anchor chain, the starboard rail, the water pump, the jib, the rudder
        chain, the deck planks, the long boat, the compass light, the galley stove, the mizzen stay"""
    ),
    "food": listed(
        """salt beef and peas, bread and hard cheese, rice with raisins, bean soup, dried fish, oatmeal, pork and
        cabbage, biscuit and tea, potatoes with onions"""
    ),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "report": (
        "The first plans were drawn by {who}, who never lived to see the doors open.",
        "Before that there was nothing here but a meadow, which flooded every {month} and was used for {some} goats.",
        "In the early years the {part} had to be rebuilt, because the ground under it was softer than expected.",
        "Older people still tell how the whole street came to carry stones, and how {who} brought soup for everyone.",
        "The {part} is the oldest part that stands, and masons' marks can be seen on it when the light is low.",
        "Last {month} a storm took some tiles off, and {who} spent {some} days on a ladder to put them back.",
        "The committee met on a {day} and decided, after a long talk, to buy {thing} from the money that was left.",
        "Nobody was against it, although {who} asked to have it written down that {thing} would have been cheaper.",
        "About {some} people come on an ordinary {day}, and three times as many when there is a fair in the square.",
        "Visitors praise the quiet and complain about the {part}, which lets in the cold from {month} onwards.",
        "Children pay half, and {who} lets them in for nothing when it rains.",
        "A cat sleeps near the {part}; it belongs to nobody and has been counted in every inventory so far.",
        "The accounts are kept in a green book, and {who} checks them every {day} after lunch.",
        "Income was a little higher than in the year before, mostly because of the sale of {thing} in {month}.",
        "The largest expense was the repair of the {part}, for which {some} workmen were needed.",
        "It was agreed that the {part} should be painted again, this time in a colour that does not fade.",
        "There have been {some} letters from the public, and all but two of them were friendly.",
        "One of them came from {who}, who had found {thing} in an attic and wanted to give it away.",
        "The gift was accepted with thanks and stands near the {part}, where everyone can see it.",
        "Wood for the winter is delivered on the first {day} of {month}, and it takes {some} people to stack it.",
        "The lamps near the {part} were replaced, so that it is no longer necessary to carry a lantern there.",
        "During the dry summer water was short, and {who} organised a line of buckets from the river.",
        "A small exhibition showed {thing}, some drawings and a map on which the {part} is missing.",
        "It was opened by {who} with a speech that lasted longer than the walk around the rooms.",
        "The staff is small: {some} people work here, most of them only in the season from {month} on.",
        "Two of them have asked for {thing}, and the request will be discussed when the new budget is known.",
        "The neighbours have been patient about the noise from the {part}, and they were invited to a dinner.",
        "At this dinner {who} sang, which is still talked about in the shops.",
        "Every {month} the rooms are cleaned from top to bottom, and what was lost during the year turns up.",
        "This time it was {some} umbrellas, a pair of glasses and {thing} that nobody has claimed.",
        "The insurance was renewed, on the condition that the {part} is inspected once a year.",
        "The inspection took place on a {day} and found nothing worse than a nest of swallows.",
        "There is a plan to plant {some} trees along the path, but the question of who will water them is open.",
        "Someone suggested {who}, who was not there to refuse.",
        "The road that leads here is narrow, and carts have to wait at the {part} until the way is free.",
        "In {month} the snow lay so deep that the {part} could not be reached for {some} days.",
        "When it melted, {who} wrote a poem about it, which hangs framed beside the entrance.",
        "A school class from the next valley spent a {day} here and drew everything, down to the door handles.",
        "Their teacher sent {thing} as a thank-you, together with the best of the drawings.",
        "For the coming year the aims are modest: to mend the {part}, to keep the books in order and to be on time.",
    ),
    "log": (
        "The day began with a {wind} wind and a {sea} sea, and we made good way until noon.",
        "By evening the wind had gone round to the {wind}, and {mate} ordered a reef in the sails.",
        "The watch changed at the usual hour, and {mate} reported nothing in sight but {some} gulls.",
        "We passed {some} fishing boats, all of them on the {wind} side, and wished each other a good catch.",
        "There was fog from the {wind} until the middle of the morning, and we rang the bell every few minutes.",
        "Part of {gear} had worn through, and {mate} spent the afternoon on it with needle and thread.",
        "For dinner there was {food}, which was praised by some and eaten by all.",
        "In the night {mate} heard a noise below, but it was only a barrel that had come loose.",
        "We found {some} casks of water spoiled and threw them over the side without much regret.",
        "A passenger, {who}, was sick for two days and is now asking everyone for {food}.",
        "It was so calm that {mate} caught {some} fish from the stern with a bent pin.",
        "Towards sunset a whale was seen in the {wind}, and the whole crew came up to look.",
        "The sea was {sea}, and {gear} made such a noise that few of us slept.",
        "On {day} we washed the decks, aired the blankets and counted what was left of the {food}.",
        "A quarrel between {mate} and {mate} was settled by the captain, who made them share a pipe.",
        "The glass fell all day, and by dark we had {gear} lashed down and the hatches shut.",
        "The storm came out of the {wind} and lasted {some} hours; we lost a sail and a hat.",
        "When it was over, {mate} said that it had been nothing, and went to bed for a day.",
        "We repaired {gear} as well as could be done at sea and will have it looked at in port.",
        "The current here sets to the {wind}, more strongly than the chart would have it.",
        "A letter for {who} was handed to a ship going the other way, with {some} others.",
        "The cabin boy is learning his knots, and {mate} says that he will make a sailor yet.",
        "Rain fell for {some} hours, and we spread canvas to catch it and filled every pot we had.",
        "We sighted land in the {wind}, low and blue, and lost it again behind the rain.",
        "Both boats were lowered, so that {mate} could look at the hull, which is in good order.",
        "In the evening there was music: {mate} has a fiddle with three strings and knows {some} songs.",
        "The cook found mice in the flour and has asked the captain for a cat, or for {who}.",
        "Sails were seen on {day}, but they kept their distance and showed no flag.",
        "With a {sea} sea behind us we ran before the wind all night and saw {some} shooting stars.",
        "One man hurt his hand on {gear}; it was bandaged, and he has been given light work.",
        "It is the birthday of {who}, and we had {food} with a candle stuck into it.",
        "We sounded every hour and found {some} fathoms, sand and small shells.",
        "The {month} sun was so hot that the pitch in the seams went soft, and everybody walked barefoot.",
        "By order of the captain {gear} is to be greased twice a week, beginning on {day}.",
        "Ice hung from {gear} in the morning, and {mate} knocked it off with a mallet.",
        "A pilot came aboard, drank two cups of tea, and took us through the shallows without a word.",
        "We lay at anchor until the tide turned, and {who} was rowed ashore to buy {food}.",
        "The customs men came on {day}, opened {some} chests and closed them again.",
        "All is well on board, apart from the smell of the {food}, which has got into the blankets.",
        "Nothing else happened that is worth the ink.",
    ),
    "portrait": (
        "Those who come to visit are given tea and {food}, whatever the hour is.",
        "Neighbours still talk about the {month} in which the {part} caught fire and everybody carried water.",
        "A photograph on the wall shows {some} children in front of a tent, all of them laughing.",
        "On the table lay {thing}, half repaired, and beside it a cup of tea that had gone cold.",
        "There is a story about {thing} that went missing on a {day}, but nobody agrees on how it ended.",
        "The letters from {who} are kept in a drawer, tied with string and sorted by year.",
        "At school it was {who} who said that patience would be needed, and a good deal of luck.",
        "The first winter was hard: the {part} leaked, and the wood was gone by {month}.",
        "For {some} years nothing was heard, and then a parcel came with {thing} in it.",
        "A long illness in {month} changed much, and since then no {day} goes by without a walk.",
        "It is said that {who} once lost a bet and had to carry {thing} around the church.",
        "Old friends describe somebody who is late for everything except for dinner.",
        "The garden is small, but {some} kinds of roses grow in it, and each has a label.",
        "Every {day} the door stands open, and anyone who has a question may come in and ask it.",
        "Of the {some} awards none is hung up; they lie in a box under the stairs.",
        "Only {who} was told about the plan, and even that was by mistake.",
        "Money was never the point, as the state of the {part} shows.",
        "In the evening there is music from next door, and {who} complains about it every {month}.",
        "A trunk with {thing} is all that is left from the time abroad.",
        "When asked about the future, the answer is a smile and a look at the {part}.",
        "Books are everywhere, on the chairs and on the floor, and {some} of them are from the library.",
        "The radio in the kitchen is always on, although nobody seems to listen to it.",
        "In {month} a speech had to be given, which was short and is remembered for that.",
        "The best advice came from {who}: never buy {thing} on a {day}.",
        "Breakfast is {food}, and it has been the same for {some} years.",
        "A walk to the river and back takes an hour, or two if {who} is met on the way.",
        "Some say that luck had a part in it, others that it was stubbornness alone.",
        "The house was bought from {who}, together with {thing} and a great many mice.",
    ),
    "email": (
        "Thank you for your message of last {day}, which reached me only this morning.",
        "The delivery of {thing} has been put off until {month}, and I have told the warehouse.",
        "I had a long talk with {who} about the budget, and we both think that it will do.",
        "Please find attached the list of the {some} items that are still missing.",
        "The heating near the {part} is out of order again, so do bring a warm jumper.",
        "{who} has asked whether we could borrow {thing} for a weekend, and I said yes.",
        "If you see {who}, please pass on my thanks for the {food} at the summer party.",
        "The printer on the second floor works again, but it prints everything twice.",
        "We had {some} answers to the survey, which is more than in any year before.",
        "I will be away from {day} on and back before the end of the month.",
        "The draft that you sent is very good; I changed only {some} words and a comma.",
        "Somebody has left {thing} beside the {part}, and the cleaners would like to know whose it is.",
        "The new colleague starts in {month}, and {who} will show her around.",
        "We still need {some} volunteers for the open day, so please ask in your team.",
        "The coffee machine will be replaced, and until then there is tea for everybody.",
        "I have read the report from {who}, and I agree with most of it.",
        "The invoice for {thing} was paid twice by mistake, and we shall get the money back.",
        "Do look at the figures once more before they go to {who}.",
        "The car park behind the {part} will be closed for {some} days while it gets a new surface.",
        "There were {some} complaints last month, all of them about the noise from the {part}.",
        "I am sorry for the short notice, but {who} decided it only yesterday.",
        "The minutes of the last meeting are on the shared drive, together with the photographs.",
        "Lunch on {day} will be {food}, and those who want something else should tell the kitchen.",
        "The training in {month} was well received, and we should repeat it next year.",
        "Nobody has used {thing} since the move, so I suggest that we give it to the school.",
        "My phone was broken for {some} days, which is why I did not call back.",
        "The customer was pleased with the offer and will let us know by {month}.",
        "As always, do ask if something is not clear.",
    ),
}


def sentences(rng: np.random.Generator, kind: str) -> list[str]:
    """All sentences of a kind of document in another order, with other words in them each time."""
    return [fill(rng, SENTENCES[kind][i]) for i in rng.permutation(len(SENTENCES[kind]))]


def fill(rng: np.random.Generator, template: str) -> str:
    """The template with words in its braces. A sentence that then begins with a small letter gets a capital.

    >>> fill(np.random.default_rng(0), "Nothing else happened.")
    'Nothing else happened.'
    """
    parts = []
    for text, field, _, _ in string.Formatter().parse(template):
        parts += [text, WORDS[field][rng.integers(len(WORDS[field]))] if field else ""]
    said = "".join(parts)
    return said[0].upper() + said[1:]
