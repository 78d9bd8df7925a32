"""A thousand random JSON schemas: every answer that ends is of its schema, and those that are cut say so."""

import json
import random
import re
from collections import Counter

import jsonschema_rs
import pytest
from live import make_engine

from sparsex_jax import SamplingParams, Structure, StructureError
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.scheduler import warmup

NAMES = ["name", "age", "näh", "a b", 'quo"te', "x", "_id", "price", "tags", "日"]
PATTERNS = ["^[a-c]{1,4}$", "^[A-Z][a-z]{0,3}$", r"^\d{2}-\d{2}$", "^(yes|no)$", "^x"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
WORDS = ["red", "näh", "two words", "", "\n", '"', "日本", "\\"]
LEAP_SECOND = re.compile(r"(?<=:[0-5]\d):60(?=(\.\d+)?([zZ]|[+-]\d\d:))")
NOT_SUPPORTED = [{"uniqueItems": True}, {"not": {"type": "null"}}, {"contains": {"const": 1}}, {"if": True, "then": {}}]


def schema_of(rng, depth=0):
    """A random schema. Most are bounded, so that a model which says nothing sensible comes to their end."""
    makers = [null_, boolean, integer, number, string, text_of_form, enum, const]
    if depth < 3:
        makers += [array, array, object_, object_, object_, any_of, one_of, types, all_of]
    return rng.choice(makers)(rng, depth)


def null_(rng, depth):
    return {"type": "null"}


def boolean(rng, depth):
    return {"type": "boolean"}


def integer(rng, depth):
    low = rng.randint(-1000, 1000)
    bounds = [{}, {"minimum": low}, {"minimum": low, "maximum": low + rng.randint(0, 500)}, {"exclusiveMaximum": low}]
    return {"type": "integer"} | rng.choice(
        [*bounds, {"minimum": 0, "maximum": 99, "multipleOf": rng.choice([2, 5, 7])}]
    )


def number(rng, depth):
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number"} | rng.choice([{}, {"minimum": low, "maximum": low + 3.5}, {"exclusiveMinimum": low}])


def string(rng, depth):
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def text_of_form(rng, depth):
    return {"type": "string"} | rng.choice([{"pattern": rng.choice(PATTERNS)}, {"format": rng.choice(FORMATS)}])


def value(rng):
    return rng.choice([None, True, 0, -17, 2.5, 1e20, *WORDS, [1, "a"], {"a": [None]}, []])


def enum(rng, depth):
    return {"enum": [value(rng) for _ in range(rng.randint(1, 4))]}


def const(rng, depth):
    return {"const": value(rng)}


def array(rng, depth):
    least = rng.randint(0, 2)
    limits = {"minItems": least, "maxItems": least + rng.randint(0, 3)}
    if rng.random() < 0.3:
        items = [schema_of(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}
    return {"type": "array", "items": schema_of(rng, depth + 1)} | limits


def object_(rng, depth):
    names = rng.sample(NAMES, rng.randint(0, 4))
    made = {"type": "object", "properties": {name: schema_of(rng, depth + 1) for name in names}}
    made["required"] = [name for name in names if rng.random() < 0.7]
    made["additionalProperties"] = rng.choice([False, False, False, schema_of(rng, depth + 2)])
    if rng.random() < 0.15:
        made["patternProperties"] = {"^p[0-9]$": schema_of(rng, depth + 1)}
    if rng.random() < 0.15:
        made["maxProperties"] = max(len(made["required"]), 1) + 1
    return made


def any_of(rng, depth):
    return {"anyOf": [schema_of(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def one_of(rng, depth):
    return {"oneOf": [string(rng, depth), integer(rng, depth), null_(rng, depth)]}


def types(rng, depth):
    return {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "maxLength": 5}


def all_of(rng, depth):
    return {"allOf": [object_(rng, depth + 1), {"type": "object", "properties": {"more": schema_of(rng, depth + 2)}}]}


def recursive(rng):
    node = {
        "type": "object",
        "properties": {"v": integer(rng, 3), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    }
    return {
        "$ref": "#/$defs/node",
        "$defs": {"node": node | {"required": ["v", "next"], "additionalProperties": False}},
    }


def schemas(number):
    rng = random.Random(20)
    return [recursive(rng) if at % 25 == 0 else schema_of(rng) for at in range(number)]


def as_float(text):
    """JSON has numbers that no float holds; they are as good as the largest one."""
    return min(max(float(text), -1e308), 1e308)


def is_of(schema, text):
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    validator = jsonschema_rs.validator_for(draft | schema, validate_formats=True)
    text = LEAP_SECOND.sub(":59", text)  # RFC 3339 has them, and the validator those only that there were
    return validator.is_valid(json.loads(text, parse_float=as_float))


def answers(engine, number, tokens=160):
    """What became of random schemas, and the answers that are wrong."""
    found, wrong, asked = Counter(), [], []
    for seed, schema in enumerate(schemas(number)):
        structure = Structure("json_schema", schema)
        try:
            engine.loop.requests.matcher(structure)
        except StructureError as error:
            found[f"refused: {str(error)[:80]}"] += 1
            continue
        temperature = (0.0, 0.7, 1.0, 2.0)[seed % 4]
        asked.append((schema, SamplingParams(tokens, temperature=temperature, seed=seed, structure=structure)))
    outs = engine.generate_batch(["JSON:"] * len(asked), [sampling for _, sampling in asked], keep=False)
    for (schema, _), out in zip(asked, outs, strict=True):
        found[out.finish_reason] += 1
        ok = out.finish_reason == "stop" and is_of(schema, out.text)
        if not (ok or (out.finish_reason == "length" and len(out.token_ids) == tokens)):
            wrong.append((schema, out.finish_reason, out.text))
    return found, wrong


def test_answers_to_random_schemas_are_of_them():
    found, wrong = answers(make_engine(max_num_seqs=2), 12, 40)
    assert not wrong, wrong[:3]
    assert found["stop"] > 5


@pytest.mark.slow
def test_answers_to_a_thousand_random_schemas_are_of_them(record_property):
    found, wrong = answers(make_engine(max_num_seqs=8), 1000)
    print(found, len(wrong), "wrong")
    record_property("found", dict(found))
    assert not wrong, wrong[:3]
    assert found["stop"] > 800
    assert found["stop"] + found["length"] > 900


@pytest.mark.parametrize("more", NOT_SUPPORTED, ids=[next(iter(more)) for more in NOT_SUPPORTED])
def test_what_is_not_supported_is_refused_wherever_it_stands(more):
    requests = make_engine(max_num_seqs=2).loop.requests
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "array", **more}}}}
    with pytest.raises(StructureError):
        requests.matcher(Structure("json_schema", schema))


@pytest.mark.slow
def test_requests_with_and_without_a_structure_compile_nothing_after_the_warm_up():
    engine = make_engine(max_num_seqs=3, store_tokens=2048)
    for step in warmup.steps(engine.loop):
        step()
    warm = num_compilations()
    structures = [Structure("json_schema", schema) for schema in ({"type": "integer"}, {"enum": ["a", "b"]})]
    for number in range(1, 7):
        options = [{"temperature": 0.5 * (at % 3), "seed": at, "top_k": 9 * (at % 2)} for at in range(number)]
        samplings = [
            SamplingParams(9, structure=[None, *structures][at % 3], **each) for at, each in enumerate(options)
        ]
        engine.generate_batch([f"Number {at}" for at in range(number)], samplings)
    assert num_compilations() == warm
