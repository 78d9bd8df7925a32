"""The protocols beside OpenAI's completions, by the official client of each, against a live server."""

import json

import anthropic
import openai
import pytest
from live import MODEL, live_server, make_engine
from test_serving_tools import TIDE, tagged
from test_thoughts import QWEN3, Thinker, with_template

from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.methods import Cors
from sparsex_jax.serving.protocols.messages import MessagesRequest
from sparsex_jax.serving.protocols.messages import chat_of as chat_of_message
from sparsex_jax.serving.protocols.responses import ResponsesRequest
from sparsex_jax.serving.protocols.responses import chat_of as chat_of_response

CALL = tagged(TIDE)
SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}, "days": {"type": "array"}}}
TOOL = {"name": "tide", "description": "When it is high.", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "tide", "parameters": SCHEMA}
ASK = [{"role": "user", "content": "Tide?"}]
ALL = f"<think>\nWhy not?\n</think>\n\nI ask.\n{CALL}"

BOTH = {"text": {"format": {"type": "json_object"}}, "tools": [FUNCTION], "tool_choice": "required"}
ANY = {"type": "any"}
FAR = {"type": "json_schema", "schema": {"$ref": "https://example.org"}}
ODD = [{"type": "function", "name": "", "parameters": {}}]
NO_OBJECT = {**FUNCTION, "parameters": 5}
CALLS = [
    {"role": "user", "content": "a"},
    {"type": "function_call_output", "call_id": "1", "output": "a"},
    {"role": "nobody", "content": "a"},
]
TEMPLATE_KWARGS = {"chat_template_kwargs": {"nothing": 1}}
# What a client sends that only the chat which it becomes shows to be wrong: what the message begins with, and `param`.
FIELDS = {
    "/v1/responses": [
        ("text.format.schema: ", {"text": {"format": FAR}}, "text.format.schema"),
        ("text.format.schema is missing", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("text.format.type: ", {"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ("text.format.schema: ", {"text": {"format": FAR | {"schema": "a"}}}, "text.format.schema"),
        ("reasoning.effort is not", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("tools[0] has no name", {"tools": ODD}, "tools[0]"),
        ("tools: the parameters of 'tide'", {"tools": [NO_OBJECT], "tool_choice": "required"}, "tools"),
        (
            "tool_choice.name: ",
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": ""}},
            "tool_choice.name",
        ),
        ("tool_choice: text.format and tool_choice exclude", BOTH, "tool_choice"),
        ("input[2] has role 'nobody'", {"input": CALLS, "instructions": "Short."}, "input[2]"),
        ("chat_template_kwargs", TEMPLATE_KWARGS, "chat_template_kwargs"),
    ],
    "/v1/messages": [
        ("output_config.format.schema: ", {"output_config": {"format": FAR}}, None),
        ("output_format.schema: ", {"output_format": FAR}, None),
        ("output_config.format.type: ", {"output_config": {"format": {"type": "xml"}}}, None),
        ("tools[0] has no name", {"tools": [{"input_schema": {}}]}, None),
        ("tools: the input_schema of 'tide'", {"tools": [TOOL | {"input_schema": 5}], "tool_choice": ANY}, None),
        ("tool_choice.name: ", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": ""}}, None),
        ("chat_template_kwargs", TEMPLATE_KWARGS, None),
    ],
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A server with a key and a scripted model."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text('[ada]\nkey = "sk-ada"\n')
    engine = make_engine()
    engine.tokenizer = with_template(engine.tokenizer, QWEN3)
    scripted, limits = Thinker(engine), Limits()
    access = Access.load(keys, limits)
    with live_server(engine, loop=scripted.loop, access=access, limits=limits) as live:
        scripted.live, scripted.http = live, live.http("sk-ada")
        scripted.anthropic, scripted.openai = live.anthropic("sk-ada"), live.client("sk-ada")
        yield scripted


def message(thinker, text, **fields):
    thinker.text = text
    return thinker.anthropic.messages.create(**{"model": MODEL, "max_tokens": 99, "messages": ASK} | fields)


def response(thinker, text, **fields):
    thinker.text = text
    return thinker.openai.responses.create(**{"model": MODEL, "input": "Tide?"} | fields)


def events_of(http, path, body):
    """The names and the data of a stream's events."""
    with http.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [each["type"] for each in data]
    return data


# Anthropic's messages ---------------------------------------------------------------------------------------


def test_a_message_has_thought_text_and_calls_as_blocks(thinker):
    answer = message(thinker, ALL, tools=[TOOL])
    thought, text, call = answer.content
    assert (thought.type, thought.thinking, bool(thought.signature)) == ("thinking", "Why not?", True)
    assert (text.type, text.text) == ("text", "I ask.")
    assert (call.type, call.name, call.input) == ("tool_use", "tide", TIDE["arguments"])
    assert (answer.role, answer.type, answer.stop_reason, answer.stop_sequence) == (
        *("assistant", "message", "tool_use"),
        None,
    )
    usage = answer.usage
    assert (usage.cache_read_input_tokens, usage.output_tokens > usage.output_tokens_details.thinking_tokens > 0) == (
        0,
        True,
    )
    assert answer._request_id


def test_a_stream_of_a_message_is_the_message(thinker):
    thinker.text = ALL
    with thinker.anthropic.messages.stream(model=MODEL, max_tokens=99, messages=ASK, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    whole = message(thinker, ALL, tools=[TOOL])
    drop = {"id": True, "content": {2: {"id"}}}
    assert streamed.model_dump(exclude=drop) == whole.model_dump(exclude=drop)
    assert {"thinking", "text", "input_json", "signature"} <= set(kinds)


def test_the_events_of_a_message_are_in_anthropics_order(thinker):
    thinker.text = ALL
    body = {"model": MODEL, "max_tokens": 99, "messages": ASK, "tools": [TOOL]}
    data = events_of(thinker.http, "/v1/messages?beta=true", body)
    kinds = [each["type"] for each in data]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [(each["type"][14:], each["index"]) for each in data if each["type"].startswith("content_block_s")]
    assert blocks == [(what, index) for index in range(3) for what in ("start", "stop")]
    deltas = [each["delta"]["type"] for each in data if each["type"] == "content_block_delta"]
    assert list(dict.fromkeys(deltas)) == ["thinking_delta", "signature_delta", "text_delta", "input_json_delta"]
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_what_a_coding_agent_sends_is_taken(thinker):
    """As Claude Code does: blocks with cache_control, many tools, metadata, a budget, and headers of betas."""
    cache = {"cache_control": {"type": "ephemeral"}}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: 1"},
        {"type": "text", "text": "You are an agent."} | cache,
    ]
    call = {"type": "tool_use", "id": "toolu_1", "name": "tool3", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "found it"}]}
    thought = {"type": "thinking", "thinking": "Look.", "signature": "s"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"}, {"type": "text", "text": "Find."}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result | cache | {"is_error": False}, {"type": "text", "text": "Go on."} | cache]},
    ]
    tools = [{"name": f"tool{n}", "description": "d", "input_schema": SCHEMA} for n in range(20)]
    headers = {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"}
    thinker.text = "Done."
    answer = thinker.anthropic.beta.messages.create(
        model=MODEL,
        max_tokens=32000,
        system=system,
        messages=messages,
        tools=tools,
        metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 10000},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
        extra_headers=headers,
        extra_body={"temperature": 1},
        timeout=60,  # else the client wants a stream for so many tokens
    )
    assert [block.text for block in answer.content] == ["Done."]
    assert answer.stop_reason == "end_turn"
    prompt = thinker.prompts[-1]
    assert prompt.startswith(
        "<|im_start|>system\nYou are an agent.<|im_end|>\n<|im_start|>user\n<system-reminder>\nFind."
    )
    assert prompt.endswith(
        "I look.\n<tool_call>\n" + '{"name": "tool3", "arguments": {"a": 1}}' + "\n</tool_call><|im_end|>\n"
        "<|im_start|>tool\nfound it<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_of_a_message_are_counted(thinker):
    counted = thinker.anthropic.messages.count_tokens(model=MODEL, messages=ASK, system="Short.", tools=[TOOL])
    assert counted.input_tokens == message(thinker, "So.", system="Short.", tools=[TOOL]).usage.input_tokens


def test_a_last_message_of_the_assistant_is_continued(thinker):
    answer = message(thinker, "high.", messages=[*ASK, {"role": "assistant", "content": "It is"}])
    assert (answer.content[0].text, thinker.prompts[-1].endswith("assistant\nIt is")) == ("high.", True)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, r"messages\[0\].content\[0\]"),
        ({"messages": [*ASK, {"role": "assistant", "content": ""}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]}, "content"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tools has no entries"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"temperature": 2}, "temperature"),
    ],
)
def test_errors_of_messages_have_anthropics_shape(thinker, fields, names):
    with pytest.raises(anthropic.BadRequestError, match=names) as raised:
        thinker.anthropic.messages.create(model=MODEL, max_tokens=9, messages=ASK, extra_body=fields)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    assert raised.value.body["request_id"] == raised.value.request_id


def test_keys_and_models_that_are_unknown_have_anthropics_errors(thinker):
    with pytest.raises(anthropic.AuthenticationError):
        thinker.live.anthropic("sk-eve").messages.create(model=MODEL, max_tokens=9, messages=ASK)
    with pytest.raises(anthropic.NotFoundError):
        thinker.anthropic.messages.create(model="claude", max_tokens=9, messages=ASK)
    by_token = anthropic.Anthropic(base_url=thinker.live.url, auth_token="sk-ada", api_key=None)
    assert by_token.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 0


def test_models_are_listed_as_anthropic_lists_them(thinker):
    [card] = thinker.anthropic.models.list().data
    assert (card.id, card.type, card.display_name) == (MODEL, "model", MODEL)
    assert thinker.anthropic.models.retrieve(MODEL) == card


def test_a_stop_sequence_is_named(thinker):
    thinker.stopped_by = "STOP"
    answer = message(thinker, "So.", stop_sequences=["STOP"])
    thinker.stopped_by = None
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "STOP")


def test_a_stream_that_breaks_says_so_in_each_protocol(thinker, caplog):
    thinker.breaks = True
    try:
        with pytest.raises(anthropic.APIStatusError, match="internal error"):
            list(message(thinker, "So.", stream=True))
        last = list(response(thinker, "So.", stream=True))[-1]
    finally:
        thinker.breaks = False
    assert (last.type, last.response.error.code, last.response.status) == ("response.failed", "server_error", "failed")


def messages_of(**fields):
    return chat_of_message(MessagesRequest.model_validate({"max_tokens": 9, "messages": ASK} | fields)).chat


def test_turns_of_one_role_are_one_turn_and_results_keep_their_place():
    chat = messages_of(
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "d"}, "title": "T"}]},
            {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "tide", "input": {}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "no", "is_error": True}],
            },
        ]
    )
    assert [(each.role, each.content) for each in chat.messages] == [
        ("user", "a\nT\nd"),
        ("assistant", ""),
        ("tool", "Error: no"),
    ]


@pytest.mark.parametrize(("choice", "expected"), [({"type": "auto"}, "auto"), ({"type": "none"}, "none")])
def test_choices_of_tools_are_chats(choice, expected):
    chat = messages_of(tools=[TOOL], tool_choice=choice | {"disable_parallel_tool_use": True})
    assert (chat.tool_choice, chat.parallel_tool_calls) == (expected, False)


# OpenAI's responses -----------------------------------------------------------------------------------------


def test_a_response_has_thought_text_and_calls_as_items(thinker):
    answer = response(thinker, ALL, tools=[FUNCTION], instructions="Short.", store=True, metadata={"a": "b"})
    thought, text, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Why not?")
    assert (text.type, text.status, answer.output_text) == ("message", "completed", "I ask.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "tide", TIDE["arguments"])
    assert (answer.status, answer.error, answer.store, answer.instructions) == ("completed", None, False, "Short.")
    assert answer.usage.output_tokens > answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert thinker.prompts[-1].startswith("<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nTide?")


def test_a_stream_of_a_response_is_the_response(thinker):
    thinker.text = ALL
    with thinker.openai.responses.stream(model=MODEL, input="Tide?", tools=[FUNCTION | {"strict": True}]) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in streamed.output] == ["reasoning", "message", "function_call"]
    assert streamed.output_text == "I ask."
    assert streamed.status == "completed"


def test_the_events_of_a_response_are_in_openais_order(thinker):
    thinker.text = ALL
    data = events_of(thinker.http, "/v1/responses", {"model": MODEL, "input": "Tide?", "tools": [FUNCTION]})
    kinds = [each["type"].removeprefix("response.") for each in data]
    folded = [kind for number, kind in enumerate(kinds) if kind not in kinds[number - 1 : number]]
    part = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    assert folded == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done", *done),
        *(*part, "output_text.delta", "output_text.done", *done),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    added = [each["item"] for each in data if each["type"] == "response.output_item.added"]
    assert [item["status"] for item in added] == ["in_progress"] * 3
    assert [item["content"] for item in added[:2]] == [[], []]
    assert data[0]["response"]["output"] == [] != data[-1]["response"]["output"]


def test_a_conversation_of_items_becomes_a_chat():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Tide?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I ask."}], "id": "m"},
        {"type": "function_call", "call_id": "1", "name": "tide", "arguments": "{}", "id": "fc"},
        {"type": "function_call", "call_id": "2", "name": "tide", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "high"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "low"}]},
    ]
    chat = chat_of_response(ResponsesRequest(input=items, instructions="Short.")).chat
    system, user, assistant, *results = chat.messages
    assert [(each.role, each.content) for each in (system, user, assistant)] == [
        ("system", "Short."),
        ("user", "Tide?"),
        ("assistant", "I ask."),
    ]
    assert assistant.reasoning_content == "Ask."
    assert [call["id"] for call in assistant.tool_calls] == ["1", "2"]
    assert [(each.role, each.tool_call_id, each.content) for each in results] == [
        ("tool", "1", "high"),
        ("tool", "2", "low"),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ],
)
def test_what_a_response_cannot_have_is_refused_by_name(thinker, fields, param):
    with pytest.raises(openai.BadRequestError) as raised:
        response(thinker, "So.", extra_body=fields)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("path", "says", "fields", "param"), [(path, *row) for path, rows in FIELDS.items() for row in rows]
)
def test_errors_of_the_chat_name_the_fields_that_the_client_sent(thinker, path, says, fields, param):
    asked = {"input": "Tide?"} if path == "/v1/responses" else {"messages": ASK, "max_tokens": 9}
    answer = thinker.http.post(path, json=asked | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(says), error
    assert error.get("param") == param
    if path == "/v1/messages":
        counted = thinker.http.post("/v1/messages/count_tokens", json={"messages": ASK} | fields)
        assert counted.status_code == 200 or counted.json()["error"] == error


def test_responses_are_not_stored(thinker):
    with pytest.raises(openai.NotFoundError, match="not stored"):
        thinker.openai.responses.retrieve("resp_1")


# Calls that are cut -----------------------------------------------------------------------------------------

HALF = f"<think>\nWhy not?\n</think>\n\nI ask.\n{CALL}\n{CALL[:40]}"


@pytest.fixture
def cut(thinker):
    thinker.finish_reason = "length"
    yield thinker
    thinker.finish_reason = "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("calls", [{}, {"strict": True}, {"tool_choice": "required"}])
def test_a_call_that_is_cut_is_left_out_and_those_before_it_are_not(cut, calls, stream):
    cut.text = HALF
    function = {"name": "tide", "parameters": SCHEMA} | ({"strict": True} if "strict" in calls else {})
    fields = {"tools": [{"type": "function", "function": function}]} | ({} if "strict" in calls else calls)
    text = None if "tool_choice" in calls else "I ask."
    create = cut.openai.chat.completions.create
    if stream:
        choices = [chunk.choices[0] for chunk in create(model=MODEL, messages=ASK, stream=True, **fields)]
        told = [call for choice in choices for call in choice.delta.tool_calls or ()]
        content = "".join(choice.delta.content or "" for choice in choices) or None
    else:
        choices = create(model=MODEL, messages=ASK, **fields).choices
        told, content = choices[0].message.tool_calls, choices[0].message.content
    assert (content, len(told), choices[-1].finish_reason) == (text, 1, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_left_out_in_other_protocols(cut, stream):
    cut.text = HALF
    if stream:
        with cut.anthropic.messages.stream(model=MODEL, max_tokens=9, messages=ASK, tools=[TOOL]) as events:
            answer = events.get_final_message()
        [done] = [each for each in response(cut, HALF, tools=[FUNCTION], stream=True) if "incomplete" in each.type]
        items = done.response.output
    else:
        answer = message(cut, HALF, tools=[TOOL])
        items = response(cut, HALF, tools=[FUNCTION]).output
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.content[1].text == "I ask."
    assert [item.type for item in items] == ["reasoning", "message", "function_call"]


# Tokens, the version, and origins ---------------------------------------------------------------------------


def test_texts_and_chats_are_tokenized_and_back(thinker):
    tokenizer = thinker.engine.tokenizer
    text = thinker.http.post("/tokenize", json={"model": MODEL, "prompt": "Tide é", "return_token_strs": True}).json()
    assert text["tokens"] == tokenizer("Tide é")["input_ids"]
    assert (text["count"], text["token_strs"]) == (
        len(text["tokens"]),
        tokenizer.convert_ids_to_tokens(text["tokens"]),
    )
    assert thinker.http.post("/detokenize", json={"tokens": text["tokens"]}).json() == {"prompt": "Tide é"}
    chat = thinker.http.post("/tokenize", json={"messages": ASK}).json()
    back = thinker.http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert back == "<|im_start|>user\nTide?<|im_end|>\n<|im_start|>assistant\n"
    assert (chat["token_strs"], chat["max_model_len"]) == (None, text["max_model_len"])
    assert thinker.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": ASK}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
    ],
)
def test_what_cannot_be_tokenized_is_refused(thinker, path, body):
    assert thinker.http.post(path, json=body).status_code in (400, 404)


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/detokenize", {"tokens": [10**9]}, "tokens", "tokens has token id 1000000000; ids must be"),
        (
            "/detokenize",
            {"tokens": ["a"]},
            "tokens",
            "tokens must be a flat list of integer token ids; tokens[0] is 'a'",
        ),
        ("/v1/knowledge", {"text": [-1]}, "text", "text has token id -1; ids must be"),
        ("/v1/knowledge", {"text": "a", "preamble": [1.5]}, "preamble", "preamble must be a flat list"),
        ("/v1/completions", {"prompt": [10**9]}, "prompt", "prompt has token id 1000000000"),
    ],
)
def test_wrong_tokens_and_texts_are_those_of_the_field_that_has_them(thinker, path, body, param, says):
    error = thinker.http.post(path, json=body).json()
    assert error["error"]["message"].startswith(says), error
    assert error["error"]["param"] == param


def test_fields_that_do_not_go_together_are_told(thinker):
    assert "either prompt or messages" in thinker.http.post("/tokenize", json={}).json()["error"]["message"]


def test_the_version_is_told_to_everybody(thinker):
    assert thinker.live.http("none").get("/version").json()["version"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"origins": ("*",), "credentials": True}, "allow_credentials"),
        ({"methods": ("GET ",)}, "allowed_methods"),
        ({"headers": ("",)}, "allowed_headers"),
    ],
)
def test_wrong_options_for_other_origins_are_refused(options, says):
    from sparsex_jax.errors import InvalidRequestError

    with pytest.raises(InvalidRequestError, match=says):
        Cors(**options)
