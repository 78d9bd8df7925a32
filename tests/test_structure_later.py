"""Structures that begin later: behind a thought, and at the mark of a call in an answer that need not call."""

import json

import jsonschema_rs
import numpy as np
import pytest
from conftest import idle, run
from live import MODEL, live_server
from marked import marked_engine
from test_structure import CHAT, NOTE, PROMPT, TOOL_SCHEMA, steps_of
from test_thoughts import QWEN3

from sparsex_jax import Behind, InvalidRequestError, Lazy, SamplingParams, Structure, StructureError
from sparsex_jax.scheduler.sequence import State
from sparsex_jax.text.thoughts import PARSERS

OPENED = QWEN3.replace("</think>\\n\\n' }}", "</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}")
WORD = ("yes", "no")
BEHIND = Structure("choice", WORD, Behind("</think>"))
MAY_OPEN = Structure("choice", WORD, Behind("</think>", "<think>"))
NUMBERS = Structure("regex", "a[0-9]{3,5}", lazy=Lazy(("a",), repeats=True))
TOOLS = [
    {"type": "function", "function": {"name": "tide", "parameters": TOOL_SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]


@pytest.fixture(scope="module")
def engine():
    return marked_engine(OPENED, "<think>", "</think>", "<tool_call>", "</tool_call>", max_num_seqs=2)


@pytest.fixture(scope="module")
def live(engine):
    with live_server(engine) as live:
        yield live


def ids(engine, text):
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def bias(engine, **marks):
    return {str(engine.tokenizer.convert_tokens_to_ids(f"<{'/' * (n == 'end')}think>")): b for n, b in marks.items()}


def follow(engine, structure, *texts):
    """What is taken of each text in turn, and the matcher."""
    matcher = engine.loop.requests.matcher(structure)
    return [engine.tokenizer.decode(matcher.accept(ids(engine, text))) for text in texts], matcher


def barred(matcher):
    """The tokens that may not come next."""
    return np.flatnonzero(~np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[:49152].astype(bool))


# Where a structure begins -----------------------------------------------------------------------------------


def test_it_begins_behind_the_mark_and_an_end_within_a_thought_becomes_the_mark(engine):
    taken, matcher = follow(engine, BEHIND, "I think", " so.</think>yes")
    assert (taken, matcher.done) == (["I think", " so.</think>yes"], True)
    taken, matcher = follow(engine, BEHIND, "I think<|im_end|>")
    assert (taken, list(matcher.forced)) == (["I think"], ids(engine, "</think>"))
    assert barred(engine.loop.requests.matcher(BEHIND)).tolist() == sorted(engine.loop.requests.end_tokens)
    assert not len(barred(follow(engine, BEHIND, "I think")[1]))


def test_a_thought_may_come_or_not(engine):
    for text, free, done in (("<think>", True, False), ("yes", False, True)):
        taken, matcher = follow(engine, MAY_OPEN, text)
        assert (taken, not len(barred(matcher)), matcher.done) == ([text], free, done)


def test_a_token_that_goes_on_behind_a_mark_as_the_grammar_does_not_is_replaced(engine):
    structure = Structure("grammar", 'start: "{\\"a\\": " /[0-9]/ "}"', lazy=Lazy(first=("{",)))
    taken, matcher = follow(engine, structure, '{"')
    assert (taken, engine.tokenizer.decode(matcher.forced)) == (['{"'], 'a": ')
    taken, matcher = follow(engine, structure, "\n", "{}")
    assert (taken, engine.tokenizer.decode(matcher.forced)) == (["\n", ""], '{"a": ')
    assert not len(barred(follow(engine, structure, "So {}")[1])), "not at the beginning"


@pytest.mark.slow
def test_answers_do_not_depend_on_the_tokens_of_a_dispatch_nor_on_preemption(engine, monkeypatch):
    options = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.97, "logprobs": 1}
    end = {int(id_): value for id_, value in bias(engine, end=8).items()}
    samplings = [SamplingParams(seed=3, structure=NUMBERS, **options)]
    samplings += [SamplingParams(seed=5, structure=BEHIND, logit_bias=end, **options)]
    found = []
    for steps in (1, 16):
        steps_of(engine, monkeypatch, steps)
        outs = engine.generate_batch([PROMPT] * 2, samplings, keep=False)
        found.append([(out.token_ids, out.finish_reason, out.logprobs) for out in outs])
    assert [one[:2] for one in found[0]] == [one[:2] for one in found[1]]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose([t.logprob for t in one[2]], [t.logprob for t in other[2]], atol=1e-4)
    assert engine.tokenizer.decode(found[0][1][0]).partition("</think>")[2] in WORD
    loop, heard = engine.loop, []
    steps_of(engine, monkeypatch, 2)
    loop.submit(PROMPT, samplings[1], keep=False, listener=heard.append)
    while not loop.policy.of_state(State.DECODING):
        loop.step()
    loop.policy._preempt(loop.policy.running[-1])
    run(loop)
    assert [token for event in heard for token in event.token_ids] == found[0][1][0]
    assert idle(engine)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Behind(""), "structure.behind.end"),
        (lambda: Lazy(), "structure.lazy has 0 marks"),
        (lambda: Structure("choice", WORD, lazy="a"), "must be a Lazy"),
        (lambda: Structure("choice", WORD, behind="a"), "must be a Behind"),
    ],
)
def test_what_is_no_mark_is_refused(make, says):
    with pytest.raises(InvalidRequestError, match=says):
        make()


def test_a_mark_that_the_grammar_does_not_begin_with_is_refused(engine):
    with pytest.raises(StructureError, match="does not begin with it"):
        engine.loop.requests.matcher(Structure("choice", WORD, lazy=Lazy(("maybe",))))


def test_the_prompt_says_whether_a_thought_may_stand_before_a_structure():
    form = PARSERS["qwen3"]
    assert form.behind("<think>\n") == Behind("</think>")
    assert form.behind("assistant\n") == Behind("</think>", "<think>")
    assert form.behind("<think>\n\n</think>\n\n") is None
    assert form.behind("So", "So") is None


# Over HTTP --------------------------------------------------------------------------------------------------


def ask(live, **options):
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 150, "temperature": 1, "seed": 5} | options
    return live.client().chat.completions.create(**options)


FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "note", "schema": NOTE}}}


def test_a_thought_stands_before_the_json(engine, live):
    for choice in ask(live, n=2, logit_bias=bias(engine, end=7), **FORMAT).choices:
        assert choice.message.reasoning_content
        assert choice.finish_reason == "length" or jsonschema_rs.is_valid(NOTE, json.loads(choice.message.content))
    deltas = [chunk.choices[0].delta for chunk in ask(live, stream=True, logit_bias=bias(engine, end=7), **FORMAT)]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    text = "".join(delta.content or "" for delta in deltas)
    assert thought
    assert text.startswith('{"name": "')
    assert "think>" not in thought + text


def test_a_thought_without_an_end_is_cut_and_one_that_is_off_does_not_come(live):
    [choice] = ask(live, max_tokens=6, **FORMAT).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    [choice] = ask(live, max_tokens=6, extra_body=off, **FORMAT).choices
    assert choice.message.content.startswith('{"name"')


def test_a_call_is_forced_behind_a_thought_for_either_protocol(engine, live):
    [choice] = ask(live, tools=TOOLS, tool_choice="required", logit_bias=bias(engine, end=7)).choices
    assert choice.message.reasoning_content
    assert choice.message.tool_calls
    assert choice.message.content is None
    tool = {"name": "tide", "input_schema": TOOL_SCHEMA}
    body = {"model": MODEL, "max_tokens": 150, "messages": CHAT, "tools": [tool], "seed": 5}
    body |= {"tool_choice": {"type": "any"}, "logit_bias": bias(engine, end=7)}
    with live.http() as http:
        blocks = http.post("/v1/messages", json=body | {"thinking": {"type": "enabled", "budget_tokens": 1024}}).json()
    assert [block["type"] for block in blocks["content"]][:2] == ["thinking", "tool_use"], blocks
    assert jsonschema_rs.is_valid(TOOL_SCHEMA, blocks["content"][1]["input"])


def test_a_call_of_a_strict_function_follows_its_schema(engine, live):
    begin = {str(engine.tokenizer.convert_tokens_to_ids("<tool_call>")): 5}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    messages = [ask(live, tools=TOOLS, seed=s, logit_bias=begin, extra_body=off).choices[0].message for s in range(4)]
    calls = [call.function for message in messages for call in message.tool_calls or ()]
    assert calls
    for call in calls:
        schema = TOOL_SCHEMA if call.name == "tide" else {"maxProperties": 0}
        assert jsonschema_rs.is_valid(schema, json.loads(call.arguments)), call
    assert any(message.content for message in messages), "text stands before and between calls"


def test_a_forced_call_that_was_cut_leaves_no_text(live):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    [choice] = ask(live, max_tokens=8, tools=TOOLS, tool_choice="required", extra_body=off).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("length", "", None)
