"""Tool calls: text in the form of the model's template becomes a call, and all other text stays text."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import MODEL, ScriptedLoop, live_server, make_engine

from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.tools import Call, reader_for

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("tide", "wind")
]
HERMES = "{% for message in messages %}{{ message.content }}{% endfor %} <tool_call> {{ tools | tojson }}"
LLAMA = '<|start_header_id|>{{ messages[0].content }} Respond with {"name": ..., "parameters": ...}.'
TIDE = {"name": "tide", "arguments": {"port": "näh", "days": [1, 2]}}
WIND = {"name": "wind", "arguments": {}}


def tagged(call):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def plain(call):
    return json.dumps({"name": call["name"], "parameters": call["arguments"]})


def read(template, pieces):
    reader = reader_for(template, TOOLS)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    return "".join(part for part in parts if isinstance(part, str)), [p for p in parts if isinstance(p, Call)]


def as_call(call):
    return Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))


READ = [
    (HERMES, tagged(TIDE), "", [TIDE]),
    (HERMES, f"I ask.\n\n{tagged(TIDE)}\n{tagged(WIND)} ", "I ask.", [TIDE, WIND]),
    (HERMES, f"{tagged(WIND)}\nThat is all.", "That is all.", [WIND]),
    (HERMES, "1 < 2 and <tool", "1 < 2 and <tool", []),
    (LLAMA, plain(TIDE), "", [TIDE]),
    (LLAMA, f"\n{plain(TIDE)}; {plain(WIND)}", "", [TIDE, WIND]),
    (LLAMA, "The tide is high.", "The tide is high.", []),
]
TEXT = [
    (HERMES, '<tool_call>{"name": "tide", "arguments": {}}'),  # no end
    (HERMES, "<tool_call>\n{nope}\n</tool_call> "),
    (HERMES, '<tool_call>{"name": "tide", "arguments": {"x": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "tide", "arguments": "x"}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["tide"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "storm", "arguments": {}}</tool_call>'),  # was not offered
    (HERMES, "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    (LLAMA, plain(TIDE) + " I hope"),
    (LLAMA, plain(TIDE) + " " + plain(WIND)),
    (LLAMA, '{"name": "storm", "parameters": {}}'),
    (LLAMA, '{"tide": 4}'),
    (LLAMA, f"So: {plain(TIDE)}"),
    (LLAMA, " "),
]


@pytest.mark.parametrize(("template", "answer", "text", "calls"), READ, ids=range(len(READ)))
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_read_from_pieces_of_any_size(template, answer, text, calls, size):
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert read(template, pieces) == (text, [as_call(call) for call in calls])


@pytest.mark.parametrize(("template", "answer"), TEXT, ids=range(len(TEXT)))
def test_other_text_stays_text(template, answer):
    assert read(template, [answer[:20], answer[20:]]) == (answer, [])


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<tool_", "call>", "{", "x ", "\n", plain(WIND)])))
def test_text_is_neither_lost_nor_changed(pieces):
    for template in (HERMES, LLAMA):
        text, calls = read(template, pieces)
        assert calls or text == "".join(pieces)


@pytest.mark.parametrize(
    ("template", "tools"),
    [(HERMES, []), (HERMES, [{}, {"function": {"name": 5}}]), ("{{ messages }}", TOOLS), (None, TOOLS)],
)
def test_there_is_no_reader_without_tools_or_a_known_form(template, tools):
    assert reader_for(template, tools) is None


# Over HTTP --------------------------------------------------------------------------------------------------

ANSWER = f"I ask.\n{tagged(TIDE)}\n{tagged(WIND)}"


@pytest.fixture(scope="module")
def client():
    """A server with a Hermes template whose model always answers the same, a few characters at a time."""
    engine = make_engine()
    engine.tokenizer = copy.copy(engine.tokenizer)
    engine.tokenizer.chat_template = HERMES
    pieces = [ANSWER[at : at + 7] for at in range(0, len(ANSWER), 7)]
    script = [Event(piece, (1,)) for piece in pieces] + [Event("", (2,), finish_reason="stop")]
    with live_server(engine, loop=ScriptedLoop(lambda _: script)) as live:
        yield live.client()


def ask(client, **options):
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Tide?"}], **options)


def functions(calls):
    return [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls]


def test_a_whole_answer_has_the_calls(client):
    choice = ask(client, tools=TOOLS).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I ask.")
    assert functions(choice.message.tool_calls) == [TIDE, WIND]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_stream_has_the_calls(client):
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Tide?"}], tools=TOOLS
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I ask.")
    assert functions(choice.message.tool_calls) == [TIDE, WIND]


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_tools_gets_text(client, options, stream):
    answer = ask(client, stream=stream, **options)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        content, calls = "".join(choice.delta.content or "" for choice in choices), choices[-1].delta.tool_calls
    else:
        choices = answer.choices
        content, calls = choices[0].message.content, choices[0].message.tool_calls
    assert (content, calls, choices[-1].finish_reason) == (ANSWER, None, "stop")
