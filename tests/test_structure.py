"""Structured output: what an answer must be, it is, whatever else runs and happens meanwhile."""

import contextlib
import json
import re
import time
from typing import Literal

import jax
import jax.numpy as jnp
import jsonschema_rs
import numpy as np
import pytest
from conftest import idle, run
from live import MODEL, live_server, make_engine
from pydantic import BaseModel, Field

from sparsex_jax import InvalidRequestError, SamplingParams, Structure, StructureError
from sparsex_jax.config.structure import MAX_STRUCTURE_LENGTH
from sparsex_jax.device.sampling import Sampled, Sampling, sample
from sparsex_jax.scheduler import warmup
from sparsex_jax.scheduler.sequence import State
from sparsex_jax.text.grammars import Grammars
from sparsex_jax.text.patterns import lark_with_ascii_classes

NOTE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
STRUCTURES = {
    "schema": Structure("json_schema", NOTE),
    "regex": Structure("regex", r"\d{3}-[a-z]{2,5}"),
    "choice": Structure("choice", ["yes", "no", "not yet"]),
    "lark": Structure("grammar", 'start: "select " /[a-z]{1,8}/ " from " ("tides" | "winds")'),
    "gbnf": Structure("grammar", 'root ::= "a" [0-9] [0-9] | "b" root'),
}
MATCHES = {
    "schema": lambda text: jsonschema_rs.is_valid(NOTE, json.loads(text)),
    "regex": re.compile(r"\d{3}-[a-z]{2,5}").fullmatch,
    "choice": ["yes", "no", "not yet"].__contains__,
    "lark": re.compile(r"select [a-z]{1,8} from (tides|winds)").fullmatch,
    "gbnf": re.compile(r"b*a\d\d").fullmatch,
}
PROMPT = "The keeper of the observatory"
RANDOM = {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def engine():
    return make_engine(max_num_seqs=2)  # fewer programs: structures of two sequences, and of one


def sampling(kind=None, **options):
    structure = STRUCTURES[kind] if kind else None
    return SamplingParams(**{"max_new_tokens": 96} | options, structure=structure)


def texts(engine, samplings):
    outs = engine.generate_batch([PROMPT] * len(samplings), samplings, keep=False)
    return [(out.text, out.token_ids, out.finish_reason) for out in outs]


def steps_of(engine, monkeypatch, number):
    """Have every dispatch compute so many tokens."""
    monkeypatch.setattr(engine.loop.policy, "_steps", lambda step_seconds: number)


# On the device ----------------------------------------------------------------------------------------------


def test_what_is_sampled_is_the_most_probable_of_the_allowed_tokens():
    rng = np.random.default_rng(0)
    allowed, logits = rng.random((3, 70)) < 0.3, rng.normal(size=(3, 70)).astype(np.float32)
    allowed[2] = True
    words = np.packbits(np.pad(allowed, [(0, 0), (0, 26)]), axis=1, bitorder="little").view(np.uint32)
    greedy, none, seeds = jnp.zeros(3), jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.uint32)
    sampling = Sampling(greedy, greedy + 1, none, greedy, seeds, allowed=words)
    drawn = sample(jnp.asarray(logits), sampling, jnp.arange(3))
    assert drawn.tolist() == np.where(allowed, logits, -np.inf).argmax(axis=1).tolist()


# Answers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_are_what_they_must_be_however_many_tokens_a_dispatch_has(engine, monkeypatch):
    samplings = [sampling(kind, **options) for kind in STRUCTURES for options in ({}, RANDOM)]
    samplings += [sampling(max_new_tokens=12, ignore_eos=True), sampling(max_new_tokens=12, **RANDOM)]
    found = {}
    for steps in (1, 3, 16):
        steps_of(engine, monkeypatch, steps)
        found[steps] = texts(engine, samplings)
    assert found[1] == found[3] == found[16]
    for one, (text, _, reason) in zip(samplings[:-2], found[1], strict=False):
        kind = next(name for name, structure in STRUCTURES.items() if structure is one.structure)
        assert reason == "stop", (kind, text)
        assert MATCHES[kind](text), (kind, text)
    assert found[1][-2:] == texts(engine, samplings[-2:]), "those without a structure are what they are alone"
    assert idle(engine)


def test_the_next_forward_pass_is_on_its_way_before_the_host_sees_the_token(engine, monkeypatch):
    order, forward, choose, get = [], engine.runner.start_forward, engine.runner.choose, jax.device_get
    monkeypatch.setattr(engine.runner, "start_forward", lambda *args: order.append("forward") or forward(*args))
    monkeypatch.setattr(engine.runner, "choose", lambda *args: order.append("choose") or choose(*args))
    monkeypatch.setattr(jax, "device_get", lambda tree: order.append("look") or get(tree))
    steps_of(engine, monkeypatch, 16)
    [(text, tokens, reason)] = texts(engine, [sampling("schema", top_k=40, **RANDOM)])
    assert (reason, MATCHES["schema"](text)) == ("stop", True)
    decoded = " ".join(order[order.index("forward") :])
    assert decoded.count("forward choose forward look choose forward look choose") > 0
    assert decoded.count("choose") == len(tokens) - 1, "no token is computed in vain, the first came with the prompt"


@pytest.mark.slow
def test_an_answer_goes_on_after_a_preemption_and_a_lost_store(engine):
    expected = texts(engine, [sampling("schema", **RANDOM), sampling("schema")])
    loop, events = engine.loop, [[], []]
    for one, heard in zip([sampling("schema", **RANDOM), sampling("schema")], events, strict=True):
        loop.submit(PROMPT, one, keep=False, listener=heard.append)
    while len(loop.policy.of_state(State.DECODING)) < 2:
        loop.step()
    jax.tree.map(lambda array: array.delete(), engine.runner.store)
    loop.step()
    while not loop.policy.of_state(State.DECODING):  # again, from an empty store
        loop.step()
    loop.policy._preempt(loop.policy.running[-1])
    run(loop)
    assert engine.runner.losses
    assert loop.policy.preemptions
    for heard, (text, tokens, reason) in zip(events, expected, strict=True):
        assert "".join(event.text for event in heard) == text
        assert [token for event in heard for token in event.token_ids] == tokens
        assert heard[-1].finish_reason == reason
    assert idle(engine)


def test_an_answer_is_cut_at_its_limit_or_at_a_stop_string(engine):
    whole = texts(engine, [sampling("lark")])[0][0]
    cut, stopped, at_limit = texts(
        engine,
        [
            sampling("lark", max_new_tokens=2),
            sampling("lark", stop=(" from",)),
            sampling("choice", max_new_tokens=64, ignore_eos=True),
        ],
    )
    assert whole.startswith(cut[0])
    assert (cut[2], len(cut[1])) == ("length", 2)
    assert stopped == (whole.partition(" from")[0], stopped[1], "stop")
    assert (MATCHES["choice"](at_limit[0]), at_limit[2]) == (True, "stop")


def test_an_end_token_counts_only_where_the_grammar_is_complete(engine):
    structure, [end, *_] = Structure("regex", "[0-9]{3,40}"), engine.loop.requests.end_tokens
    tokens = engine.tokenizer("123", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3
    for may_end in (True, False):
        matcher = engine.loop.requests.matcher(structure, may_end=may_end)
        ends = []
        for token in tokens:
            ends.append(bool(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[end]))
            assert matcher.accept([token]) == [token]
        assert ends == [False] * 3, "not before the third digit"
        allowed = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        assert (allowed[end], allowed.sum() > 1) == (may_end, True)
        if may_end:
            assert matcher.copy().accept([end, tokens[0]]) == [end]
        with pytest.raises(StructureError, match="does not take") if not may_end else contextlib.nullcontext():
            matcher.accept([end])


def test_what_a_mask_did_not_allow_is_a_fault_and_not_an_endless_try(engine):
    matcher = engine.loop.requests.matcher(STRUCTURES["choice"])
    [wrong] = engine.tokenizer("z", add_special_tokens=False)["input_ids"]
    with pytest.raises(StructureError, match="does not take"):
        matcher.accept([wrong])


# Regular expressions ----------------------------------------------------------------------------------------

CLASSES = [r"\d", r"\D", r"\w", r"\W", r"[\d]", r"[^\d]", r"[\W.]", r"[^\w ]", r"[\d_-]", r"[\D]", r"[\W\d]", r"a?\\d?"]
CHARACTERS = ["7", "٣", "५", "Ⅷ", "x", "é", "日", "_", "-", " ", ".", "\\d", "a\\"]


def takes(engine, structure, text):
    """Whether the text is a whole answer."""
    grammars = engine.loop.requests._grammars
    place = grammars.compiled(structure).deep_copy()
    tokens = grammars._vocabulary().encode(text.encode())
    return place.try_consume_tokens(tokens) == len(tokens) and place.is_accepting()


def in_lark(regex):
    return Structure("grammar", f'# the keeper\'s "day\nstart: rest | day // \\d/\nrest: "/" "\\\\d"\nday: /{regex}/')


@pytest.mark.parametrize("regex", CLASSES)
def test_classes_of_characters_are_of_ascii(engine, regex):
    whole = re.compile(regex, re.ASCII).fullmatch
    schema = Structure("json_schema", {"type": "string", "pattern": f"^({regex})$"})
    for text in CHARACTERS:
        expected = whole(text) is not None
        assert takes(engine, Structure("regex", regex), text) == expected, text
        assert takes(engine, schema, json.dumps(text, ensure_ascii=False)) == expected, text
        assert takes(engine, in_lark(regex), text) == expected, text
    assert takes(engine, in_lark(regex), "/\\d"), "a text is no expression"


@pytest.mark.parametrize("unit", ["\\/", '\\"', "<a", "/", '"', "/\\"])
def test_a_long_grammar_is_gone_through_once(unit):
    began = time.perf_counter()
    for start in ("/", '"', "<"):
        grammar = start + unit * (MAX_STRUCTURE_LENGTH // len(unit))
        assert lark_with_ascii_classes(grammar) == grammar
    assert time.perf_counter() - began < 2, "0.1 s, where twice as long is twice as slow"


def test_digits_of_any_script_and_white_space_can_be_asked_for(engine):
    for regex, text in ((r"\p{Nd}", "٣"), (r"\s", "\u3000"), (r"[\s\S]", "\n"), (r"[^\S]", " ")):
        assert takes(engine, Structure("regex", regex), text), regex


# What is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "kind": (lambda: Structure("xml", "a"), "structure.kind='xml'"),
    "schema": (lambda: Structure("json_schema", 5), "must be an object"),
    "no JSON": (lambda: Structure("json_schema", "{"), "no JSON"),
    "no choices": (lambda: Structure("choice", []), "list of texts"),
    "empty choice": (lambda: Structure("choice", [""]), "list of texts"),
    "many choices": (lambda: Structure("choice", ["a"] * 5000), "limit is 4096"),
    "long": (lambda: Structure("regex", "a" * 200_000), "limit is 131072"),
    "empty": (lambda: Structure("grammar", ""), "must be a text"),
    "backslash": (lambda: Structure("regex", "a\\\\\\"), "ends with a backslash"),
    "no structure": (lambda: SamplingParams(structure="regex"), "must be a Structure"),
    "tokens": (lambda: SamplingParams(structure=STRUCTURES["choice"], allowed_token_ids=(5,)), "exclude each other"),
}


@pytest.mark.parametrize(("make", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_structure_is_refused(make, says):
    with pytest.raises(InvalidRequestError, match=re.escape(says)):
        make()


NOT_EXPRESSED = {
    "type": Structure("json_schema", {"type": "strin"}),
    "uniqueItems": Structure("json_schema", {"type": "array", "uniqueItems": True}),
    "not": Structure("json_schema", {"not": {"type": "string"}}),
    "format": Structure("json_schema", {"type": "string", "format": "no such format"}),
    "reference": Structure("json_schema", {"$ref": "https://example.org/schema"}),
    "itself only": Structure("json_schema", {"$ref": "#"}),
    "no value": Structure("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
    "look-ahead": Structure("regex", "a(?=b)"),
    "bracket": Structure("regex", "(a"),
    "empty text only": Structure("regex", "()"),
    "unknown rule": Structure("grammar", "start: other"),
    "gbnf": Structure("grammar", "root ::= other"),
}


@pytest.mark.parametrize("structure", NOT_EXPRESSED.values(), ids=NOT_EXPRESSED)
def test_what_cannot_be_expressed_is_refused(engine, structure):
    with pytest.raises(StructureError, match=f"^structure of kind {structure.kind}"):
        engine.loop.submit(PROMPT, SamplingParams(structure=structure), listener=print)
    assert not engine.loop.step()


def test_a_model_without_a_tokenizer_has_no_structure(tiny):
    with pytest.raises(StructureError, match="no tokenizer"):
        tiny.generate([1, 2], sampling("regex"))


def test_a_grammar_is_compiled_once(engine, monkeypatch):
    compiled = []
    compile_ = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda *args: compiled.append(args) or compile_(*args))
    for _ in range(3):
        engine.loop.requests.matcher(Structure("json_schema", {"type": "object", "minProperties": 1}))
    assert len(compiled) == 1


# Over HTTP --------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Who keeps the observatory?"}]
TOOL_SCHEMA = {
    "type": "object",
    "properties": {"port": {"enum": ["north", "south"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["port", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": TOOL_SCHEMA}} for name in ("tide", "wind")]


def test_the_warm_up_takes_any_token(engine, monkeypatch):
    """What stands in for tokens while programs are compiled ahead is in no grammar."""
    wish, runner = sampling("regex"), engine.loop.runner
    zero = Sampled(np.zeros((2, 1), np.int32), None)
    monkeypatch.setattr(runner, "choose", lambda scores, state, allowed: (state, zero))
    warmup._decode(engine.loop, 2, wish)


class Note(BaseModel):
    name: str = Field(max_length=8)  # this model's texts would not end
    age: int = Field(ge=0, le=150)
    tags: list[Literal["old", "new"]] = Field(max_length=3)


@pytest.fixture(scope="module")
def live(engine):
    with live_server(engine) as live:
        yield live


@pytest.fixture
def client(live):
    return live.client()


def ask(client, **options):
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 120, "temperature": 0} | options
    return client.chat.completions.create(**options)


FIELDS = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "note", "schema": NOTE}}},
    "json": {"extra_body": {"structured_outputs": {"json": NOTE}}},
    "guided json": {"extra_body": {"guided_json": json.dumps(NOTE)}},
    "regex": {"extra_body": {"structured_outputs": {"regex": r"\d{3}-[a-z]{2,5}"}}},
    "choice": {"extra_body": {"guided_choice": ["yes", "no", "not yet"]}},
    "gbnf": {"extra_body": {"guided_grammar": 'root ::= "a" [0-9] [0-9] | "b" root'}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "fields"), FIELDS.items(), ids=FIELDS)
def test_every_field_gives_its_structure(client, name, fields, stream):
    answer = ask(client, stream=stream, **fields)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert reason == "stop"
    assert MATCHES["schema" if "json" in name else name](text), text


def test_any_object_is_json_as_far_as_it_comes(client):
    choice = ask(client, response_format={"type": "json_object"}, n=2, temperature=1, max_tokens=40).choices
    for each in choice:
        assert each.message.content.startswith("{")
        assert each.finish_reason == "length" or isinstance(json.loads(each.message.content), dict)


def test_a_pydantic_model_is_parsed(client):
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 120, "temperature": 0}
    found = client.chat.completions.parse(response_format=Note, **options)
    assert isinstance(found.choices[0].message.parsed, Note)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "wind"])
def test_a_call_is_forced(client, choice, stream):
    named = {"type": "function", "function": {"name": choice}}
    options = {"tools": TOOLS, "tool_choice": choice if choice == "required" else named, "parallel_tool_calls": False}
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "temperature": 1, "seed": 3} | options
    if stream:
        with client.chat.completions.stream(**options) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**options)
    [answer] = answer.choices
    [call] = answer.message.tool_calls
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert call.function.name in (["tide", "wind"] if choice == "required" else ["wind"])
    assert jsonschema_rs.is_valid(TOOL_SCHEMA, json.loads(call.function.arguments))
    assert not answer.message.content


WRONG = {
    "schema is missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}},
        "response_format.json_schema.schema",
        "strin",
    ),
    "unsupported": ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    "regex": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
    "two": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "exclude each other"),
    "two options": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "exclude"),
    "function": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "no function 'x'",
    ),
    "arguments": (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
        "not",
    ),
}


@pytest.mark.parametrize(("fields", "param", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named(live, fields, param, says):
    with live.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 4} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
