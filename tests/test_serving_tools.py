"""Tool calls: text in the form of the model's template becomes a call, and all other text stays text."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import MODEL, ScriptedLoop, live_server, make_engine

from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.tools import Call, reader_for
from sparsex_jax.serving.tools.json_calls import Hermes

SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}, "days": {"type": "array"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("tide", "wind")]
HERMES = "{% for message in messages %}{{ message.content }}{% endfor %} <tool_call> {{ tools | tojson }}"
CODER = HERMES + " <function=example> <parameter=example>"
MISTRAL = "{{ bos_token }}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS] [TOOL_CALLS]"
LLAMA = '<|start_header_id|>{{ messages[0].content }} Respond with {"name": ..., "parameters": ...}.'
TIDE = {"name": "tide", "arguments": {"port": "näh", "days": [1, 2]}}
WIND = {"name": "wind", "arguments": {}}


def tagged(call):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def plain(call):
    return json.dumps({"name": call["name"], "parameters": call["arguments"]})


def read(template, pieces, tools=TOOLS, *, cut=False):
    reader = reader_for(template, tools)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish(cut=cut)
    return "".join(part for part in parts if isinstance(part, str)), [p for p in parts if isinstance(p, Call)]


def as_call(call):
    return Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))


def function(call, *, tag=True, end="</function>"):
    """As Qwen3-Coder writes a call."""
    values = {name: v if isinstance(v, str) else json.dumps(v) for name, v in call["arguments"].items()}
    parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    body = f"<function={call['name']}>\n{parameters}{end}"
    return f"<tool_call>\n{body}\n</tool_call>" if tag else body


ONE_MORE = {"name": "tide", "arguments": {"port": "</tool_call>"}}
BROKEN_LINE = {"name": "tide", "arguments": {"port": "a\nb\tc"}}
TAGS = {"name": "tide", "arguments": {"port": "x</parameter> y </function>\n\n", "days": [3]}}
TEXT_OF_TIDE = '{"port": "n\u00e4h", "days": [1, 2]}'
MARK = "[TOOL_CALLS]"

READ = [
    (HERMES, tagged(TIDE), "", [TIDE]),
    (HERMES, f"I ask.\n\n{tagged(TIDE)}\n{tagged(WIND)} ", "I ask.", [TIDE, WIND]),
    (HERMES, f"{tagged(WIND)}\nThat is all.", "That is all.", [WIND]),
    (HERMES, "1 < 2 and <tool", "1 < 2 and <tool", []),
    (HERMES, tagged(ONE_MORE), "", [ONE_MORE]),
    (HERMES, tagged(TIDE).removesuffix("</tool_call>"), "", [TIDE]),
    (HERMES, tagged(TIDE).removesuffix("</tool_call>") + tagged(WIND), "", [TIDE, WIND]),
    (HERMES, tagged(TIDE).removesuffix("</tool_call>") + "That is all.", "That is all.", [TIDE]),
    (HERMES, tagged(TIDE).replace("\n</tool_call>", "}\n</tool_call>"), "", [TIDE]),  # one brace too many
    (HERMES, f"<think>I use <tool_call> now</think>\n{tagged(TIDE)}", "<think>I use <tool_call> now</think>", [TIDE]),
    (HERMES, '<tool_call>{"name": "tide"' + tagged(WIND), '<tool_call>{"name": "tide"', [WIND]),
    (HERMES, tagged(BROKEN_LINE).replace("\\n", "\n").replace("\\t", "\t"), "", [BROKEN_LINE]),
    (HERMES, tagged({"name": "wind", "parameters": {}}), "", [WIND]),
    (HERMES, tagged({"name": "wind"}), "", [WIND]),
    (HERMES, tagged({"name": "wind", "arguments": "{}"}), "", [WIND]),
    (CODER, function(TIDE), "", [TIDE]),
    (CODER, function(WIND), "", [WIND]),
    (CODER, f"I ask.\n\n{function(TIDE)}\n{function(WIND)} ", "I ask.", [TIDE, WIND]),
    (CODER, function(TIDE, tag=False) + "\n</tool_call>\nThat is all.", "That is all.", [TIDE]),
    (CODER, function(TAGS), "", [TAGS]),
    (CODER, function(TIDE, tag=False, end=""), "", [TIDE]),
    (CODER, "<tool_call>" + function(TIDE, tag=False, end="") + "</tool_call>" + function(WIND), "", [TIDE, WIND]),
    (CODER, f"Use <function=x> and <tool_call>: {function(WIND)}", "Use <function=x> and <tool_call>:", [WIND]),
    (CODER, tagged(TIDE), "", [TIDE]),
    (CODER, f"<function=tide>{TEXT_OF_TIDE}</function>", "", [TIDE]),
    (MISTRAL, f"{MARK} {json.dumps([TIDE, WIND])}", "", [TIDE, WIND]),
    (MISTRAL, f"I ask. {MARK}{json.dumps([TIDE | {'id': 'a1b2c3d4e'}])} ", "I ask.", [TIDE]),
    (MISTRAL, f"{MARK}tide[ARGS]{TEXT_OF_TIDE}{MARK}wind[ARGS]{{}}", "", [TIDE, WIND]),
    (MISTRAL, f"{MARK}tide[CALL_ID]a1b2c3d4e[ARGS]{TEXT_OF_TIDE}", "", [TIDE]),
    (MISTRAL, f"{MARK}tide{TEXT_OF_TIDE}", "", [TIDE]),
    (MISTRAL, f" {json.dumps([TIDE])}", "", [TIDE]),
    (LLAMA, plain(TIDE), "", [TIDE]),
    (LLAMA, f"\n{plain(TIDE)}; {plain(WIND)}", "", [TIDE, WIND]),
    (LLAMA, "The tide is high.", "The tide is high.", []),
    (LLAMA, json.dumps(TIDE), "", [TIDE]),
    (LLAMA, f"<|python_tag|>{plain(TIDE)}; {plain(WIND)}", "", [TIDE, WIND]),
    (LLAMA, f"I ask. <|python_tag|>{plain(TIDE)}", "I ask.", [TIDE]),
]
TEXT = [
    (HERMES, '<tool_call>{"name": "tide", "arguments": {}'),  # no end
    (HERMES, "<tool_call>\n{nope}\n</tool_call> "),
    (HERMES, '<tool_call>{"name": "tide", "arguments": {"x": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "tide", "arguments": {"x": 1e400}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "tide", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "tide", "arguments": "x"}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["tide"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "storm", "arguments": {}}</tool_call>'),  # was not offered
    (HERMES, "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    (HERMES, '<tool_call>{"name": "tide", "arguments": {"x": ' + "[" * 100_000 + "</tool_call>"),
    (CODER, "<tool_call>\n<function=storm>\n</function>\n</tool_call>"),
    (CODER, "<tool_call>\n<function=tide>\n<parameter=port>\nnorth"),
    (CODER, "<function=tide> is what I use"),
    (CODER, "<function=" + "x" * 300),
    (MISTRAL, f"{MARK} I hope"),
    (MISTRAL, f"{MARK} []"),
    (MISTRAL, f"{MARK}storm{{}}"),
    (MISTRAL, f"{MARK} {json.dumps([TIDE, 1])}"),
    (MISTRAL, f"{json.dumps([TIDE])} I hope"),
    (MISTRAL, "[1] is a footnote"),
    (LLAMA, plain(TIDE) + " I hope"),
    (LLAMA, plain(TIDE) + " " + plain(WIND)),
    (LLAMA, '{"name": "storm", "parameters": {}}'),
    (LLAMA, '{"tide": 4}'),
    (LLAMA, f"So: {plain(TIDE)}"),
    (LLAMA, "<|python_tag|>print(1)"),
    (LLAMA, " "),
]


@pytest.mark.parametrize(("template", "answer", "text", "calls"), READ, ids=range(len(READ)))
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_calls_are_read_from_pieces_of_any_size(template, answer, text, calls, size):
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert read(template, pieces) == (text, [as_call(call) for call in calls])


STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
CUT = [
    (HERMES, TOOLS, f"I ask.\n\n{tagged(TIDE)}\n{tagged(WIND)}"),
    (CODER, TOOLS, f"I ask.\n\n{function(TIDE)}\n{function(WIND)}"),
    (CODER, STRICT, f"I ask.\n\n{function(TIDE, tag=False)}\n{function(WIND, tag=False)}"),
    (MISTRAL, TOOLS, f"I ask.{MARK} {json.dumps([TIDE, WIND])}"),
    (MISTRAL, STRICT, f"I ask.{MARK}tide{TEXT_OF_TIDE}{MARK}wind[ARGS]{{}}"),
    (LLAMA, TOOLS, f"I ask.<|python_tag|>{plain(TIDE)}; {plain(WIND)}"),
    (LLAMA, STRICT, f"{plain(TIDE)}; {plain(WIND)}"),
]


@pytest.mark.parametrize(("template", "tools", "answer"), CUT, ids=range(len(CUT)))
def test_nothing_is_told_of_a_call_that_is_cut_and_all_of_those_before_it(template, tools, answer):
    calls, most = [as_call(TIDE), as_call(WIND)], 0
    for length in range(1, len(answer) + 1):
        text, told = read(template, [answer[:length]], tools, cut=True)
        assert "I ask.".startswith(text.rstrip("<[").rstrip()), text
        assert told == calls[: len(told)]
        assert len(told) >= most, "a call that was whole is lost"
        most = len(told)
    assert most == 2


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (HERMES, "I like <b"),
        (HERMES, "<tool_call> is the mark of"),
        (HERMES, '<tool_call>{"name": "storm", "arguments": {}}'),
        (MISTRAL, "[1, 2"),
        (LLAMA, '{"tide": [4'),
    ],
)
def test_other_text_that_is_cut_stays_text(template, answer):
    assert read(template, [answer], cut=True) == (answer, [])


@pytest.mark.parametrize(("template", "answer"), TEXT, ids=range(len(TEXT)))
def test_other_text_stays_text(template, answer):
    assert read(template, [answer[:20], answer[20:]]) == (answer, [])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({}, "5", "5"),
        ({"type": "string"}, "5", "5"),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, "0.5", 0.5),
        ({"type": "boolean"}, "True", True),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"type": "array"}, '["a",\n1]', ["a", 1]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "integer"}, "five", "five"),
        ({"type": 5, "anyOf": 5}, "5", "5"),
    ],
)
def test_values_between_tags_have_the_types_of_the_tools_schema(schema, text, value):
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    reader = reader_for(CODER, tools)
    call = f"<tool_call><function=f><parameter=x>\n{text}\n</parameter></function></tool_call>"
    assert reader.push(call) + reader.finish() == [Call("f", json.dumps({"x": value}))]


def test_half_a_surrogate_pair_is_escaped():
    reader = reader_for(HERMES, TOOLS)
    (call,) = reader.push('<tool_call>{"name": "wind", "arguments": {"x": "\\ud800"}}</tool_call>') + reader.finish()
    assert call.arguments == '{"x": "\\ud800"}'


def test_a_long_call_in_small_pieces_is_not_read_again_for_each_of_them(monkeypatch):
    reads, read_once = [], Hermes.read
    monkeypatch.setattr(Hermes, "read", lambda *args, **options: reads.append(1) or read_once(*args, **options))
    call = {"name": "tide", "arguments": {"port": "x" * 50_000}}
    assert read(HERMES, tagged(call)) == ("", [as_call(call)])
    assert len(reads) < 200


@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "<tool_",
                "call>",
                "{",
                "}",
                '"',
                "[",
                "]",
                "x ",
                "\n",
                plain(WIND),
                MARK,
                "<function=wind>",
                "</function>",
                "<parameter=x>",
                "</parameter>",
                "<|python_tag|>",
                ";",
            ]
        )
    )
)
def test_text_is_neither_lost_nor_changed(pieces):
    for template in (HERMES, LLAMA, MISTRAL, CODER):
        text, calls = read(template, pieces)
        assert calls or text == "".join(pieces)
        assert read(template, "".join(pieces)) == read(template, ["".join(pieces)]) == (text, calls)


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
