"""Tasks on Python modules, for models that read code."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsex_jax.eval.documents.parts import ask_about, enough, filling, spread
from sparsex_jax.eval.documents.prose import listed
from sparsex_jax.eval.samples import Body, BodySize, numbers, pick, scatter

INSTRUCTION = "You are a helpful assistant. Answer the question from the Python modules below, in one short sentence.\n"

TITLE = '# {path}\n"""What the shop does with its {nouns}."""\n\nimport datetime\n\n{constants}\n\n\n'
CONSTANT_QUESTION = "What is the value of {constant} in {path}?"
CONSTANT_ANSWER = "The value of {constant} in {path} is {value}"
PORT_QUESTION = "Which number does the function {name} in {path} return?"
PORT_ANSWER = "The function {name} in {path} returns {port}"
PORT = 'def {name}():\n    """The port on which the service for {nouns} listens."""\n    return {port}\n'

CONSTANTS_EACH = 3  # in a module
NOUNS = tuple(
    (noun, f"{noun}s")
    for noun in listed(
        """order, invoice, customer, parcel, driver, ticket, message, product, account, payment, vehicle, refund,
        discount, supplier, warehouse, contract, voucher, shipment, employee, receipt"""
    )
)
SETTINGS = ("LIMIT", "TIMEOUT", "BATCH_SIZE", "CACHE_SIZE", "BUDGET", "THRESHOLD")
CONSTANTS = tuple(f"{noun.upper()}_{setting}" for setting in SETTINGS for noun, _ in NOUNS)
FOLDERS = ("shop", "server", "reports", "tools", "legacy")

# Functions that say nothing in particular. No number of three digits or more is in them.
FUNCTIONS = (
    'def count_{nouns}({nouns}):\n    """How many of them are not empty."""\n'
    "    return sum(1 for {noun} in {nouns} if {noun})\n",
    'def first_{noun}({nouns}, default=None):\n    """The first one, or the default if there is none."""\n'
    "    return {nouns}[0] if {nouns} else default\n",
    'def {nouns}_by_name({nouns}):\n    """The same, sorted by name."""\n'
    "    return sorted({nouns}, key=lambda {noun}: {noun}.name.lower())\n",
    'def is_open({noun}):\n    """Whether someone has to work on it."""\n'
    '    return {noun}.status in ("new", "waiting") and not {noun}.deleted\n',
    "def total_of_{nouns}({nouns}):\n    total = 0\n    for {noun} in {nouns}:\n        if not {noun}.cancelled:\n"
    "            total += {noun}.amount\n    return total\n",
    'def print_{nouns}({nouns}, file=None):\n    """One line for each, with its age in days."""\n'
    "    today = datetime.date.today()\n    for {noun} in {nouns}:\n"
    '        print({noun}.name, (today - {noun}.date).days, sep="\\t", file=file)\n',
    'def {nouns}_since({nouns}, date):\n    """Those that came in on that day or later."""\n'
    "    return [{noun} for {noun} in {nouns} if {noun}.date >= date]\n",
    "def merge_{nouns}(ours, theirs):\n    merged = {{{noun}.key: {noun} for {noun} in theirs}}\n"
    "    merged.update({{{noun}.key: {noun} for {noun} in ours}})\n    return list(merged.values())\n",
    'def parse_{noun}(line):\n    """Read a line of the export, whose fields have semicolons between them."""\n'
    '    name, date, amount = line.strip().split(";")\n'
    '    return {{"name": name, "date": datetime.date.fromisoformat(date), "amount": float(amount)}}\n',
    'def check_{noun}({noun}):\n    """Raise ValueError if it has no name or no amount."""\n'
    '    if not {noun}.name or {noun}.amount is None:\n        raise ValueError(f"incomplete {noun}: {{{noun}!r}}")\n',
    "def group_{nouns}({nouns}):\n    groups = {{}}\n    for {noun} in {nouns}:\n"
    "        groups.setdefault({noun}.owner, []).append({noun})\n    return groups\n",
    'def cancel_{noun}({noun}, reason=""):\n    """Mark it as cancelled, and say why."""\n'
    '    {noun}.cancelled = True\n    {noun}.notes.append(reason or "no reason given")\n    return {noun}\n',
)


def module_constants(rng: np.random.Generator, size: BodySize) -> Body:
    """Modules with a few constants each; a question asks for the value of one."""
    return _about_modules(rng, size, CONSTANT_QUESTION, CONSTANT_ANSWER, "value")


def module_returns(rng: np.random.Generator, size: BodySize) -> Body:
    """The same modules; a question asks what a function returns."""
    return _about_modules(rng, size, PORT_QUESTION, PORT_ANSWER, "port")


def _about_modules(rng: np.random.Generator, size: BodySize, question: str, written: str, answer: str) -> Body:
    modules = _modules(rng, size.num_segments)
    documents = [_document(rng, module, size) for module in modules]
    return Body(documents, ask_about(rng, modules, size.num_questions, question, answer, written))


def _paths(rng: np.random.Generator, number: int) -> list[tuple[str, str]]:
    """Different paths, with what the modules are about: as far as there are enough, each about something else."""
    nouns, folders = enough(rng, [plural for _, plural in NOUNS], number), enough(rng, FOLDERS, len(FOLDERS))
    return [(f"{folders[(i + i // len(NOUNS)) % len(FOLDERS)]}/{each}.py", each) for i, each in enumerate(nouns)]


def _modules(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """What differs between modules: their paths, constants and functions."""
    names = np.reshape(enough(rng, CONSTANTS, CONSTANTS_EACH * number), (number, -1)).tolist()
    values = np.reshape(numbers(rng, (CONSTANTS_EACH + 1) * number, 4), (number, -1)).tolist()
    return [
        {
            "path": path,
            "nouns": nouns,
            "name": f"{nouns}_port",
            "port": own.pop(),
            "constant": constants[0],
            "value": own[0],
            "all": dict(zip(constants, own, strict=True)),
        }
        for (path, nouns), constants, own in zip(_paths(rng, number), names, values, strict=True)
    ]


def _document(rng: np.random.Generator, module: dict[str, Any], size: BodySize) -> str:
    """A module: its constants, and the function that is asked for among others."""
    constants = "\n".join(f"{name} = {value}" for name, value in pick(rng, list(module["all"].items()), CONSTANTS_EACH))
    title, asked = TITLE.format(constants=constants, **module), PORT.format(**module)
    left = size.num_tokens // size.num_segments - size.count(title + asked)
    others = filling(rng, _functions, left, size)
    return title + "\n\n".join(scatter(rng, [asked], others) if others else [asked])


def _functions(rng: np.random.Generator) -> list[str]:
    """A function of each kind, in another order and about other things each time."""
    nouns = [NOUNS[i] for i in spread(rng, len(NOUNS), len(FUNCTIONS))]
    return [
        FUNCTIONS[i].format(noun=noun, nouns=plural)
        for i, (noun, plural) in zip(rng.permutation(len(FUNCTIONS)), nouns, strict=True)
    ]
