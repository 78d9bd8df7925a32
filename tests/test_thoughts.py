"""Thoughts: told apart from the answer however the text comes, counted, and shown again as the template wants them."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import MODEL, ScriptedLoop, live_server, make_engine
from test_serving_tools import TIDE, TOOLS, functions, tagged

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.thoughts import Thinking, Thought, ThoughtReader
from sparsex_jax.serving.tools import Call, reader_for
from sparsex_jax.text.chat import Chat, render
from sparsex_jax.text.templates import template_for
from sparsex_jax.text.thoughts import PARSERS, form_for, thought_field

QWEN, DEEPSEEK = PARSERS["qwen3"], PARSERS["deepseek_r1"]
CALL = tagged(TIDE)


def read(pieces, *, is_open=False, form=QWEN, tools=False):
    """The thought, the text and the calls of an answer that comes in pieces."""
    reader = ThoughtReader(Thinking(form, is_open), lambda: reader_for(CALL, TOOLS) if tools else None)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    return thought, "".join(p for p in parts if isinstance(p, str)), [p.name for p in parts if isinstance(p, Call)]


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nWhy?\n</think>\n\nSo.", False, ("Why?", "So.")),
        ("\n<think>Why?</think>So.", False, ("Why?", "So.")),
        ("Why?\n</think>\n\nSo.", True, ("Why?", "So.")),
        ("<think>\nWhy?</think>So.", True, ("Why?", "So.")),  # the mark that the prompt has, once more
        ("<think>\n\n</think>\n\nSo.", False, ("", "So.")),
        ("<think>\nWhy? </thi", False, ("Why? </thi", "")),  # cut off
        ("Why? ", True, ("Why?", "")),
        (" So. <think>no</think>", False, ("", " So. <think>no</think>")),
        ("So </think> it is.", False, ("", "So </think> it is.")),
        ("a < b </b></think>c <think> d", True, ("a < b </b>", "c <think> d")),
        ("", True, ("", "")),
        ("<thi", False, ("", "<thi")),
    ],
)
def test_a_thought_is_told_from_the_answer_however_the_text_is_cut(text, is_open, expected):
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]
    assert {read(pieces, is_open=is_open)[:2] for pieces in cuts} == {expected}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<think>Ask.</think>\n{CALL}", ("Ask.", "", ["tide"])),
        (f"<think>Ask.\n{CALL}", ("Ask.", "", ["tide"])),  # models forget the end mark
        (f"<think>Ask.\n{CALL}\nThen.", ("Ask.", "Then.", ["tide"])),
        (f"<think>Say {CALL} or not.</think>No.", (f"Say {CALL} or not.", "No.", [])),  # a call that is considered
        (f"<think>Say {CALL} or not.</think>{CALL}", (f"Say {CALL} or not.", "", ["tide"])),
        ("<think>The <tool_call> tag.</think>So.", ("The <tool_call> tag.", "So.", [])),
        ("<think>The <tool_call> tag", ("The <tool_call> tag", "", [])),
    ],
)
def test_calls_behind_a_thought_and_in_one_without_an_end(text, expected):
    assert read([text], tools=True) == read(list(text), tools=True) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/think>", "x", " ", "\n", CALL, CALL[:20]])), st.booleans()
)
def test_no_piece_is_lost_or_told_twice(pieces, is_open):
    for tools in (False, True):
        whole = read(["".join(pieces)], is_open=is_open, tools=tools)
        assert (
            read(pieces, is_open=is_open, tools=tools) == read("".join(pieces), is_open=is_open, tools=tools) == whole
        )
        if not whole[2]:
            kept = "\0".join(whole[:2]).replace("<think>", "").replace("</think>", "").replace("\0", "")
            said = "".join(pieces).replace("<think>", "").replace("</think>", "")
            assert "".join(kept.split()) == "".join(said.split())


# Prompts and templates --------------------------------------------------------------------------------------

QWEN3 = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content is string and loop.index0 > ns.last %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}{%- if tools %}{%- endif %}"""
CLOSED = "{{- '<think>\\n\\n</think>\\n\\n' }}"
OPENED = QWEN3.replace(CLOSED, CLOSED + "{%- else %}{{- '<think>\\n' }}")
R1 = """{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}
{%- else %}<\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}"""
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ASK = {"role": "user", "content": "Tide?"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_engine().tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("parser", "template", "expected"),
    [
        ("auto", QWEN3, QWEN),
        ("auto", R1, DEEPSEEK),
        ("auto", "[THINK] [/THINK]", PARSERS["mistral"]),
        ("auto", PLAIN, None),
        ("none", QWEN3, None),
        ("deepseek_r1", PLAIN, DEEPSEEK),
    ],
)
def test_the_form_is_found_in_the_template_or_named(tokenizer, parser, template, expected):
    assert form_for(parser, tokenizer, template_for(with_template(tokenizer, template))) == expected


@pytest.mark.parametrize(
    ("form", "prompt", "continued", "is_open"),
    [
        (QWEN, "assistant\n", None, False),
        (QWEN, "assistant\n<think>\n", None, True),
        (QWEN, "assistant\n<think>\n\n</think>\n\n", None, False),
        (QWEN, "user\nWhat is <think>?<|im_end|>\nassistant\n", None, False),
        (DEEPSEEK, "assistant", None, True),
        (DEEPSEEK, "assistant</think>", None, False),
        (QWEN, "a <think>So", "<think>So", True),
        (DEEPSEEK, "<think>So</think>Then", "<think>So</think>Then", False),
        (DEEPSEEK, "Then", "Then", False),
    ],
)
def test_the_prompt_says_whether_an_answer_begins_within_a_thought(form, prompt, continued, is_open):
    assert form.is_open(prompt, continued) == is_open


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (QWEN3, "<think>\nWhy?\n</think>\n\nSo."),
        (QWEN3.replace("m.reasoning_content", "m.thinking"), "<think>\nWhy?\n</think>\n\nSo."),
        (R1, "<\uff5cAssistant\uff5c>\n\nSo."),
        (PLAIN + "</think>", "assistant: <think>\nWhy?\n</think>\n\nSo."),
        (PLAIN, "assistant: So."),
    ],
)
def test_a_thought_comes_back_where_the_template_looks_for_it(tokenizer, name, template, shown):
    messages = [ASK, {"role": "assistant", "content": "So.", name: "Why?"}]
    text = render(Chat(messages, add_generation_prompt=False), with_template(tokenizer, template)).text
    assert shown in text
    assert ("Why?" in text) == ("Why?" in shown)


def test_a_thought_before_a_call_comes_back(tokenizer):
    call = {"id": "123456789", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
    thought = {"role": "assistant", "content": None, "reasoning_content": "Why?", "tool_calls": [call]}
    chat = Chat([ASK, thought, {"role": "tool", "content": "high", "tool_call_id": "123456789"}])
    assert "<think>\nWhy?\n</think>\n\n\n<tool_call>" in render(chat, with_template(tokenizer, QWEN3)).text


def test_a_thought_that_is_no_text_is_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].reasoning_content must be text"):
        render(Chat([{"role": "assistant", "content": "a", "reasoning_content": 5}]), with_template(tokenizer, QWEN3))
    assert thought_field(template_for(with_template(tokenizer, PLAIN))) is None


# Over HTTP --------------------------------------------------------------------------------------------------


class Thinker:
    """A scripted model with Qwen3's template, whose next answer is `text`, token by token.

    Attributes:
      prompts: that it got, as text.
      stopped_by: the stop string that ends the answer.
      finish_reason: how the answer ends.
      breaks: the answer ends with an error.
    """

    def __init__(self, engine):
        self.engine, self.text, self.prompts = engine, "", []
        self.stopped_by, self.finish_reason, self.breaks = None, "stop", False
        self.loop = ScriptedLoop(self._events)

    def _events(self, prompt):
        self.prompts.append(self.engine.tokenizer.decode(prompt))
        ids = self.engine.tokenizer(self.text)["input_ids"]
        pieces = [self.engine.tokenizer.decode([id_]) for id_ in ids]
        events = [Event(piece, (id_,)) for piece, id_ in zip(pieces, ids, strict=True)]
        if self.breaks:
            return [*events, Event("", (), finish_reason="error", error=RuntimeError("broken"))]
        return [*events, Event("", (2,), finish_reason=self.finish_reason, stopped_by=self.stopped_by)]


@pytest.fixture(scope="module")
def thinker():
    engine = make_engine()
    engine.tokenizer = with_template(engine.tokenizer, QWEN3)
    scripted = Thinker(engine)
    with live_server(engine, loop=scripted.loop) as live:
        scripted.live, scripted.client = live, live.client()
        yield scripted


def ask(thinker, text, **options):
    thinker.text = text
    return thinker.client.chat.completions.create(model=MODEL, messages=[ASK], **options)


def test_a_whole_answer_has_the_thought_apart(thinker):
    answer = ask(thinker, "<think>\nWhy not?\n</think>\n\nSo.")
    message = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("Why not?", "Why not?", "So.")
    number = len(thinker.engine.tokenizer("<think>\nWhy not?\n</think>")["input_ids"])
    assert abs(answer.usage.completion_tokens_details.reasoning_tokens - number) <= 2  # the first tokens of the mark


def test_a_stream_has_the_thought_apart_and_no_mark(thinker):
    text = f"<think>\nWhy not?\n</think>\n\nI ask. {CALL}"
    chunks = list(ask(thinker, text, stream=True, tools=TOOLS, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Why not?"
    assert "".join(delta.content or "" for delta in deltas) == "I ask."
    assert functions([call for delta in deltas for call in delta.tool_calls or ()]) == [TIDE]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert 3 < chunks[-1].usage.completion_tokens_details.reasoning_tokens < chunks[-1].usage.completion_tokens - 10


def test_an_answer_to_a_prompt_that_opens_the_thought(thinker, monkeypatch):
    monkeypatch.setattr(thinker.engine.tokenizer, "chat_template", OPENED)
    message = ask(thinker, "Why?\n</think>\n\nSo.").choices[0].message
    assert (message.reasoning_content, message.content) == ("Why?", "So.")
    assert thinker.prompts[-1].endswith("assistant\n<think>\n")
    message = ask(thinker, "So.", extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
    assert message.content == "So."


def test_an_answer_that_is_only_thought_has_no_content(thinker):
    message = ask(thinker, "<think>\nWhy").choices[0].message
    assert (message.reasoning_content, message.content) == ("Why", None)


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        ({}, "assistant\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "</think>\n\n"),
        ({"reasoning_effort": "none"}, "</think>\n\n"),
        ({"reasoning_effort": "medium"}, "assistant\n"),
        ({"thinking": {"type": "disabled"}}, "</think>\n\n"),
        ({"thinking": {"type": "enabled"}}, "assistant\n"),
    ],
)
def test_thinking_is_turned_off_by_any_of_its_names(thinker, body, ends):
    answer = ask(thinker, "So.", extra_body=body)
    assert answer.choices[0].message.content == "So."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert thinker.prompts[-1].endswith(ends)


@pytest.mark.parametrize(
    ("body", "content"),
    [({"include_reasoning": False}, "So."), ({"separate_reasoning": False}, "<think>Why</think>So.")],
)
def test_thoughts_are_left_out_or_left_in(thinker, body, content):
    message = ask(thinker, "<think>Why</think>So.", extra_body=body).choices[0].message
    assert (message.content, hasattr(message, "reasoning_content")) == (content, False)


def test_an_effort_that_the_template_does_not_know_is_refused(thinker):
    answer = thinker.live.http().post("/v1/chat/completions", json={"messages": [ASK], "reasoning_effort": "low"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


@pytest.mark.parametrize(
    ("parser", "thought", "content"),
    [("none", None, "Why</think>So."), ("deepseek_r1", "Why", "So."), ("qwen3", None, "Why</think>So.")],
)
def test_a_parser_may_be_named(thinker, parser, thought, content):
    with live_server(thinker.engine, loop=ScriptedLoop(thinker.loop.script), reasoning_parser=parser) as live:
        thinker.text = "Why</think>So."
        message = live.client().chat.completions.create(model=MODEL, messages=[ASK]).choices[0].message
    assert (getattr(message, "reasoning_content", None), message.content) == (thought, content)
