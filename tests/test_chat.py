"""What reaches a chat template, in which form, and what is refused because it would not reach the model."""

import json

import pytest
from conftest import tiny_engine
from test_end_tokens import make_tokenizer

from sparsex_jax import Chat, InvalidRequestError, SamplingParams, UnsupportedModelError
from sparsex_jax.text.chat import render, shows_tools
from sparsex_jax.text.templates import gguf_templates, legacy_template
from sparsex_jax.text.tokenizer import read_tokenizer

SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOLS = "{% if tools is not none %}{{ tools | length }} tools {% endif %}" + SHOW
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "hi"}


def call(arguments='{"a": 1}'):
    return {"id": "1", "type": "function", "function": {"name": "tide", "arguments": arguments}}


def prompt(template, messages=(USER,), **fields):
    tokenizer = make_tokenizer(["<s>"], bos_token="<s>")
    tokenizer.chat_template = template
    return render(Chat(messages, **fields), tokenizer).text


# Which template ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "fields", "expected"),
    [
        ("a", {}, "a"),
        ({"default": "a", "tool_use": "{{ tools and 'b' }}"}, {}, "a"),
        ({"default": "a", "tool_use": "{{ tools and 'b' }}"}, {"tools": [TOOL]}, "b"),
        ({"default": "a", "tool_use": "{{ tools and 'b' }}"}, {"tools": []}, "a"),
        ({"default": "a", "rag": "c"}, {"chat_template": "rag"}, "c"),
        ({"only": "d"}, {}, "d"),
    ],
)
def test_one_of_several_templates_is_taken_by_name(stored, fields, expected):
    assert prompt(stored, **fields) == expected


@pytest.mark.parametrize("stored", [None, {}, {"rag": "a", "tool_use": "b"}])
def test_without_a_default_there_is_no_template(stored):
    with pytest.raises(InvalidRequestError, match="template"):
        prompt(stored)


def test_a_template_of_a_request_is_not_rendered():
    with pytest.raises(InvalidRequestError, match=r"chat_template='\{\{ 1 \}\}' is none of the model's templates: def"):
        prompt("a", chat_template="{{ 1 }}")


def test_gguf_files_and_directories_may_have_several_templates(tmp_path):
    key = "tokenizer.chat_template"
    assert gguf_templates({key: "a", f"{key}.tool_use": "b", f"{key}s": ["tool_use"]}) == {
        "default": "a",
        "tool_use": "b",
    }
    assert (gguf_templates({key: "a"}), gguf_templates({})) == ("a", None)
    with pytest.raises(UnsupportedModelError, match="chat_template"):
        gguf_templates({key: 5})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    for jinja_files in (True, False):  # files of their own, or a list in tokenizer_config.json
        tokenizer.save_pretrained(tmp_path / str(jinja_files), save_jinja_files=jinja_files)
        assert read_tokenizer(tmp_path / str(jinja_files)).chat_template == tokenizer.chat_template


def test_a_legacy_file_is_read(tmp_path):
    assert legacy_template(tmp_path) is None
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert read_tokenizer(tmp_path).chat_template == "old"


# Forms of messages ------------------------------------------------------------------------------------------

CALLS = "{% for c in m.tool_calls or () %}{{ c.function | tojson }}{% endfor %}"
OBJECT = SHOW.replace("{% endfor %}", CALLS + "{% endfor %}")
TEXT = OBJECT.replace("c.function | tojson", "c.function.name + c.function.arguments")
EITHER = TEXT.replace("+ c.function.arguments", "~ (c.arguments if c.arguments is string else c.arguments | tojson)")
EITHER = EITHER.replace("c.arguments", "c.function.arguments")
NONE = SHOW.replace("[{{", "{% if m.content is none %}{{ m.tool_calls[0].function | tojson }}{% else %}[{{")
NONE = NONE.replace("{% endfor %}", "{% endif %}{% endfor %}")
ABSENT = NONE.replace("m.content is none", "m.content is not defined")
# As DeepSeek's: an empty text is a turn of its own.
EMPTY_TURN = (
    "{% for m in messages %}" + CALLS + "{% if m.content is not none %}[{{ m.role }}]{{ m.content }}{% endif %}"
)
EMPTY_TURN += "{% endfor %}"
NAME_ONLY = NONE.replace("function | tojson", "function.name")
PARTS = SHOW.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
TWO_CALLS = "{% if 'tool_calls' in m and m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
STRICT = SHOW.replace("[{{", TWO_CALLS + "[{{")
SHOWN = '{"name": "tide", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OBJECT, f"[user]hi[assistant]{SHOWN}[tool]four"),
        (TEXT, '[user]hi[assistant]tide{"a": 1}[tool]four'),
        (EITHER, '[user]hi[assistant]tide{"a": 1}[tool]four'),
        (NONE, f"[user]hi{SHOWN}[tool]four"),
        (ABSENT, f"[user]hi{SHOWN}[tool]four"),
        (EMPTY_TURN, f"[user]hi{SHOWN}[tool]four"),
        (NAME_ONLY, "[user]hitide[tool]four"),
        # These show no calls.
        (SHOW, f"[user]hi[assistant]<tool_call>\n{SHOWN}\n</tool_call>[user]The tool's result:\nfour"),
        (STRICT, f"[user]hi[assistant]<tool_call>\n{SHOWN}\n</tool_call>[user]The tool's result:\nfour"),
    ],
)
@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize("content", [None, "", ...])
def test_calls_are_shown_in_the_form_that_a_template_takes(template, expected, arguments, content):
    asked = {"role": "assistant", "tool_calls": [call(arguments)]} | ({} if content is ... else {"content": content})
    assert prompt(template, [USER, asked, {"role": "tool", "tool_call_id": "1", "content": "four"}]) == expected


def test_calls_beside_text_are_not_lost():
    asked = {"role": "assistant", "content": "I ask.", "tool_calls": [call()]}
    assert prompt(OBJECT, [USER, asked]) == f"[user]hi[assistant]I ask.{SHOWN}"
    assert prompt(NONE, [USER, asked]) == f"[user]hi[assistant]I ask.{SHOWN}"


@pytest.mark.parametrize("arguments", ["", None, {}])
def test_calls_may_have_no_arguments(arguments):
    shown = prompt(OBJECT, [USER, {"role": "assistant", "tool_calls": [call(arguments)]}])
    assert shown.endswith('{"name": "tide", "arguments": {}}')


@pytest.mark.parametrize("arguments", ["{oops", '{"a": 1e400}', '{"a": NaN}', "[1]", "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments):
    shown = prompt(OBJECT, [USER, {"role": "assistant", "tool_calls": [call(arguments)]}])
    assert shown.endswith(json.dumps(arguments) + "}")


def test_empty_lists_and_null_fields_are_as_if_they_were_not_there():
    history = [USER, {"role": "assistant", "content": "yes", "tool_calls": [], "name": None}, USER]
    assert prompt(STRICT, history) == "[user]hi[assistant]yes[user]hi"
    assert prompt("{{ messages[1].name is defined }}", history) == "False"
    assert prompt(TOOLS, tools=[]) == prompt(TOOLS) == "[user]hi"
    assert prompt(SHOW, [{"role": "user", "content": None}, {"role": "assistant"}]) == "[user][assistant]"


def test_parts_of_a_content_are_one_text_unless_the_template_wants_parts():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert prompt(SHOW, [{"role": "user", "content": parts}]) == "[user]hi"
    assert prompt(PARTS, [{"role": "user", "content": parts}]) == prompt(PARTS) == "[user]hi"
    assert prompt(PARTS, continue_final_message=True) == "[user]hi"


def test_developers_are_systems_where_the_template_does_not_know_them():
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    assert prompt(SHOW, messages) == "[system]Be brief.[user]hi"
    assert prompt(SHOW + "{{ 'developer' }}", messages).startswith("[developer]")
    assert prompt(SHOW + "{% if x == 'ipython' %}{% endif %}", [{"role": "ipython", "content": "4"}]) == "[ipython]4"


# Tools, documents and variables -----------------------------------------------------------------------------


def test_tools_reach_models_whose_template_does_not_know_them():
    assert prompt(TOOLS, tools=[TOOL]) == "1 tools [user]hi"
    offered = prompt(SHOW, tools=[TOOL])
    assert offered.startswith("[system]You can call")
    assert json.dumps(TOOL) in offered
    assert offered.endswith("[user]hi")
    assert prompt(SHOW, [{"role": "system", "content": "Be brief."}, USER], tools=[TOOL]).startswith(
        "[system]Be brief.\n\nYou can call"
    )
    tokenizer = make_tokenizer()
    for template, shown in ((TOOLS, True), (SHOW, False), ({"default": SHOW, "tool_use": TOOLS}, True)):
        tokenizer.chat_template = template
        assert shows_tools(tokenizer) == shown


def test_variables_and_documents_reach_the_template():
    template = "{{ documents[0].text }}{{ '<think></think>' if enable_thinking is defined and not enable_thinking }}"
    fields = {"documents": [{"text": "d"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert prompt(template, **fields) == "d<think></think>"


PROMPTS = SHOW + "{% if add_generation_prompt %}[assistant]{% endif %}"
TRIMS = PROMPTS.replace("m.content", "m.content | trim")
ONCE = [USER, {"role": "assistant", "content": "Once "}]


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (PROMPTS, {}, "[user]hi[assistant]Once [assistant]"),
        (PROMPTS, {"add_generation_prompt": False}, "[user]hi[assistant]Once "),
        (PROMPTS + ".", {"continue_final_message": True}, "[user]hi[assistant]Once "),
        (PROMPTS + ".", {"continue_final_message": True, "add_generation_prompt": False}, "[user]hi[assistant]Once "),
        (TRIMS + ".", {"continue_final_message": True}, "[user]hi[assistant]Once"),
    ],
)
def test_an_answer_begins_or_goes_on(template, fields, expected):
    assert prompt(template, ONCE, **fields) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, r"messages has no entries"),
        ({"messages": "hi"}, r"messages has type str"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\] has no role"),
        ({"messages": [USER, {"role": "wizard", "content": "hi"}]}, r"messages\[1\] has role 'wizard'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\] has content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\] has a part"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls has a call without"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, r"messages\[0\].tool_calls has entries"),
        ({"tools": [{}]}, r"tools\[0\] has no function.name"),
        ({"tools": {"a": 1}}, r"tools has entries"),
        ({"documents": [{"text": "a"}]}, "documents has entries"),
        ({"documents": ["a"]}, "documents has entries"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs has 'enable_thinking'"),
        ({"chat_template_kwargs": {"tools": [TOOL]}}, "chat_template_kwargs has 'tools', which is a field"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message=True needs"),
        ({"messages": [{"role": "assistant"}], "continue_final_message": True}, "continue_final_message=True, but"),
    ],
)
def test_what_would_not_reach_the_model_is_refused(fields, field):
    with pytest.raises(InvalidRequestError, match=f"^{field}"):
        prompt(SHOW, **({"messages": [USER]} | fields))


def test_nested_values_are_refused_and_not_a_failure():
    nested = {}
    for _ in range(5000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequestError, match=r"^messages"):
        prompt(OBJECT, [USER, {"role": "assistant", "tool_calls": [call(nested)]}])


def test_an_engine_takes_chats_and_refuses_what_the_template_refuses():
    engine = tiny_engine()
    engine.tokenizer = make_tokenizer(["[user]"])
    engine.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="continue_final_message"):
        engine.generate(Chat([USER], continue_final_message=True, add_generation_prompt=True))
    assert engine.encode([{"role": "user", "content": "a"}]).tolist() == [4, 1]
    assert engine.encode(Chat([{"role": "user", "content": "a"}])).tolist() == [4, 1]
    for template, message in (("{{ raise_exception('no system role') }}", "no system role"), ("{{", "no valid Jinja")):
        engine.tokenizer.chat_template = template
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate([USER], SamplingParams(max_new_tokens=1))
