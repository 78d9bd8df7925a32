"""The closed vocabulary of the generated tasks: word lists, templates, and a word-level tokenizer for them.

`tasks.make_sample` builds the texts of all closed tasks from these words, so that a tiny model can learn all of them.
A token is a word, a variable's name, a digit or a punctuation mark, with the space before it if there is one:
"VAR XQZPD = 12." is `VAR| XQZPD| =| 1|2|.`. So joining the tokens restores the text exactly.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
from typing import Any

import numpy as np

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
# Variable names are five capitals; VAR is the one word in capitals.
_PIECE = r" ?(?:VAR(?![A-Za-z])|[A-Z]{5}|[A-Z]?[a-z]+|[A-Z]|[0-9]|[^\sA-Za-z0-9])|\n| "
_pieces = re.compile(_PIECE).findall


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Words of the noise ----------------------------------------------------------------------------------------

ADJECTIVES = _words(
    """old new small large quiet loud bright dark warm cold narrow wide heavy light empty full early late dry wet soft
    hard clean dusty broken fresh plain strange gentle steep hollow round rough smooth faded golden wooden careful
    patient hungry"""
)
NOUNS = _words(
    """man woman child farmer sailor teacher friend neighbour stranger traveller crowd family guest keeper driver
    singer boy girl king queen river road bridge field garden forest hill lake market station tower wall gate window
    door roof kitchen table chair lamp letter book map coat hat boat train wagon wheel stone branch leaf flower tree
    horse dog cat bird fish bread soup apple cheese salt sugar water fire smoke rain snow wind storm cloud moon star
    morning evening summer winter journey story song dream promise secret answer plan"""
)
PLACES = _words(
    """harbour village valley castle island meadow church school library mill bakery square corner shore cellar attic
    stable orchard inn theatre museum office workshop camp"""
)
VERBS = _words(
    """watched followed carried found lost painted repaired opened closed crossed remembered forgot described visited
    noticed admired borrowed sold bought hid cleaned measured guarded praised feared counted drew moved touched
    wanted"""
)
ADVERBS = _words("slowly quickly quietly often never always again soon twice gladly rarely suddenly")
NOISE = (
    "The {adjective} {noun} {verb} the {noun} near the {place}.",
    "A {noun} {adverb} {verb} the {adjective} {noun}.",
    "In the {place} there was a {adjective} {noun} and a {noun}.",
    "Every {noun} in the {place} {verb} one {adjective} {noun}.",
    "Nobody knew why the {noun} {verb} the {noun} so {adverb}.",
    "After the {noun} came, the {adjective} {noun} was gone.",
    "They {adverb} {verb} a {noun} behind the {place}.",
    "When the {noun} was {adjective}, she {verb} the {noun}.",
    "He said that the {noun} and the {noun} were {adjective}.",
    "It was a {adjective} {noun}, and the {place} was {adjective}.",
    "Before the {noun} they {verb} the {place} and the {noun}.",
    "One {noun} {verb} another {noun}, but the {noun} was {adjective}.",
)

# Things: the keys of needles, and the words that are counted -----------------------------------------------

# None of them is in the noise.
THINGS = _words(
    """acorn almond amber anchor ankle apron arrow ash badge bagel bamboo banana banner barrel basil basket beacon bead
    bean beaver bell belt bench berry bicycle biscuit blanket blossom bonnet boot bottle bowl bracelet brass brick
    broom brush bubble bucket buckle bundle butter button cabbage cabin cactus cage camel candle canoe canvas carpet
    carrot cartoon cedar cello chain chalk cherry chess chestnut chimney cider cinnamon circle clarinet clay clock
    clover coal cobalt cocoa coconut coffee comet compass copper coral cork cotton crab cradle crane crayon cricket
    crown crystal cube cucumber cup curtain cushion daisy dagger desert diamond dolphin donkey dragon drum eagle
    easel ebony elbow emerald engine envelope falcon feather fennel fern fiddle fig finger flag flask flute fossil
    fountain fox frost funnel galaxy garlic ginger giraffe glacier glass globe glove goat goose granite grape grass
    gravel guitar hammer hammock harp harvest hazel hedge helmet herring honey hook horn hornet hotel iceberg ink
    iris iron ivory ivy jacket jar jasmine jewel jigsaw juniper kettle key kite kitten knee knife ladder ladle
    lantern lavender lemon lens lettuce lily lime linen lion lizard lobster locket lotus lynx magnet mango mantle
    maple marble mask mast melon meteor mint mirror mitten mosaic moss motor mountain mouse mushroom mustard napkin
    needle nest nettle nickel noodle nutmeg oak oar oasis ocean olive onion opal orange orbit orchid organ otter
    oven owl oyster paddle paint palace palm panda panther paper parrot parsley peach peacock pearl pebble pelican
    pen pencil penguin pepper piano pickle pigeon pillow pine pipe planet plate plum pocket pond poppy portrait
    potato pottery prism puddle pumpkin puppet purse puzzle pyramid quartz quill quilt rabbit radio radish raft
    rainbow raven razor ribbon rice ring robin rocket root rope rose ruby rug saddle saffron sail salmon sand sandal
    sapphire satchel saucer scarf scissors shell shield shoe shovel silk silver skate sketch sled slipper snail soap
    sock sofa spade sparrow spear spider spinach sponge spoon spring squirrel stamp statue steam steel stove straw
    swan sword syrup tablet tangerine teapot temple tent thimble thistle thread throne thunder ticket tiger tile tin
    tomato torch tortoise towel trumpet tulip tunnel turnip turtle umbrella vase velvet vest vinegar violet violin
    walnut walrus wasp whale wheat whistle willow wolf wool wreath yarn zebra"""
)
# Invented words, such as "zorkax".
CODED_WORDS = tuple(
    "".join(syllables)
    for syllables in itertools.product(
        ("zo", "ba", "qui", "tre", "vu"), ("rk", "lm", "nd"), ("ax", "et", "iv", "os", "ul", "ep", "ig", "onk")
    )
)

# People and their facts ------------------------------------------------------------------------------------

FIRST_NAMES = _words(
    """Ada Boris Clara Dario Edith Felix Greta Hugo Irene Jonas Karla Leon Marta Nils Olga Paul Rosa Simon Tessa
    Victor Wanda Yusuf Zelda Anton Bella Conrad Doris Emil Flora Gustav Hilda Ivan"""
)
LAST_NAMES = _words(
    """Abbott Becker Castro Dalton Everett Fischer Garner Holm Ibsen Jansen Keller Lindgren Moreau Novak Okoro Pell
    Quist Rossi Santos Tanner Ulrich Vance Weiss Yates Zimmer Marenko Finch Hale Draper Stone"""
)
TOWNS = _words(
    """Velmora Brenholt Tarnow Dolm Kestrel Ostra Lindau Marwick Fenby Corvale Aldersea Norrin Pellow Quent Rusk
    Selby Thorne Ulmar Wexley Zandor"""
)
JOBS = _words(
    """baker carpenter doctor gardener painter pilot tailor librarian blacksmith dentist lawyer plumber potter jeweller
    surgeon weaver chemist editor butcher musician"""
)
COLORS = _words("red blue green yellow purple pink black white grey brown scarlet turquoise")
ANIMALS = _words("hamster pony canary duck hedgehog ferret spaniel terrier poodle cow llama pig")
FOODS = _words("pizza pasta curry stew salad pancakes dumplings sausages porridge omelette lasagne pudding")
LANGUAGES = _words("Spanish German Italian Swedish Turkish Polish Greek Danish Korean Arabic Finnish Hindi")
MONTHS = _words("January February March April June July August September October November December")
SPORTS = _words("tennis football hockey chess golf rowing boxing judo archery sailing skiing rugby")

# The sentence with a fact, the question for it, and its possible values. None: the value is a number.
PERSON_FACTS = (
    ("{name} lives in {value}.", "In which town does {name} live?", TOWNS),
    ("{name} works as a {value}.", "What is the job of {name}?", JOBS),
    ("{name} speaks {value} at home.", "Which language does {name} speak?", LANGUAGES),
    ("{name} was born in {value}.", "In which month was {name} born?", MONTHS),
    ("{name} keeps a {value}.", "Which animal does {name} keep?", ANIMALS),
    ("{name} drives a {value} car.", "What is the color of the car that {name} drives?", COLORS),
)
CHAT_FACTS = (
    ("My favourite color is {value}.", "What is my favourite color?", COLORS),
    ("I live in {value}.", "In which town do I live?", TOWNS),
    ("I work as a {value}.", "What is my job?", JOBS),
    ("My sister is called {value}.", "What is the name of my sister?", FIRST_NAMES),
    ("I was born in {value}.", "In which month was I born?", MONTHS),
    ("My best friend has a {value}.", "Which animal does my best friend have?", ANIMALS),
    ("I like to eat {value}.", "What do I like to eat?", FOODS),
    ("I am learning {value}.", "Which language am I learning?", LANGUAGES),
    ("On Sundays I play {value}.", "What do I play on Sundays?", SPORTS),
    ("My brother moved to {value}.", "Where did my brother move to?", TOWNS),
    ("My boss is called {value}.", "What is the name of my boss?", FIRST_NAMES),
    ("My mother was a {value}.", "What was the job of my mother?", JOBS),
)
CHAT_REPLIES = (
    "Thank you, I will remember that.",
    "That is good to know.",
    "I see. Tell me more about it.",
    "Thank you for telling me.",
)
AGENT_FACTS = (
    ("I propose to build it in {value}.", "Which town do {names} propose, in this order?", TOWNS),
    ("My estimate of the cost is {value}.", "Which cost do {names} estimate, in this order?", None),
    ("We should begin in {value}.", "Which month do {names} want to begin in, in this order?", MONTHS),
    ("The walls should be {value}.", "Which color do {names} want for the walls, in this order?", COLORS),
    ("A {value} should lead the work.", "Whom do {names} want to lead the work, in this order?", JOBS),
)
AGENT_PROBLEM = "Problem: The council wants to build a new {place}. Say where, when, how and at what cost.\n"
AGENT_OPENING = "Agent {name}:"

# Templates of the other tasks ------------------------------------------------------------------------------

NEEDLE = "One of the special magic numbers for {key} is: {value}."
NEEDLE_QUESTION = "What is the special magic number for {key} mentioned in the text? Answer:"
NEEDLES_QUESTION = "What special magic numbers does the text mention for {keys}? Answer:"
# Where a question asks for several things, it numbers them, and so does the answer, so that their order is given.
ORDINALS = _words("first second third fourth")
NUMBERED = "{ordinal} {key}"
NUMBERED_ANSWER = "{ordinal} {key} {value}"
ASSIGN_VALUE = "VAR {name} = {value}."
ASSIGN_NAME = "VAR {name} = VAR {value}."
VARIABLES_QUESTION = "Which values do these variables have in the text: {keys}? Answer:"
# Each is one token to the tiny model, so that it does not have to learn to spell names.
VARIABLES = tuple("".join(letters) for letters in np.random.default_rng(5).choice([*string.ascii_uppercase], (240, 5)))
WORD_LIST, CODED_LIST = "Words: ", "Coded text: "
COMMON_QUESTION = "What are the {number} most common words in the lists? Answer:"
FREQUENT_QUESTION = "What are the three most frequent coded words? Answer:"
PERSON_QUESTION = "Question: {question} Answer:"
AGENT_QUESTION = "{question} Answer:"
CHAT_TURN = "User: {user}\nAssistant: {assistant}\n"
CHAT_QUESTION = "Question about the chat: {question} Answer:"

INSTRUCTIONS = {
    "niah": "A special magic number is hidden in the following text. Memorize it.\n",
    "mk_niah": "Some special magic numbers are hidden in the following text. Memorize them.\n",
    "mq_niah": "Some special magic numbers are hidden in the following text. Memorize them.\n",
    "vt": "Memorize and track the variable assignments hidden in the following text. ",
    "cwe": "Below are lists of words. In them some words appear more often than others. Memorize the ones that do.\n",
    "fwe": "Read the following coded text and track how often each coded word appears.\n",
    "qa": "Answer the question based on the given documents. Only give the answer.\n",
    "chat": "This is the history of a chat. Go on with it, and give short answers.\n",
    "agents": "You are an agent that sums up what the other agents said. Read the problem and their answers.\n",
}
# The instruction of the earlier prompts, in which the regimes `joint` and `preamble` store the segments.
EARLIER_INSTRUCTION = "Here is something that you may need later on. Read it with care.\n"


# The tokenizer ---------------------------------------------------------------------------------------------


def split(text: str) -> list[str]:
    """Split a text into its tokens. Joined, they are the text.

    >>> split("VAR XQZPD = 12.\\n")
    ['VAR', ' XQZPD', ' =', ' 1', '2', '.', '\\n']
    """
    return _pieces(text)


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token to id: the special tokens, then characters, then words. Most are there only with a space before them.

    Words are sorted, so a new word shifts the ids of others, and a trained model needs the tokenizer of its training.
    """
    characters = (*string.digits, *".,:?=")
    words = sorted({piece.strip() for text in _texts() for piece in split(re.sub(r"\{\w+\}", " ", text))})
    words = [word for word in words if word and word not in characters]
    # Only words with a capital begin a line, so only these are also there without a space.
    alone = [word for word in words if word[0].isupper() and word not in VARIABLES]
    tokens = (*SPECIAL_TOKENS, "\n", *characters, *alone, *(" " + piece for piece in (*characters, *words)))
    return {token: number for number, token in enumerate(tokens)}


def _texts() -> list[str]:
    """All strings in this module's constants."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            value = tuple(value.values())
        return [text for item in value for text in strings(item)] if isinstance(value, tuple) else []

    return [text for name, value in globals().items() if name.isupper() and name[0] != "_" for text in strings(value)]


def encode(text: str) -> np.ndarray:
    """Int32 token ids `[tokens]`, the same as `ruler_tokenizer` gives without `<bos>`, but several times as fast.

    Raises:
      KeyError: a word is not in the vocabulary.
    """
    ids = vocabulary()
    return np.fromiter(map(ids.__getitem__, split(text)), np.int32)


def build_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` of the vocabulary. It puts `<bos>` before a text, as in training."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos = ("<bos>", vocabulary()["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def ruler_tokenizer() -> Any:
    """The tokenizer as a transformers `PreTrainedTokenizerFast`."""
    from transformers import PreTrainedTokenizerFast

    names = {f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), clean_up_tokenization_spaces=False, **names)
