"""Structures that begin later: behind a thought, and at the mark of a call in an answer that need not call."""

import json

import jax
import jsonschema_rs
import numpy as np
import pytest
from conftest import idle, run
from live import MODEL, live_server, make_engine
from marked import marked_engine
from test_structure import CHAT, NOTE, PROMPT, TOOL_SCHEMA, steps_of
from test_thoughts import QWEN3, R1, with_template

from sparsex_jax import Behind, InvalidRequestError, Lazy, SamplingParams, Structure, StructureError
from sparsex_jax.scheduler.sequence import State
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.intake import Intake
from sparsex_jax.serving.schemas import ChatRequest
from sparsex_jax.serving.tools import reader_of
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


def write(engine, matcher, text):
    """Take the tokens of a text as a model would choose them of those that are allowed, and return what they say."""
    said = ""
    for _ in text:
        left = text[len(said) :]
        if not left or not text.startswith(said):
            break
        begun = [ids(engine, left[:length])[0] for length in range(min(len(left), 20), 0, -1)]
        taken = matcher.accept(
            [matcher.forced[0] if matcher.forced else next(i for i in begun if i not in barred(matcher))]
        )
        said += engine.tokenizer.decode(taken)
    return said


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


# What a request makes of it ---------------------------------------------------------------------------------

SHOWS = "{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
MISTRAL = SHOWS + "{# [THINK] [/THINK] [TOOL_CALLS] #}"
UNKNOWN = SHOWS + "{# calls are written as nobody knows #}"
TIDE_CALL = '{"name": "tide", "arguments": {"port": "north", "days": 3}}'


@pytest.fixture(scope="module")
def plain():
    return make_engine(max_num_seqs=2)


def structure_of(engine, template=None, parser="auto", **fields):
    """What the answer to a request must be, and how it thinks."""
    if template is not None:
        engine.tokenizer = with_template(engine.tokenizer, template)
    limits, request = Limits(), ChatRequest.model_validate({"messages": CHAT, "max_tokens": 99} | fields)
    intake, tenant = Intake(engine, limits, parser), Access.open(limits).tenant(None)
    [job] = intake.chat(request, tenant)
    return job.sampling.structure, intake.thinking(request, job)


@pytest.mark.parametrize(
    ("template", "parser", "behind", "thought"),
    [
        (R1, "auto", Behind("</think>"), "I think.</think>"),
        (R1 + "<think>\n", "deepseek_r1", Behind("</think>"), "I think.</think>"),
        (R1 + "<think>\n</think>\n", "deepseek_r1", None, ""),
        (SHOWS, "deepseek_r1", Behind("</think>"), "I think.</think>"),
        (MISTRAL, "auto", Behind("[/THINK]", "[THINK]"), "[THINK]I think.[/THINK]"),
        (MISTRAL, "auto", Behind("[/THINK]", "[THINK]"), ""),
        (MISTRAL + "[THINK]", "mistral", Behind("[/THINK]"), "I think.[/THINK]"),
        (MISTRAL, "none", None, ""),
    ],
)
def test_a_structure_stands_behind_the_thoughts_of_every_parser(plain, template, parser, behind, thought):
    structure, _ = structure_of(plain, template, parser, structured_outputs={"choice": WORD})
    assert structure.behind == behind
    taken, matcher = follow(plain, structure, *([thought] if thought else []), "no")
    assert ("".join(taken), matcher.done) == (thought + "no", True)


def test_a_form_of_calls_that_is_not_known_is_refused(plain):
    with pytest.raises(RequestError, match=r"^tools: calls cannot be strict, since the form") as raised:
        structure_of(plain, UNKNOWN, tools=TOOLS)
    assert (raised.value.param, raised.value.status) == ("tools", 400)
    with pytest.raises(RequestError, match=r"^tools: calls cannot be forced"):
        structure_of(plain, UNKNOWN, tools=TOOLS, tool_choice="required")
    assert structure_of(plain, UNKNOWN, tools=TOOLS, tool_choice="none")[0] is None
    assert structure_of(plain, UNKNOWN, tools=[{"type": "function", "function": {"name": "tide"}}])[0] is None


def test_beside_a_structure_of_the_whole_answer_strict_functions_change_nothing(plain):
    fields = {"response_format": {"type": "json_object"}, "tools": TOOLS}
    assert structure_of(plain, UNKNOWN, **fields)[0] == Structure("json_object")
    assert structure_of(plain, MISTRAL, **fields)[0].lazy is None


def test_strict_calls_whose_mark_is_several_tokens_of_text(plain):
    """As where a template has no tools and the vocabulary no mark of calls."""
    structure, _ = structure_of(plain, "{% for m in messages %}{{ m.content }}{% endfor %}", tools=TOOLS)
    assert structure.lazy == Lazy(("<tool_call>",), repeats=True)
    assert len(ids(plain, "<tool_call>")) > 2
    call = f"<tool_call>\n{TIDE_CALL}\n</tool_call>"
    matcher, text = plain.loop.requests.matcher(structure), f"I ask <tool twice. {call} So. {call} Yes"
    assert write(plain, matcher, text) == text
    assert not matcher.done
    taken, matcher = follow(plain, structure, "<tool_call>")
    assert taken == ["<tool_call>"]
    assert plain.tokenizer.decode(matcher.forced).startswith('\n{"name')


def test_a_list_of_calls_is_text_without_mistrals_mark_where_functions_are_strict(plain):
    for strict, is_call in ((True, False), (False, True)):
        tools = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": strict}}]
        plain.tokenizer = with_template(plain.tokenizer, MISTRAL)
        reader = reader_of(plain.tokenizer, ChatRequest(messages=CHAT, tools=tools))
        parts = reader.push(f"[{TIDE_CALL}]") + reader.finish()
        assert (parts == [f"[{TIDE_CALL}]"]) is not is_call
        marked = reader_of(plain.tokenizer, ChatRequest(messages=CHAT, tools=tools))
        [call] = marked.push(f"[TOOL_CALLS][{TIDE_CALL}]") + marked.finish()
        assert call.name == "tide"


# Over HTTP --------------------------------------------------------------------------------------------------


def ask(live, **options):
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 150, "temperature": 1, "seed": 5} | options
    return live.client().chat.completions.create(**options)


FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "note", "schema": NOTE}}}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
SOON = 7  # a bias of the end mark by which thoughts have a few tokens


def told(chunks):
    """The thought and the text of a stream, and its end."""
    chunks = list(chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    return thought, "".join(delta.content or "" for delta in deltas), chunks[-1].choices[0].finish_reason


def test_a_thought_stands_before_the_json(engine, live):
    thought, text, reason = told(ask(live, stream=True, logit_bias=bias(engine, end=SOON), **FORMAT))
    assert thought
    assert reason == "length" or jsonschema_rs.is_valid(NOTE, json.loads(text))
    assert text.startswith('{"name": "')
    assert "think>" not in thought + text


def test_a_thought_without_an_end_is_cut_and_one_that_is_off_does_not_come(live):
    [choice] = ask(live, max_tokens=6, **FORMAT).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    thought = choice.message.reasoning_content
    [choice] = ask(live, max_tokens=6, stop=[thought[4:7]], **FORMAT).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", None), "a stop string counts in thoughts too"
    assert thought.startswith(choice.message.reasoning_content)
    [choice] = ask(live, max_tokens=6, extra_body=OFF, **FORMAT).choices
    assert choice.message.content.startswith('{"name"')


def test_a_call_is_forced_behind_a_thought(engine, live):
    tool = {"name": "tide", "input_schema": TOOL_SCHEMA}
    options = {"model": MODEL, "max_tokens": 90, "messages": CHAT, "tools": [tool], "tool_choice": {"type": "any"}}
    soon = {"logit_bias": bias(engine, end=SOON), "seed": 5}
    with live.anthropic().messages.stream(**options, extra_body=soon) as stream:
        answer = stream.get_final_message()
    assert [block.type for block in answer.content][:2] == ["thinking", "tool_use"], answer
    assert jsonschema_rs.is_valid(TOOL_SCHEMA, answer.content[1].input)


@pytest.mark.slow
def test_a_thought_stands_before_the_json_of_every_protocol(engine, live):
    soon = {"logit_bias": bias(engine, end=SOON), "seed": 5}
    for choice in ask(live, n=2, logit_bias=bias(engine, end=7), **FORMAT).choices:
        assert choice.message.reasoning_content
        assert choice.finish_reason == "length" or jsonschema_rs.is_valid(NOTE, json.loads(choice.message.content))
    text = {"format": {"type": "json_schema", "name": "note", "schema": NOTE}}
    done = live.client().responses.create(model=MODEL, input=CHAT, text=text, max_output_tokens=150, extra_body=soon)
    assert [item.type for item in done.output] == ["reasoning", "message"]
    assert done.status == "incomplete" or jsonschema_rs.is_valid(NOTE, json.loads(done.output_text))
    wish = {"format": {"type": "json_schema", "schema": NOTE}}
    options = {"model": MODEL, "max_tokens": 150, "messages": CHAT, "output_config": wish}
    with live.anthropic().messages.stream(**options, extra_body=soon) as stream:
        answer = stream.get_final_message()
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.stop_reason == "max_tokens" or jsonschema_rs.is_valid(NOTE, json.loads(answer.content[1].text))
    [choice] = ask(live, tools=TOOLS, tool_choice="required", logit_bias=soon["logit_bias"]).choices
    assert choice.message.reasoning_content
    assert choice.message.tool_calls
    assert choice.message.content is None


@pytest.mark.slow
@pytest.mark.parametrize("wish", [FORMAT, {"tools": TOOLS, "tool_choice": "required"}], ids=["schema", "call"])
def test_a_store_that_is_lost_within_a_thought_changes_nothing(engine, wish):
    fields = {"logit_bias": bias(engine, end=3), "seed": 5, "temperature": 1} | wish
    structure, _ = structure_of(engine, **fields)
    sampling = SamplingParams(
        80,
        temperature=1.0,
        seed=5,
        structure=structure,
        logit_bias={int(id_): value for id_, value in fields["logit_bias"].items()},
    )
    [expected] = engine.generate_batch([PROMPT], [sampling], keep=False)
    loop, heard, losses = engine.loop, [], len(engine.runner.losses)
    loop.submit(PROMPT, sampling, keep=False, listener=heard.append)
    while not (loop.policy.of_state(State.DECODING) and heard):
        loop.step()
    assert "</think>" not in engine.tokenizer.decode([token for event in heard for token in event.token_ids])
    jax.tree.map(lambda array: array.delete(), engine.runner.store)
    run(loop)
    assert len(engine.runner.losses) > losses
    assert [token for event in heard for token in event.token_ids] == expected.token_ids
    assert idle(engine)


def calls_of(messages):
    return [call.function for message in messages for call in message.tool_calls or ()]


def strict(engine, live, seeds):
    """The messages of answers that may call strict functions, and mostly do."""
    begin = {str(engine.tokenizer.convert_tokens_to_ids("<tool_call>")): 8}
    asked = [ask(live, tools=TOOLS, seed=seed, logit_bias=begin, extra_body=OFF, max_tokens=80) for seed in seeds]
    messages = [answer.choices[0].message for answer in asked]
    for call in calls_of(messages):
        schema = TOOL_SCHEMA if call.name == "tide" else {"maxProperties": 0}
        assert jsonschema_rs.is_valid(schema, json.loads(call.arguments)), call
    assert not any("<tool_call>" in (message.content or "") for message in messages)
    return messages


def test_a_call_of_a_strict_function_follows_its_schema(engine, live):
    assert calls_of(strict(engine, live, [0]))


@pytest.mark.slow
def test_text_stands_before_and_between_strict_calls(engine, live):
    messages = strict(engine, live, range(6))
    assert calls_of(messages)
    assert any(message.content for message in messages)


def test_a_forced_call_that_was_cut_leaves_no_text(live):
    [choice] = ask(live, max_tokens=8, tools=TOOLS, tool_choice="required", extra_body=OFF).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("length", "", None)
