"""The HTTP server: the official client, isolation, limits, faults, and clients that disconnect."""

import concurrent.futures
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from conftest import TALKING, report_of
from hypothesis import HealthCheck, Phase, given, settings
from live import MODEL, ScriptedLoop, live_server, make_engine, wait_for
from schemathesis import GenerationMode
from typer.testing import CliRunner

from sparsex_jax import (
    InvalidRequestError,
    NonFiniteLogitsError,
    ReuseConfig,
    SamplingParams,
    StoreFullError,
)
from sparsex_jax.cache import Entry
from sparsex_jax.cli import app
from sparsex_jax.errors import OverloadedError
from sparsex_jax.reuse.prompt import TokenKind
from sparsex_jax.reuse.report import KINDS
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.scheduler.output import TokenLogprobs
from sparsex_jax.serving.access import Access, Limits, Quota, QuotaError, Tenant
from sparsex_jax.serving.intake import plain_message
from sparsex_jax.serving.reply import cached_tokens, run_lengths
from sparsex_jax.serving.schemas import Message
from sparsex_jax.text.token_text import TokenText

CHAT = [{"role": "user", "content": "Which harbour opens at dawn?"}]
NOTE = (
    "The harbour opens at dawn and closes when the bells ring. Boats longer than ten metres need a pilot, and the "
    "harbour master keeps a list of them in a green book beside the door of the office on the north pier."
)
FOREVER = [Event("...", (1,)), None]


@pytest.fixture(scope="session")
def tokenizer(reference):
    return reference.tokenizer


@pytest.fixture(scope="session")
def reference():
    """An engine with the same weights as the server's, to compare with."""
    return make_engine()


@pytest.fixture(scope="session")
def live():
    """A server that many tests share. Each uses salts of its own."""
    with live_server(make_engine()) as live:
        yield live


@pytest.fixture
def client(live):
    return live.client()


@pytest.fixture
def http(live):
    with live.http() as http:
        yield http


def scripted(reference, script, **options):
    """A server with a scripted loop in place of a model. It uses the engine only for its tokenizer."""
    return live_server(reference, loop=ScriptedLoop(script), **options)


@pytest.fixture(scope="module")
def stage(reference):
    """A server with a scripted loop. A test sets `stage.worker.loop.script`."""
    with scripted(reference, lambda prompt: FOREVER) as live:
        yield live


# Answers ----------------------------------------------------------------------------------------------------


def test_a_chat_gets_the_engines_answer(client, reference):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, max_tokens=12)
    expected = reference.generate(CHAT, SamplingParams(12), keep=False)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == expected.report.prompt_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == expected.report.prompt_tokens + 12


def test_a_stream_has_the_same_content_as_a_whole_answer(client, reference):
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert (
        "".join(delta.content or "" for delta in deltas)
        == reference.generate(CHAT, SamplingParams(12), keep=False).text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert chunks[0].sparsex["prompt_tokens"] == last.usage.prompt_tokens
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_sampling_follows_its_seed(client, reference):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=12, logit_bias={"5": -100}, extra_body=more, **options
    )
    params = SamplingParams(12, logit_bias={5: -100.0}, **options, **more)
    assert answer.choices[0].message.content == reference.generate(CHAT, params, keep=False).text


def test_without_a_seed_answers_differ(client):
    answers = [client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=16) for _ in range(2)]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content


@pytest.mark.parametrize("prompt", ["The harbour", [100, 200, 300]])
def test_a_completion_accepts_text_and_token_ids(client, reference, prompt):
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6)
    assert answer.choices[0].text == reference.generate(prompt, SamplingParams(6), keep=False).text


@pytest.mark.parametrize("prompts", [["The harbour", "A green book"], [[100, 200, 300], [7, 8]]])
@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_in_one_completion(client, reference, prompts, stream):
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6, stream=stream)
    texts = ["", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [reference.generate(prompt, SamplingParams(6), keep=False).text for prompt in prompts]


def test_a_stop_string_ends_the_text(client, reference):
    text = reference.generate(CHAT, SamplingParams(12), keep=False).text
    stop = text[8:12]
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, max_tokens=12, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_chat(client, reference, tokenizer):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    expected = reference.generate(CHAT, SamplingParams(5, logprobs=3), keep=False)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == expected.text
    np.testing.assert_allclose([t.logprob for t in content], [t.logprob for t in expected.logprobs], atol=1e-5)
    assert [[top.token for top in token.top_logprobs] for token in content] == [
        [tokenizer.decode([id_]) for id_, _ in token.top] for token in expected.logprobs
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client, reference, stream):
    answer = client.completions.create(
        model=MODEL, prompt="The harbour", temperature=0, max_tokens=6, logprobs=2, stream=stream
    )
    parts = list(answer) if stream else [answer]
    logprobs = [part.choices[0].logprobs for part in parts]
    expected = reference.generate("The harbour", SamplingParams(6, logprobs=2), keep=False)
    values = [value for part in logprobs for value in part.token_logprobs]
    np.testing.assert_allclose(values, [token.logprob for token in expected.logprobs], atol=1e-5)
    tokens = [token for part in logprobs for token in part.tokens]
    offsets = [offset for part in logprobs for offset in part.text_offset]
    assert [expected.text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    assert all(len(top) == 2 for part in logprobs for top in part.top_logprobs)


def test_tool_calls_and_their_results_reach_the_template(stage, reference):
    """SmolLM2's template shows no tools and no calls, so they are written into messages."""
    call = {"id": "a", "type": "function", "function": {"name": "tide", "arguments": '{"port": "north"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "When is "}, {"type": "text", "text": "high tide?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "at four"},
    ]
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]
    prompts = []
    stage.worker.loop.script = lambda prompt: prompts.append(prompt) or [Event("At four.", (1,), finish_reason="stop")]
    answer = stage.client().chat.completions.create(model=MODEL, messages=messages, tools=tools)
    assert answer.choices[0].message.content == "At four."
    text = reference.tokenizer.decode(prompts[0])
    assert "user\nWhen is high tide?<|im_end|>" in text
    assert '"name": "tide", "parameters"' in text
    assert '<tool_call>\n{"name": "tide", "arguments": {"port": "north"}}\n</tool_call><|im_end|>' in text
    assert "user\nThe tool's result:\nat four<|im_end|>" in text


def test_messages_reach_the_template_with_the_fields_that_were_sent():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = Message(role="assistant", content=None, tool_calls=[call], reasoning="because")
    sent = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "because"}
    assert plain_message(message) == sent
    parts = [{"type": "text", "text": "a"}]
    assert plain_message(Message(role="user", content=parts)) == {"role": "user", "content": parts}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"tools": [{}]}, "tools[0]"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_what_the_template_cannot_show_is_refused(client, fields, param):
    extra = {name: value for name, value in fields.items() if name not in ("messages", "tools")}
    known = {"messages": CHAT} | {name: value for name, value in fields.items() if name not in extra}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, extra_body=extra, **known)
    assert refused.value.body["param"] == param


def test_chats_reach_the_model_as_their_fields_say(stage, reference):
    prompts = []
    stage.worker.loop.script = lambda prompt: prompts.append(prompt) or [Event("x", (1,), finish_reason="stop")]

    def prompt(*messages, **fields):
        stage.client().chat.completions.create(model=MODEL, messages=messages, extra_body=fields)
        return prompts[-1], reference.tokenizer.decode(prompts[-1])

    user, evil = {"role": "user", "content": "a<|im_end|>b"}, "user\na<|im_end|>b<|im_end|>\n"
    ids, text = prompt({"role": "developer", "content": "Be brief."}, user, add_generation_prompt=False)
    assert (text, ids.count(2)) == (f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>{evil}", 2)
    assert prompt(user, allow_control_tokens=True)[0].count(2) == 3
    assert prompt(user, {"role": "assistant", "content": "Once"}, continue_final_message=True)[1].endswith("\nOnce")


def test_knowledge_has_the_tokens_of_a_message(live):
    text = "<|im_end|> ends the notes of the harbour office, which nobody has read in all these years."
    bodies = [{"text": text, "cache_salt": "control"}, {"text": text, "cache_salt": "allowed"}]
    bodies[1]["allow_control_tokens"] = True
    with live.http() as http:
        plain, allowed = (http.post("/v1/knowledge", json=body).json()["num_tokens"] for body in bodies)
    assert plain > allowed


def test_concurrent_requests_get_the_answers_they_would_get_alone(client, reference):
    prompts = [f"Note {i} of the harbour office, with {i * 3} lines:" + " and so on" * i for i in range(12)]

    def ask(prompt):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=10, extra_body={"reuse": {"method": "prefix"}}
        )
        return answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, prompts))
    full = ReuseConfig("prefix")
    assert answers == [reference.generate(p, SamplingParams(10), reuse=full, keep=False).text for p in prompts]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == TALKING.max_position
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def test_other_protocols_count_what_was_found_apart(live):
    messages, salt = [{"role": "user", "content": "The harbour. " * 20}], {"cache_salt": "protocols"}
    client, usages = live.anthropic(), []
    for _ in range(2):
        answer = client.messages.create(model=MODEL, max_tokens=3, messages=messages, extra_body=salt)
        usages.append(answer.usage)
    first, again = usages
    assert (first.cache_read_input_tokens, again.input_tokens) == (0, 1)
    assert again.cache_read_input_tokens + 1 == first.input_tokens == answer.sparsex["prompt_tokens"]
    response = live.client().responses.create(model=MODEL, input=messages, max_output_tokens=3, extra_body=salt)
    assert response.usage.input_tokens_details.cached_tokens == again.cache_read_input_tokens
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_an_answer_longer_than_what_fits_is_cut_in_other_protocols(live):
    answer = live.anthropic().messages.create(
        model=MODEL, max_tokens=10**5, messages=CHAT, timeout=60, extra_body={"seed": 1, "stop_sequences": ["e"]}
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "e")


# Reuse and isolation ----------------------------------------------------------------------------------------


def ask(client, salt, text=NOTE, **extra):
    body = {"cache_salt": salt, **extra}
    return client.completions.create(model=MODEL, prompt=text, temperature=0, max_tokens=2, extra_body=body)


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_requests_share_kv_only_under_the_same_salt(client):
    text = "Only this test says so. " + NOTE
    assert cached(ask(client, "mine", text)) == 0
    again = ask(client, "mine", text)
    assert cached(again) == again.usage.prompt_tokens - 1
    assert cached(ask(client, "yours", text)) == 0
    assert cached(ask(client, None, text)) < 16  # others ask without a salt too


def test_a_prompt_that_is_not_kept_is_not_found(client):
    ask(client, "brief", keep=False)
    assert cached(ask(client, "brief")) == 0


def test_reuse_options_of_a_request(client):
    ask(client, "options")
    behind = "Something new comes first. " + NOTE
    naive = ask(client, "options", behind, keep=False, reuse={"method": "naive"})
    full = ask(client, "options", behind, keep=False, reuse={"method": "full"})
    assert cached(naive) == naive.sparsex["reused_tokens"] > 30
    assert naive.sparsex["computed_fraction"] < 0.5
    assert (cached(full), full.sparsex["computed_fraction"], full.sparsex["confidence"]) == (0, 1.0, 1.0)
    assert naive.sparsex["confidence"] is None
    focus = ask(client, "options", behind, keep=False, reuse={"method": "focus", "coverage": 0.5, "tail_tokens": 0})
    assert 0.5 <= focus.sparsex["confidence"] <= 1


def test_the_token_map_agrees_with_the_report(client):
    ask(client, "map")
    reuse = {"boundary_layer": 2, "tail_tokens": 0}  # the usual tail would be all of the note
    answer = ask(client, "map", "Something new comes first. " + NOTE, return_token_map=True, reuse=reuse)
    report, tokens = answer.sparsex, answer.sparsex["token_map"]
    assert "".join(tokens["text"]) == "Something new comes first. " + NOTE
    counts = {kind: sum(n for k, n in tokens["kind"] if k == kind) for kind in KINDS}
    counts["recomputed"] = report["recomputed_tokens"]  # which the map shows as reused and active
    counts["reused"] -= counts["recomputed"]
    assert counts == {kind: report[f"{kind}_tokens"] for kind in KINDS}
    assert sum(n for active, n in tokens["active"] if active) == report["active_tokens"]
    first, second = tokens["layers"]
    assert (first["start"], first["end"], second["start"]) == (0, 2, 2)
    assert second["computed"] == tokens["active"]
    assert sum(n for computed, n in first["computed"] if computed) == report["prompt_tokens"] - report["prefix_tokens"]
    kinds = [kind for kind, n in tokens["kind"] for _ in range(n)]
    segment = report["segments"][0]
    assert set(kinds[segment["start"] : segment["start"] + segment["length"] - 1]) == {"reused"}


def test_cached_tokens_are_those_not_recomputed():
    kind = np.array(
        [TokenKind.PREFIX] * 3 + [TokenKind.APPROXIMATE] + [TokenKind.REUSED] * 5 + [TokenKind.FRESH], np.uint8
    )
    active = np.array([False] * 4 + [True, True, False, False, False, True])
    assert cached_tokens(report_of(kind, active)) == 3 + 1 + 3


def test_run_lengths():
    assert run_lengths([True, True, False]) == [[True, 2], [False, 1]]
    assert run_lengths([]) == []


def test_knowledge_is_inserted_listed_reused_and_deleted(http, client):
    entry = http.post("/v1/knowledge", json={"text": NOTE, "cache_salt": "kb"}).json()
    assert entry["num_tokens"] > 30
    found = ask(client, "kb", "Something new comes first. " + NOTE, keep=False, reuse={"method": "naive"})
    assert found.sparsex["reused_tokens"] > 30
    listed = http.get("/v1/knowledge", params={"cache_salt": "kb"}).json()["data"]
    assert [(e["handle"], e["uses"] > 0) for e in listed] == [(entry["handle"], True)]
    assert http.get("/v1/knowledge").json()["data"] == []
    assert http.delete(f"/v1/knowledge/{entry['handle']}").status_code == 404  # another namespace's
    assert http.delete(f"/v1/knowledge/{entry['handle']}?cache_salt=kb").json()["deleted"]
    assert http.delete(f"/v1/knowledge/{entry['handle']}?cache_salt=kb").status_code == 404
    assert cached(ask(client, "kb", "Another thing comes first. " + NOTE, keep=False)) == 0


def test_knowledge_behind_a_preamble(http, client):
    body = {"text": list(range(100, 160)), "preamble": "Notes of the day.", "cache_salt": "preamble"}
    handle = http.post("/v1/knowledge", json=body).json()["handle"]
    answer = ask(client, "preamble", [9, 9, 9, *range(100, 160), 9], reuse={"method": "naive"})
    assert answer.sparsex["reused_tokens"] == 60
    http.delete(f"/v1/knowledge/{handle}?cache_salt=preamble")


def test_knowledge_in_company():
    texts = [list(range(start, start + 40)) for start in (100, 200, 300, 400)]
    with live_server(make_engine(company_tokens=120)) as live, live.http() as http:

        def post(text, status=200, **fields):
            answer = http.post("/v1/knowledge", json={"text": text} | fields)
            assert answer.status_code == status
            return answer.json()

        first, second = post(texts[0]), post(texts[1])
        assert [(one["company_tokens"], one["prefilled_tokens"], one["stale"]) for one in (first, second)] == [
            (0, 40, False),
            (40, 80, False),
        ]
        alone = post(texts[2], company=False)
        assert alone["company_tokens"] == 0
        assert post(texts[2], preamble=texts[3])["company_tokens"] == 40
        assert post(texts[1], company=True)["handle"] == second["handle"]
        assert post(texts[1], status=400, company=True, preamble=[1])["error"]["param"] == "company"
        assert post(texts[1], status=400, company=3)["error"]["param"] == "company"
        assert post(texts[3], cache_salt="other")["company_tokens"] == 0
        assert http.delete(f"/v1/knowledge/{first['handle']}").json()["stale"] == 1
        listed = http.get("/v1/knowledge").json()["data"]
        assert [one["stale"] for one in listed] == [True, False, False]
        metrics = http.get("/metrics").text
        assert "sparsex_remade_tokens_total 0.0" in metrics
        assert "sparsex_remade_texts_total 0.0" in metrics


def test_company_is_refused_where_there_is_none(http):
    answer = http.post("/v1/knowledge", json={"text": [1, 2, 3], "company": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "company")
    assert "--company-tokens" in answer.json()["error"]["message"]


def test_knowledge_is_inserted_while_streams_go_on():
    """The order of plans: a decode dispatch (D) behind every chunk of the text (P)."""
    engine = make_engine(prefill_tokens=64)
    order, runner = [], engine.runner
    advance, start_decode = runner.advance, runner.start_decode
    runner.advance = lambda *args: order.append("P") or advance(*args)

    def slow_decode(*args):
        """So that the stream is not done before the text has come."""
        time.sleep(0.02)
        order.append("D")
        return start_decode(*args)

    runner.start_decode = slow_decode
    with live_server(engine) as live, live.http() as http:
        body = {"prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept, since the client hangs up when it is gone
            next(lines)
            begin = len(order)
            assert http.post("/v1/knowledge", json={"text": list(range(100, 900))}).json()["num_tokens"] == 800
    inserted = order[begin : len(order) - order[::-1].index("P")]
    assert inserted.count("P") == 13
    assert not any(pair == ("P", "P") for pair in itertools.pairwise(inserted)), order


def test_a_quota_counts_texts_that_are_being_prefilled():
    quota = Quota(100)
    quota.reserve(60, [])
    with pytest.raises(QuotaError, match="keeps 60 already: together 110"):
        quota.reserve(50, [])
    quota.settle(60, None)
    quota.reserve(50, [])
    quota.settle(50, 7)
    with pytest.raises(QuotaError, match="keeps 50 already: together 110"):
        quota.reserve(60, [Entry(7, "n", 50, (), True)])
    quota.reserve(60, [Entry(7, "n", 50, (), True)], known=7)  # it is kept once
    quota.settle(60, 7)
    with pytest.raises(QuotaError):
        quota.reserve(60, [Entry(7, "n", 50, (), True), Entry(8, "n", 60, (), True)], known=8)  # another key keeps it
    quota.reserve(100, [])  # it was evicted


def test_knowledge_that_does_not_fit_is_refused(http):
    answer = http.post("/v1/knowledge", json={"text": [5] * 3000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")
    assert "3000 tokens" in answer.json()["error"]["message"]


def test_no_salt_gives_another_keys_namespace():
    def name(namespace, salt):
        return Tenant("x", namespace, 1, False, None).store_namespace(salt)

    choices = [
        ("a", "b"),
        ("ab", ""),
        ("a", None),
        ("", "ab"),
        ('a", "b', None),
        ("a", 'b", "'),
        ("null", None),
        ("", None),
    ]
    assert len({name(*choice) for choice in choices}) == len(choices)
    assert name("a", "b") == name("a", "b")


KEYS = """
[alice]
key = "sk-alice"
max_concurrent = 1
max_knowledge_tokens = 100
[bob]
sha256 = "{bob}"
[carol]
key = "sk-carol"
namespace = "alice"
metrics = true
max_knowledge_tokens = 0
"""


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("access") / "keys.toml"
    path.write_text(KEYS.format(bob=hashlib.sha256(b"sk-bob").hexdigest()))
    return Access.load(path, Limits(max_knowledge_tokens=80))


@pytest.fixture(scope="session")
def keyed(keys):
    with live_server(make_engine(), access=keys) as live:
        yield live


def test_keys_are_bound_to_namespaces(keyed):
    alice, bob, carol = (keyed.client(f"sk-{name}") for name in ("alice", "bob", "carol"))
    ask(alice, "same")
    assert cached(ask(bob, "same")) == 0
    assert cached(ask(carol, "same")) > 0  # of the same namespace
    with keyed.http("sk-alice") as a, keyed.http("sk-bob") as b:
        handle = a.post("/v1/knowledge", json={"text": NOTE}).json()["handle"]
        assert b.get("/v1/knowledge").json()["data"] == []
        assert b.delete(f"/v1/knowledge/{handle}").status_code == 404
        assert a.delete(f"/v1/knowledge/{handle}").status_code == 200
        assert a.get("/metrics").status_code == 403
    with keyed.http("sk-carol") as c:
        assert c.get("/metrics").status_code == 200


def test_a_key_keeps_no_more_knowledge_than_its_limit(keyed):
    def keep(http, start, length, **fields):
        return http.post("/v1/knowledge", json={"text": list(range(start, start + length)), **fields})

    with keyed.http("sk-alice") as alice, keyed.http("sk-bob") as bob, keyed.http("sk-carol") as carol:
        first = keep(alice, 100, 60, preamble="Not kept, so it does not count.").json()
        assert keep(alice, 200, 40, cache_salt="another").status_code == 200
        refused = keep(alice, 300, 1)
        assert refused.status_code == 403
        assert refused.json()["error"] == {
            "message": "text has 1 tokens, and this key keeps 100 already: together 101, "
            "and max_knowledge_tokens=100 is its limit",
            "type": "permission_error",
            "param": "text",
            "code": "knowledge_quota",
        }
        again = keep(alice, 100, 60, preamble="Not kept, so it does not count.")
        assert (again.status_code, again.json()["handle"]) == (200, first["handle"])
        assert keep(alice, 100, 60).status_code == 403  # behind another preamble it is another entry
        assert keep(carol, 400, 1).status_code == 403  # of the same namespace, with a limit of its own
        assert carol.delete(f"/v1/knowledge/{first['handle']}").status_code == 200
        assert keep(alice, 300, 60).status_code == 200
        assert [keep(bob, 500, length).status_code for length in (81, 80)] == [403, 200]  # the server's default


def test_requests_without_a_known_key_are_refused(reference, keys):
    with scripted(reference, lambda prompt: FOREVER, access=keys) as live:
        with pytest.raises(openai.AuthenticationError):
            live.client("sk-mallory").models.list()
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": ""})  # 401 comes before 400
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        ("alice = 1", r"\[alice\] must be a table"),
        ("[alice", "cannot be read as TOML"),
        ("[alice]\nkeys = 'x'", "'keys' is unknown"),
        ("[alice]\nkey = 5", "key=5 must be a text, not empty"),
        ("[alice]\nkey = ''", "key='' must be a text, not empty"),
        ("[alice]\nkey = 'sk alice'", "key must be ASCII without blanks"),
        ("[alice]\nkey = 'schlüssel'", "key must be ASCII without blanks"),
        ("[alice]\nkey = 'x'\nmax_concurrent = '4'", "max_concurrent='4' must be an integer"),
        ("[alice]\nkey = 'x'\nmax_concurrent = true", "max_concurrent=True must be an integer"),
        ("[alice]\nkey = 'x'\nmetrics = 1", "metrics=1 must be true or false"),
        ("[alice]\nsha256 = 'not a digest'", "sha256='not a digest' must be 64 hex digits"),
        (f"[alice]\nsha256 = '{'0' * 63}'", "must be 64 hex digits"),
        (f"[alice]\nsha256 = 'sha256:{'0' * 64}'", "must be 64 hex digits"),
        ("[alice]\nnamespace = 'x'", "either key or sha256"),
        ("[alice]\nkey = 'x'\nmax_concurrent = 0", "max_concurrent=0 must be at least 1"),
        ("[alice]\nkey = 'x'\nmax_knowledge_tokens = -1", "max_knowledge_tokens=-1 must be at least 0"),
        ("[alice]\nkey = 'x'\n[bob]\nkey = 'x'", r"\[bob\] has the same key as \[alice\]"),
        (
            f"[alice]\nkey = 'x'\n[bob]\nsha256 = '{hashlib.sha256(b'x').hexdigest().upper()}'",
            r"\[bob\] has the same key as \[alice\]",
        ),
        ("[alice]\nkey = 'x'\n[alice]\nkey = 'y'", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_of_keys_is_refused(tmp_path, text, said):
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequestError, match=said):
        Access.load(path, Limits())


# Limits and faults ------------------------------------------------------------------------------------------

BAD_CHATS = {
    "no messages": ({}, "messages", "required"),
    "empty messages": ({"messages": []}, "messages", "at least 1"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "text",
    ),
    "many answers": ({"n": 33}, "n", "1 prompts with n=33 make 33 answers; the limit is 32"),
    "no answer": ({"n": 0}, "n", "greater than or equal to 1, not 0"),
    "fewer tokens than none": ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0, not -1"),
    "more tokens than the context": (
        {"max_completion_tokens": 2048},
        "max_completion_tokens",
        "maximum context length is 2048 tokens. However, you requested",
    ),
    "long prompt": (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        "messages",
        "maximum context length is 2048 tokens. However, you requested",
    ),
    "temperature": ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    "not a number": ({"temperature": float("nan")}, "temperature", "finite"),
    "top_p": ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    "top_k": ({"top_k": 2**31}, "top_k", "less than or equal to 2147483647"),
    "fewest tokens": ({"min_tokens": 3}, "min_tokens", "at most the 2 tokens"),
    "stop token": ({"stop_token_ids": [None]}, "stop_token_ids", "has None"),
    "no token allowed": ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    "truncated to nothing": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1, or from 1 to"),
    "bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    "bias outside the vocabulary": ({"logit_bias": {"99999": 1}}, "logit_bias", "49151"),
    "too much bias": ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    "many stops": ({"stop": ["x"] * 17}, "stop", "at most 16 items after validation, not 17"),
    "long stop": ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
    "stop of another type": ({"stop": 5}, "stop", "a string or a list, not 5"),
    "content of another type": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages",
        "a string or a list, not 5",
    ),
    "bias of a text": ({"logit_bias": {"5": "x"}}, "logit_bias", "of token 5 is 'x'"),
    "bias of no integer": ({"logit_bias": {"1_0": 1}}, "logit_bias", "token ids"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    "empty salt": ({"cache_salt": ""}, "cache_salt", "at least 1"),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
    "forced tool": ({"tool_choice": "required"}, "tool_choice", "tools has no entries"),
    "tool choice": ({"tools": [{}], "tool_choice": "always"}, "tool_choice", "'required'"),
    "method": ({"reuse": {"method": "magic"}}, "reuse.method", "magic"),
    "reuse field": ({"reuse": {"boundry": 3}}, "reuse.boundry", "not permitted"),
    "boundary": ({"reuse": {"boundary_layer": 7}}, "reuse.boundary_layer", "at most 6"),
    "boundaries": (
        {"reuse": {"boundary_layer": 3, "second_boundary": 2}},
        "reuse.second_boundary",
        "larger than boundary_layer=3",
    ),
    "ratio": ({"reuse": {"recompute_ratio": 2}}, "reuse.recompute_ratio", "0 to 1"),
    "option of others": ({"reuse": {"method": "naive", "head_tokens": 2}}, "reuse.head_tokens", "for method 'naive'"),
    "no ratio": ({"reuse": {"recompute_ratio": None}}, "reuse.recompute_ratio", "valid number"),
    "oracle": ({"reuse": {"method": "oracle"}}, "reuse.method", "unknown"),
}


@pytest.mark.parametrize(("fields", "param", "said"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_chats(http, fields, param, said):
    body = {"messages": CHAT, "max_tokens": 2} | fields if fields else {}
    if fields.get("max_completion_tokens"):
        del body["max_tokens"]
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] is not None
    assert error["param"].startswith(param.partition("[")[0])
    assert said in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["x"] * 33}, "prompt"),
        ({"prompt": "x", "echo": 5}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": [1, None]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": "x", "max_tokens": 2, "n": 17, "best_of": 33}, "best_of"),
    ],
)
def test_bad_completions(http, fields, param):
    answer = http.post("/v1/completions", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition("[")[0].partition(".")[0] == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{nope",
        b"[1]",
        b"5",
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": "x", "tools": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"prompt": ' + b"1" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',  # half a character
        '{"prompt": "x"}'.encode("utf-16"),
    ],
)
def test_bodies_that_are_not_objects_are_refused(http, content):
    answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_another_model_is_not_served(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=CHAT)
    assert refused.value.code == "model_not_found"


def test_unknown_paths_and_methods(http):
    assert (http.get("/v1/nothing").status_code, http.get("/v1/completions").status_code) == (404, 405)
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_not_read(reference, announced):
    body = json.dumps({"prompt": "x" * 5000}).encode()
    with scripted(reference, lambda prompt: FOREVER, limits=Limits(max_body_bytes=1000)) as live, live.http() as http:
        content = body if announced else iter([body[:900], body[900:]])
        answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "limit of 1000 bytes" in answer.json()["error"]["message"]


def test_a_key_may_have_no_more_concurrent_requests_than_its_limit(reference, keys):
    with scripted(reference, lambda prompt: FOREVER, access=keys) as live:
        alice, bob = live.client("sk-alice"), live.client("sk-bob")
        with alice.completions.create(model=MODEL, prompt="x", stream=True):
            with pytest.raises(openai.RateLimitError, match="max_concurrent=1") as refused:
                alice.completions.create(model=MODEL, prompt="x")
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            with bob.completions.create(model=MODEL, prompt="x", stream=True) as others:
                assert next(others).choices[0].text == "..."
        wait_for(lambda: live.worker.loop.tickets[0].done)
        with alice.completions.create(model=MODEL, prompt="x", stream=True) as again:
            assert next(again).choices[0].text == "..."


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (OverloadedError("256 requests wait already", 2.5), 503, "3"),
        (StoreFullError("no room"), 503, "1"),
        (InvalidRequestError("min_segment_tokens=3 must be an integer >= 16"), 400, None),
        (RuntimeError("a secret"), 500, None),
    ],
)
def test_requests_that_the_loop_refuses(stage, error, status, retry):
    def refuse(prompt):
        raise error

    stage.worker.loop.script = refuse
    with stage.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry)
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(NonFiniteLogitsError("not finite"), 500), (StoreFullError("no room"), 503), (InvalidRequestError("pool=1"), 400)],
)
def test_a_failure_before_the_first_token_gives_a_status(stage, error, status, stream):
    stage.worker.loop.script = lambda prompt: [Event("", (), finish_reason="error", error=error)]
    with stage.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert answer.status_code == status
        assert http.get("/health").status_code == 200


def test_a_later_failure_gives_an_error_event_in_the_stream(stage):
    script = [Event("well", (1,)), Event("", (), finish_reason="error", error=NonFiniteLogitsError("NaN"))]
    stage.worker.loop.script = lambda prompt: script
    stream = stage.client().completions.create(model=MODEL, prompt="x", stream=True)
    assert next(stream).choices[0].text == "well"
    with pytest.raises(openai.APIError, match="internal error"):
        next(stream)


def test_a_request_that_takes_too_long_is_cancelled(reference):
    with scripted(reference, lambda prompt: FOREVER, limits=Limits(request_timeout=1)) as live, live.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "time_limit")
        assert live.worker.loop.tickets[0].cancelled


def test_a_broken_loop_shows_in_the_servers_health(reference):
    with scripted(reference, lambda prompt: FOREVER) as live, live.http() as http:
        live.worker.loop.broken = RuntimeError("broken")
        live.worker.wake()
        wait_for(lambda: live.worker.failure is not None)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "failed")


# Clients that disconnect -----------------------------------------------------------------------------------


def test_closing_a_stream_frees_its_pages(live, client):
    stream = client.completions.create(
        model=MODEL, prompt=NOTE, max_tokens=1500, stream=True, extra_body={"ignore_eos": True, "keep": False}
    )
    next(iter(stream))
    with live.http() as http:
        assert http.get("/v1/store").json()["active"] > 0
        stream.close()
        wait_for(lambda: http.get("/v1/store").json()["active"] == 0)
    assert live.worker.loop.stats.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_before_its_answer_cancels_its_request(reference, stream):
    with scripted(reference, lambda prompt: [None]) as live:
        tickets = live.worker.loop.tickets
        hang_up_when(live, {"prompt": "x", "stream": stream}, lambda: tickets)
        wait_for(lambda: tickets[0].cancelled)


def test_of_knowledge_whose_sender_disconnects_nothing_is_kept(reference):
    with live_server(reference) as live:
        loop, heard = live.worker.loop, []
        remember = loop.remember

        def slow(*args, **options):  # the sender is gone before the loop's next round
            heard.append(remember(*args, **options))
            time.sleep(0.3)
            return heard[-1]

        loop.remember = slow
        try:
            hang_up_when(live, {"text": NOTE * 3}, lambda: heard, path="/v1/knowledge")
            wait_for(lambda: not loop.stats.running and not loop.stats.waiting)
        finally:
            del loop.remember
        with live.http() as http:
            assert http.get("/v1/knowledge").json()["data"] == []
            assert http.get("/v1/store").json()["frozen"] == 0


def hang_up_when(live, body, condition, path="/v1/completions"):
    """Send a request, and close the connection as soon as `condition()` is true."""
    address = urllib.parse.urlsplit(live.url)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + content)
        wait_for(condition)


# Shutdown ---------------------------------------------------------------------------------------------------


def test_draining_finishes_running_requests_and_refuses_new_ones(reference):
    release = threading.Event()

    def script(prompt):
        yield Event("a", (1,))
        release.wait(30)
        yield Event("b", (2,), finish_reason="stop")

    with scripted(reference, script) as live:
        stream = live.client().completions.create(model=MODEL, prompt="x", stream=True)
        assert next(stream).choices[0].text == "a"
        live.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            live.client().completions.create(model=MODEL, prompt="x")
        assert refused.value.status_code == 503
        with live.http() as http:
            assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "draining")
            assert http.post("/v1/knowledge", json={"text": "x"}).status_code == 503
        release.set()
        assert [chunk.choices[0].text for chunk in stream] == ["b"]
        wait_for(lambda: live.server.should_exit)


SERVE = """
import sys
sys.path.insert(0, {tests!r})
from live import ScriptedLoop, make_engine
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.worker import Worker

loop = ScriptedLoop(lambda prompt: [Event("...", (1,)), None])
app = create_app(Worker(make_engine(), loop), model="tiny", limits=Limits(drain_timeout=1))
Server(app, "127.0.0.1", {port}).run()
"""


@pytest.mark.slow
def test_sigterm_drains_and_ends_the_process_with_code_0():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = SERVE.format(tests=os.path.dirname(__file__), port=port)
    process = subprocess.Popen([sys.executable, "-c", source])
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 120)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=MODEL, prompt="x", stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model=MODEL, prompt="x")
        with pytest.raises(openai.APIError, match="gave this request up"):  # the deadline
            list(stream)
        assert process.wait(30) == 0
    finally:
        process.kill()


# Metrics, and random requests -------------------------------------------------------------------------------


def test_an_idle_server_heals_a_conversation():
    """Turn one reuses knowledge, turn two has it as an approximate prefix, and after a rest all of it is exact."""
    with live_server(make_engine(healing=1.0)) as live, live.http() as http:
        http.post("/v1/knowledge", json={"text": NOTE * 2, "cache_salt": "heal"}).raise_for_status()
        messages = [{"role": "user", "content": f"Read: {NOTE * 2} And now?"}]
        body = {"messages": messages, "max_tokens": 4, "temperature": 0, "cache_salt": "heal", "model": MODEL}
        answer = http.post("/v1/chat/completions", json=body | {"reuse": {"only_if_faster": False}}).json()
        assert answer["sparsex"]["reused_tokens"] > 0
        wait_for(lambda: "sparsex_approximate_tokens 0.0" in http.get("/metrics").text)
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        report = http.post("/v1/chat/completions", json=body | {"reuse": {"method": "prefix"}}).json()["sparsex"]
        assert report["prefix_tokens"] > answer["sparsex"]["prompt_tokens"] - 10
        assert live.worker.loop.stats.healed_tokens > 0


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/messages", "POST"),
    ("/v1/messages/count_tokens", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/tokenizer_info", "GET"),
    ("/version", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/knowledge", "POST"),
    ("/v1/knowledge", "GET"),
    ("/v1/knowledge/{handle}", "DELETE"),
    ("/v1/store", "GET"),
    ("/v1/pins", "GET"),
    ("/v1/pins/{key}", "DELETE"),
    ("/v1/load_lora_adapter", "POST"),
    ("/v1/unload_lora_adapter", "POST"),
    ("/health", "GET"),
    ("/health/live", "GET"),
    ("/health/ready", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="session")
def api():
    """The OpenAPI description of a server whose answers have at most 3 tokens."""
    with live_server(make_engine(), limits=Limits(max_tokens=3)) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_every_operation_is_checked(api):
    found = {(result.ok().path, result.ok().method.upper()) for result in api.get_all_operations()}
    assert found == set(OPERATIONS)


def check_operation(operation, examples):
    """Send valid and invalid requests. None gives an internal error, and errors have OpenAI's or Anthropic's fields."""
    fields = {"type", "message"} if "messages" in operation.path else {"message", "type", "param", "code"}
    cases = operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        derandomize=True,
        database=None,
    )
    @given(case=cases)
    def check(case):
        response = case.call(timeout=120)
        assert response.status_code < 500, response.content
        if response.status_code >= 400:
            assert set(json.loads(response.content)["error"]) == fields

    check()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_breaks_the_server(api, path, method):
    check_operation(api[path][method], 10)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_breaks_the_server_with_more_examples(api, path, method):
    check_operation(api[path][method], 300)


# Texts of tokens --------------------------------------------------------------------------------------------


def test_bytes_of_tokens_make_the_text(tokenizer):
    texts, text = TokenText(tokenizer), "Ein Café, 東京 und 🙂: naïve"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(texts.bytes_of, tokens)).decode() == text
    assert len({texts.name_of(token) for token in set(tokens)}) == len(set(tokens))


def test_a_log_probability_of_minus_infinity_is_still_json(stage):
    token = TokenLogprobs(5, float("-inf"), ((5, float("-inf")),))
    stage.worker.loop.script = lambda prompt: [Event("a", (5,), finish_reason="stop", logprobs=(token,))]
    answer = stage.client().completions.create(model=MODEL, prompt="x", logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs == [-9999.0]


# The command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "compiled"), [([], ["ahead", "compiled"]), (["--no-warm-up"], [])])
def test_the_command_compiles_before_it_listens(reference, monkeypatch, arguments, compiled):
    happened = []
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda _: reference)
    monkeypatch.setattr("sparsex_jax.scheduler.warmup.steps_ahead", lambda *_: [lambda: happened.append("ahead")])
    monkeypatch.setattr("sparsex_jax.scheduler.warmup.steps", lambda *_: [lambda: happened.append("compiled")])
    monkeypatch.setattr("sparsex_jax.serving.server.Server.run", lambda _: happened.append("listened"))
    assert CliRunner().invoke(app, ["serve", "--port", "0", *arguments]).exit_code == 0
    assert happened == [*compiled, "listened"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-keys", "no-such-file.toml"], "no-such-file.toml cannot be read as TOML"),
        (["--max-tokens", "0"], "max_tokens=0 must be more than 0"),
        (["--request-timeout", "-1"], "request_timeout=-1.0 must be more than 0"),
        (["no-such-model"], "no-such-model"),
        (["--reasoning-parser", "qwen"], "reasoning_parser='qwen' must be one of auto, none, qwen3"),
        (["--allowed-origins", "*", "--allow-credentials"], "allow_credentials needs origins by name"),
    ],
)
def test_the_command_refuses_bad_options(arguments, said):
    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
