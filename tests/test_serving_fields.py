"""Fields of requests: those that change the answer are done or refused, all others are taken or named in a header."""

import json
import time

import httpx
import numpy as np
import pytest
from conftest import report_of, tiny_engine
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from live import MODEL, ScriptedLoop, live_server, make_engine
from pydantic import ValidationError
from starlette.testclient import TestClient

from sparsex_jax import InvalidRequestError, SamplingParams
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving import extras
from sparsex_jax.serving.access import Limits, Tenant
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.faults import RequestError, fault_of
from sparsex_jax.serving.intake import Intake
from sparsex_jax.serving.lengths import Lengths, longest_token
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, KnowledgeRequest
from sparsex_jax.serving.worker import Worker

CHAT = [{"role": "user", "content": "Which harbour opens at dawn?"}]
JSON = {"Content-Type": "application/json"}
NOBODY = Tenant("nobody", "", 64, True, None)


@pytest.fixture(scope="module")
def reference():
    """Whose store is smaller than the model's 2048 positions: 1000 tokens, in whole pages of 64."""
    return make_engine(store_tokens=1000)


@pytest.fixture(scope="module")
def live():
    with live_server(make_engine(store_tokens=1000)) as live:
        yield live


@pytest.fixture(scope="module")
def quick(reference):
    """A server with a scripted loop, for what does not need a model's answer."""
    words = [Event("one ", (5,), report=report_of([0], [True])), Event("two", (6,), finish_reason="stop")]
    with TestClient(create_app(Worker(reference, ScriptedLoop(lambda prompt: list(words))), model=MODEL)) as client:
        yield client


@pytest.fixture
def http(live):
    with live.http() as http:
        yield http


@pytest.fixture(scope="module")
def intake(reference):
    return Intake(reference, Limits())


def chat(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 6, "temperature": 0} | fields)


def complete(http, prompt="The harbour", **fields):
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "keep": False}
    return http.post("/v1/completions", json=body | fields)


def choice(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def streamed(http, path, body):
    content = json.dumps(body | {"stream": True}).encode()
    with http.stream("POST", path, content=content, headers=JSON) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return answer, [json.loads(line) for line in lines[:-1]]


# Fields that the schemas have not ----------------------------------------------------------------------------

REFUSED = {
    "structural_tag": {},
    "structured_outputs": {"structural_tag": {}},
    "guided_whitespace_pattern": " *",
    "ebnf": "root ::= [a-z]",
    "bad_words": ["Hello"],
    "use_beam_search": True,
    "length_penalty": 2.0,
    "suffix": "x",
    "logprob_token_ids": [5],
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "web_search_options": {},
    "reasoning_effort": "high",
    "verbosity": "low",
    "include_reasoning": False,
    "mirostat": 2,
    "typical_p": 0.9,
    "functions": [{"name": "f"}],
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(quick, name, value):
    for answer in (complete(quick, **{name: value}), chat(quick, **{name: value})):
        error = error_of(answer)
        assert (error["param"].partition(".")[0], error["code"]) == (name, "unsupported_parameter")
        assert error["message"].startswith(name)


def test_values_that_change_nothing_are_taken(quick):
    neutral = {name: None for name in extras.REFUSED if name not in CompletionRequest.model_fields}
    neutral |= {name: refusal.neutral[-1] for name, refusal in extras.REFUSED.items() if refusal.neutral}
    taken = {name: "x" for name in extras.TAKEN if "." not in name} | {"metadata": {"a": "b"}, "store": True}
    usual = {"response_format": {"type": "text"}, "stream_options": {"include_obfuscation": False}, "stop": None}
    answer = complete(quick, **neutral, **taken, **usual)
    assert choice(answer)["text"] == "one two"
    assert not {"warning", "x-sparsex-ignored-fields"} & answer.headers.keys()


def test_no_field_is_both_done_and_refused():
    done = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert not done & (extras.REFUSED.keys() | extras.TAKEN)
    assert not extras.TAKEN & extras.REFUSED.keys()


def test_a_value_equal_to_a_neutral_one_is_not_it_if_it_has_another_type(quick):
    assert error_of(complete(quick, use_beam_search="False"))["param"] == "use_beam_search"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_unknown_fields_are_named_in_a_header(http, path):
    asked = {"messages": CHAT} if "chat" in path else {"prompt": "x"}
    more = {
        "tempratur": 1,
        "stream_options": {"speed": 2},
        "r\u00e9sum\u00e9\r\nX: 1": 3,
        "x" * 500: 4,
        "": 5,
        " ": 7,
    }
    body = asked | {"max_tokens": 2} | more
    for answer in (http.post(path, content=json.dumps(body).encode(), headers=JSON), streamed(http, path, body)[0]):
        assert answer.status_code == 200
        names = answer.headers["X-Sparsex-Ignored-Fields"].split(", ")
        assert set(names) == {
            "tempratur",
            "stream_options.speed",
            "r%C3%A9sum%C3%A9%0D%0AX%3A%201",
            "x" * 64 + "...",
            "''",
            "%20",
        }
        assert answer.headers["Warning"].startswith("299 ")
        assert "tempratur" in answer.headers["Warning"]


def test_a_header_names_only_a_few_of_many_unknown_fields():
    body = CompletionRequest.model_validate({"prompt": "x"} | {f"field{number}": 0 for number in range(100)})
    assert extras.headers_of(body)["X-Sparsex-Ignored-Fields"].endswith("field15, and 84 more")


def test_a_header_does_not_end_in_a_space():
    body = CompletionRequest.model_validate({"prompt": "x", "a ": 0, " ": 0, "": 0})
    assert extras.headers_of(body)["X-Sparsex-Ignored-Fields"] == "a%20, %20, ''"


# Fields that vLLM has and OpenAI has not ---------------------------------------------------------------------


def test_tokens_that_stop_or_are_allowed(http, reference):
    allowed = [504, 505, 506]
    answer = choice(complete(http, allowed_token_ids=allowed, return_token_ids=True))
    assert set(answer["token_ids"]) <= set(allowed)
    first = choice(complete(http, return_token_ids=True))["token_ids"][0]
    stopped = choice(complete(http, stop_token_ids=[first], return_token_ids=True))
    assert (stopped["text"], stopped["token_ids"], stopped["finish_reason"]) == ("", [first], "stop")
    shown = choice(complete(http, stop_token_ids=[first], include_stop_str_in_output=True))
    assert shown["text"] == reference.tokenizer.decode([first])
    least = choice(complete(http, stop_token_ids=[first], min_tokens=6, return_token_ids=True))
    assert (first in least["token_ids"], least["finish_reason"]) == (False, "length")


def test_the_stop_string_and_special_tokens_are_in_the_text_if_asked_for(http):
    forced = {"allowed_token_ids": [504]}  # the model can write nothing else
    word = choice(complete(http, max_tokens=1, **forced))["text"]
    stop = word[-2:]
    assert choice(complete(http, stop=stop, include_stop_str_in_output=True, **forced))["text"] == word
    assert (
        choice(complete(http, stop=stop, min_tokens=2, include_stop_str_in_output=True, **forced))["text"] == word * 3
    )
    special = {"allowed_token_ids": [3], "max_tokens": 2}
    assert choice(complete(http, **special))["text"] == ""
    assert choice(complete(http, **special, skip_special_tokens=False))["text"] == "<repo_name>" * 2


def test_prompts_are_cut_to_their_end(quick, reference):
    ids = reference.tokenizer("one two three four five six seven eight")["input_ids"]
    for prompt in (ids, reference.tokenizer.decode(ids)):
        cut = complete(quick, prompt, truncate_prompt_tokens=3, return_token_ids=True)
        assert choice(cut)["prompt_token_ids"] == ids[-3:]
        assert cut.json()["usage"]["prompt_tokens"] == 3
    long = complete(quick, [5] * 3000, truncate_prompt_tokens=-1, max_tokens=2)
    assert long.json()["usage"]["prompt_tokens"] == 1024 - 2
    assert choice(complete(quick, "x " * 50_000, truncate_prompt_tokens=4, max_tokens=1))
    said = error_of(complete(quick, truncate_prompt_tokens=2000))
    assert "truncate_prompt_tokens=2000 must be -1, or from 1 to the 1018 tokens" in said["message"]


class WithBegin:
    """A tokenizer that puts a token before every text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + self._tokenizer(text)["input_ids"]}

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_begin_tokens_are_added_as_asked_and_stay_when_a_prompt_is_cut():
    engine = make_engine(store_tokens=1000)
    plain = engine.tokenizer("one two three four")["input_ids"]
    engine.tokenizer = WithBegin(engine.tokenizer)
    intake = Intake(engine, Limits())

    def ids(**fields):
        request = CompletionRequest(prompt="one two three four", **fields)
        return intake.completion(request, NOBODY)[0].prompt.tolist()

    assert ids() == [1, *plain]
    assert ids(add_special_tokens=False) == plain
    assert ids(truncate_prompt_tokens=3) == [1, *plain[-2:]]
    assert ids(truncate_prompt_tokens=1) == plain[-1:]
    assert ids(truncate_prompt_tokens=3, add_special_tokens=False) == plain[-3:]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_token_ids_beside_the_text(http, reference, path):
    asked = {"messages": CHAT} if "chat" in path else {"prompt": "The harbour"}
    body = asked | {"max_tokens": 20, "temperature": 0, "return_token_ids": True, "keep": False}
    whole = http.post(path, json=body).json()
    ids = whole["choices"][0]["token_ids"]
    assert reference.tokenizer.decode(ids) == whole["choices"][0].get(
        "text", whole["choices"][0].get("message", {}).get("content")
    )
    prompt = whole if "chat" in path else whole["choices"][0]
    assert len(prompt["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    _, chunks = streamed(http, path, body)
    assert [id_ for chunk in chunks for id_ in chunk["choices"][0].get("token_ids", ())] == ids
    told = [part for chunk in chunks for part in (chunk, chunk["choices"][0]) if "prompt_token_ids" in part]
    assert [part["prompt_token_ids"] for part in told] == [prompt["prompt_token_ids"]]


def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "The harbour", "max_tokens": 20, "temperature": 0, "stream_options": options}
    _, chunks = streamed(http, "/v1/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1]["choices"]) == (20, [])


def test_no_new_tokens_is_a_prefill(http):
    for ask in (complete, chat):
        answer = ask(http, max_tokens=0)
        assert choice(answer)["finish_reason"] == "length"
        assert answer.json()["usage"]["completion_tokens"] == 0
        assert answer.json()["sparsex"]["prompt_tokens"] > 0
    _, chunks = streamed(http, "/v1/completions", {"prompt": "x", "max_tokens": 0})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [""]


# What is told of prompts --------------------------------------------------------------------------------------

SCORED = "The harbour of the old town opens at dawn, and the first boats leave it for the banks in the west."
# As lm-eval's `local-completions` asks for the log-likelihood of a continuation.
LM_EVAL = {"model": MODEL, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def expected_logprobs(reference, tokens, number=0):
    sampling = SamplingParams(0, prompt_logprobs=number)
    return reference.generate(tokens, sampling, keep=False).prompt_logprobs


def log_likelihood(told, start):
    """What lm-eval makes of a choice: the sum over a continuation, and whether it is the greedy one."""
    values, top = told["token_logprobs"][start:-1], told["top_logprobs"][start:-1]
    return sum(values), all(value == max(best.values()) for value, best in zip(values, top, strict=True))


def test_log_likelihoods_as_lm_eval_asks_for_them(http, reference):
    tokens = reference.tokenizer(SCORED)["input_ids"]
    greedy = reference.generate(tokens, SamplingParams(4), keep=False).token_ids
    for end, is_greedy in ((greedy, True), (tokens[:4], False)):
        prompt = [*tokens, *end]
        answer = http.post("/v1/completions", json=LM_EVAL | {"prompt": [prompt]})
        told = choice(answer)["logprobs"]
        assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(prompt) + 1
        expected = sum(each.logprob for each in expected_logprobs(reference, prompt)[len(tokens) :])
        assert log_likelihood(told, len(tokens)) == (pytest.approx(expected, abs=1e-3), is_greedy)


def test_a_continuation_is_scored_behind_what_is_reused(http, reference):
    tokens = reference.tokenizer(SCORED + " " + SCORED)["input_ids"]
    body = LM_EVAL | {"prompt": [tokens[7:]], "cache_salt": "behind"}
    reused = {"reuse": {"method": "naive"}, "prompt_logprobs_start": -6}
    http.post("/v1/completions", json=body | {"prompt": [tokens], "reuse": {"method": "naive"}})
    approximate, exact = (http.post("/v1/completions", json=body | more).json() for more in (reused, {}))
    assert exact["sparsex"]["fresh_tokens"] == len(tokens) - 7
    assert approximate["sparsex"]["fresh_tokens"] < 16 < approximate["sparsex"]["reused_tokens"]
    values = approximate["choices"][0]["logprobs"]["token_logprobs"]
    assert [value is None for value in values] == [True] * (len(values) - 7) + [False] * 7
    whole = exact["choices"][0]["logprobs"]["token_logprobs"]
    assert whole[0] is None
    assert 0 < np.abs(np.subtract(values[-7:], whole[-7:])).max() < 3


@pytest.mark.parametrize("number", [None, 0, 2])
def test_prompts_stand_before_answers(live, reference, number):
    body = {"model": MODEL, "temperature": 0, "echo": True, "logprobs": number, "max_tokens": 3}
    whole = live.client().completions.create(prompt=SCORED, **body).choices[0]
    parts = [part.choices[0] for part in live.client().completions.create(prompt=SCORED, stream=True, **body)]
    assert whole.text == "".join(part.text for part in parts)
    assert whole.text.startswith(SCORED)
    assert len(whole.text) > len(SCORED)
    if number is None:
        assert whole.logprobs is None
        return
    told = whole.logprobs
    for name in ("tokens", "text_offset"):
        assert getattr(told, name) == [each for part in parts for each in getattr(part.logprobs, name)]
    assert all(whole.text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))
    expected = expected_logprobs(reference, SCORED, number)
    values = [each.logprob for each in expected[1:]]
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1 : len(expected)], values, atol=1e-4)
    assert (told.top_logprobs is None) == (number == 0)
    if number:
        assert told.top_logprobs[0] is None
        assert {len(top) for top in told.top_logprobs[1:]} <= {2, 3}


def test_prompts_are_repeated_without_an_answer(http, reference):
    ids = [reference.tokenizer(text)["input_ids"] for text in ("One harbour", "Two h\u00e4fen \u4f60")]
    answer = complete(http, ids, echo=True, max_tokens=0, logprobs=0).json()
    assert [each["text"] for each in answer["choices"]] == ["One harbour", "Two h\u00e4fen \u4f60"]
    assert [len(each["logprobs"]["tokens"]) for each in answer["choices"]] == [len(each) for each in ids]
    assert answer["usage"]["completion_tokens"] == 0


def test_log_probabilities_of_prompts_as_vllm_tells_them(http, reference):
    for answer in (complete(http, SCORED, prompt_logprobs=2), complete(http, SCORED, prompt_logprobs=2, n=2)):
        told = choice(answer)["prompt_logprobs"]
        expected = expected_logprobs(reference, SCORED, 2)
        assert told[0] is expected[0] is None
        for entry, each in zip(told[1:], expected[1:], strict=True):
            assert entry[str(each.token_id)]["logprob"] == pytest.approx(each.logprob, abs=1e-4)
            assert entry[str(each.token_id)]["rank"] == each.rank
            ranks = {id_: line["rank"] for id_, line in entry.items()}
            assert {str(id_): rank for rank, (id_, _) in enumerate(each.top, start=1)}.items() <= ranks.items()
    answer = chat(http, prompt_logprobs=0).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat(http, prompt_logprobs=False).json()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs_start": 1}, "prompt_logprobs_start"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": -999}, "prompt_logprobs_start"),
    ],
)
def test_what_cannot_be_told_is_refused(quick, fields, param):
    for answer in (complete(quick, **fields), chat(quick, **fields)):
        assert error_of(answer)["param"] == param


def test_chats_are_not_repeated(quick):
    assert error_of(chat(quick, echo=True))["param"] == "echo"


# Several answers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_answers_are_those_of_highest_log_probability_a_token(http):
    body = {"temperature": 1.0, "seed": 11, "max_tokens": 5, "logprobs": 0}
    everyone = complete(http, n=4, **body).json()["choices"]
    ranked = sorted(everyone, key=lambda one: -np.mean(one["logprobs"]["token_logprobs"]))
    answer = complete(http, n=2, best_of=4, **body).json()
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [
        (index, each["text"]) for index, each in enumerate(ranked[:2])
    ]
    assert answer["usage"]["completion_tokens"] == 20
    unscored = complete(http, best_of=4, **body | {"logprobs": None}).json()["choices"]
    assert [(each["text"], each["logprobs"]) for each in unscored] == [(ranked[0]["text"], None)]


@pytest.mark.parametrize(
    "more", [{}, {"keep": False}, {"reuse": {"method": "full"}, "keep": False}, {"echo": True, "logprobs": 0}]
)
def test_the_prompt_of_several_answers_is_computed_once(http, live, more):
    prompt = f"{more} " + SCORED * 4
    body = {"prompt": prompt, "n": 3, "max_tokens": 3, "cache_salt": "several", "temperature": 1.0}
    reports = [each["sparsex"] for each in http.post("/v1/completions", json=body | more).json()["choices"]]
    fresh = sum(report["fresh_tokens"] for report in reports)
    assert reports[0]["prompt_tokens"] <= fresh <= reports[0]["prompt_tokens"] + 2
    found = http.post("/v1/completions", json=body | {"n": 1, "max_tokens": 0}).json()["sparsex"]["prefix_tokens"]
    assert (found > 64) == ("keep" not in more)


def test_several_answers_to_several_prompts(quick, intake, reference):
    prompts, body = ["One harbour", "Two harbours"], {"temperature": 1.0, "seed": 2**32 - 2, "n": 3, "best_of": 3}
    answer = complete(quick, prompts, **body).json()
    assert [each["index"] for each in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == sum(len(reference.tokenizer(text)["input_ids"]) for text in prompts)
    assert answer["usage"]["completion_tokens"] == 12
    jobs = intake.completion(CompletionRequest(prompt=prompts, **body), NOBODY)
    assert [reference.tokenizer.decode(job.prompt) for job in jobs] == [text for text in prompts for _ in range(3)]
    assert [job.sampling.seed for job in jobs] == [2**32 - 2, 2**32 - 1, 0] * 2


def test_each_answer_is_that_of_its_seed(http, reference):
    answer = complete(http, "One harbour", max_tokens=8, temperature=1.0, seed=7, n=2).json()
    alone = [reference.generate("One harbour", SamplingParams(8, 1.0, seed=seed), keep=False) for seed in (7, 8)]
    assert [each["text"] for each in answer["choices"]] == [each.text for each in alone]


def test_several_answers_in_a_chat_and_its_stream(http):
    body = {"messages": CHAT, "max_tokens": 5, "temperature": 1.0, "seed": 3, "n": 2, "return_token_map": True}
    whole = http.post("/v1/chat/completions", json=body).json()
    _, chunks = streamed(http, "/v1/chat/completions", body)
    texts = ["", ""]
    for chunk in chunks:
        [part] = chunk["choices"]
        texts[part["index"]] += part["delta"].get("content", "")
    assert texts == [each["message"]["content"] for each in whole["choices"]]
    assert all(each["sparsex"]["token_map"]["text"] for each in whole["choices"])


# Lengths ------------------------------------------------------------------------------------------------------


def promised(http):
    return http.get("/v1/models").json()["data"][0]["max_model_len"]


@pytest.mark.parametrize(("store_tokens", "context"), [(500, 512), (10, 16), (1024, 1024), (1090, 1024)])
def test_every_prompt_that_is_shorter_than_the_promise_is_answered(store_tokens, context):
    """The store has whole pages of 16 tokens; the model takes 1024 positions."""
    engine = tiny_engine(store_tokens=store_tokens)
    lengths = Lengths(engine, Limits())
    assert lengths.context == context

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.integers(1, lengths.context - 1) | st.just(lengths.context - 1), st.integers(0, 5000) | st.none())
    def check(length, wanted):
        named = None if wanted is None else ("max_tokens", wanted)
        room = lengths.context - length
        if wanted is not None and wanted > room:
            with pytest.raises(RequestError) as refused:
                lengths.new_tokens(length, named, None, "prompt")
            assert fault_of(refused.value).code == "context_length_exceeded"
            return
        most = lengths.new_tokens(length, named, None, "prompt")
        assert most == min(room if wanted is None else wanted, room, Limits().max_tokens)
        engine.loop.requests.generation([5] * length, SamplingParams(most), reuse=None, namespace="a", keep=False)

    check()


def test_what_can_never_fit_is_not_told_to_come_again(http):
    limit = promised(http)
    assert limit == 1024
    for body in ({"prompt": [5] * limit}, {"prompt": [5] * 3000}, {"prompt": [5] * 1000, "max_tokens": 25}):
        answer = http.post("/v1/completions", json=body)
        error = error_of(answer)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 1024 tokens. However, you requested")
        assert "retry-after" not in answer.headers
        assert error["param"] == ("max_tokens" if "max_tokens" in body else "prompt")
    knowledge = http.post("/v1/knowledge", json={"text": [5] * 480, "preamble": [6] * 100})
    assert "maximum context length" in error_of(knowledge)["message"]  # 10 pages, and 8 more for a moment


def test_the_answer_is_as_long_as_fits_where_no_number_is_named(reference):
    intake = Intake(reference, Limits(max_tokens=400))
    most = {}
    for length in (10, 900, 1020):
        request = ChatRequest(messages=[{"role": "user", "content": "x"}])
        intake._render = lambda request, length=length: "x" * length
        [job] = intake.chat(request, NOBODY)
        most[len(job.prompt)] = job.sampling.max_new_tokens
    assert most == {length: min(400, 1024 - length) for length in most}
    [job] = intake.completion(CompletionRequest(prompt=[5] * 1020), NOBODY)
    assert job.sampling.max_new_tokens == 4  # OpenAI's 16, as far as they fit
    [job] = intake.completion(CompletionRequest(prompt=[5] * 10, max_tokens=800), NOBODY)
    assert job.sampling.max_new_tokens == 400  # more than the server gives, and it would fit


def test_an_answer_of_no_named_length_is_what_fits_beside_frozen_texts():
    engine = make_engine(store_tokens=1024)
    with TestClient(create_app(Worker(engine), model=MODEL)) as client:
        assert client.post("/v1/knowledge", json={"text": [5] * 300}).status_code == 200  # 5 of 16 pages
        assert chat(client, max_tokens=None, logit_bias={"2": 100}).status_code == 200
        full = client.post("/v1/completions", json={"prompt": [7] * 700, "ignore_eos": True, "max_tokens": None})
        assert choice(full)["finish_reason"] == "length"
        assert promised(client) == 11 * 64
        refused = chat(client, max_tokens=900)
        assert error_of(refused)["code"] == "context_length_exceeded"
        said = "This model's maximum context length is 704 tokens now. However,"
        assert error_of(refused)["message"].startswith(said)
        assert "retry-after" not in refused.headers


def test_the_promise_is_what_frozen_texts_leave_and_what_begins_with_them_may_be_longer():
    engine = make_engine(store_tokens=1024)
    with TestClient(create_app(Worker(engine), model=MODEL)) as client:
        entry = client.post("/v1/knowledge", json={"text": [5] * 320}).json()  # 5 of 16 pages
        limit = promised(client)
        assert limit == 704
        assert ask(client, [7] * (limit - 1)).status_code == 200
        assert error_of(ask(client, [7] * (limit + 1)))["code"] == "context_length_exceeded"
        assert ask(client, [5] * 320 + [7] * (limit - 1)).status_code == 200
        cut = ask(client, [7] * 1000, truncate_prompt_tokens=-1)
        assert cut.json()["usage"]["prompt_tokens"] == limit - 1
        assert error_of(client.post("/v1/knowledge", json={"text": [6] * 800}), 507)["code"] == "knowledge_full"
        client.delete(f"/v1/knowledge/{entry['handle']}")
        assert promised(client) == 1024
        assert ask(client, [7] * 1023).status_code == 200


def ask(client, ids, **fields):
    return client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1} | fields)


def test_long_texts_are_refused_before_they_are_tokenized(reference, monkeypatch):
    intake, tokenizer = Intake(reference, Limits()), reference.tokenizer
    tokenized = []

    class Watched:
        def __call__(self, text, **options):
            tokenized.append(len(text))
            return tokenizer(text, **options)

    intake.lengths._tokenizer = Watched()
    for text in ("word " * 800_000, "\n" * 4_000_000, "word " * 10_000):
        started = time.perf_counter()
        with pytest.raises(RequestError, match=r"maximum context length is 1024 tokens\. However, the"):
            intake.completion(CompletionRequest(prompt=text), NOBODY)
        assert time.perf_counter() - started < 2
    assert tokenized == [8 * 1024]
    spaces = " " * 9000  # many characters, and few tokens
    [job] = intake.completion(CompletionRequest(prompt=spaces), NOBODY)
    assert job.prompt.tolist() == tokenizer(spaces)["input_ids"]


def test_no_token_stands_for_more_characters_than_the_longest_name(reference):
    tokenizer = reference.tokenizer
    assert longest_token(tokenizer) == 81
    assert max(len(tokenizer.decode([id_])) for id_ in range(0, len(tokenizer), 7)) <= 81


# Large and wrong bodies ---------------------------------------------------------------------------------------

WIDE = {
    "ids that end in null": {"prompt": [1] * 400_000 + [None]},
    "lists of nulls": {"prompt": [[None] * 1000] * 400},
    "prompts of nothing": {"prompt": [None] * 400_000},
    "messages of null": {"messages": [None] * 400_000},
    "parts of null": {"messages": [{"role": "user", "content": [None] * 400_000}]},
    "calls of null": {"messages": [{"role": "user", "tool_calls": [None] * 400_000}]},
    "tools of null": {"messages": CHAT, "tools": [None] * 400_000},
    "stops": {"prompt": "x", "stop": [None] * 400_000},
    "biases": {"prompt": "x", "logit_bias": {str(id_): None for id_ in range(200_000)}},
    "stop tokens": {"prompt": "x", "stop_token_ids": [None] * 400_000},
    "allowed tokens": {"prompt": "x", "allowed_token_ids": [None] * 400_000},
    "options of reuse": {"prompt": "x", "reuse": {str(number): 1 for number in range(200_000)}},
    "text of null": {"text": [None] * 400_000},
    "fields": {"prompt": "x"} | {str(number): 1 for number in range(200_000)},
    "fields of a message": {"messages": [{"role": "user"} | {str(number): 1 for number in range(200_000)}]},
    "messages": {"messages": [{"role": "user", "content": "x"}] * 100_000},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}]},
    "more than a text": {"text": "x"} | {str(number): 1 for number in range(200_000)},
}


@pytest.mark.parametrize("fields", WIDE.values(), ids=WIDE)
def test_wide_bodies_are_refused_with_one_error_and_soon(intake, fields):
    kinds = {"messages": (ChatRequest, intake.chat), "prompt": (CompletionRequest, intake.completion)}
    name = next(name for name in ("messages", "prompt", "text") if name in fields)
    model, take = kinds.get(name, (KnowledgeRequest, lambda body, _: intake.knowledge(body)))
    started = time.perf_counter()
    with pytest.raises((ValidationError, RequestError, InvalidRequestError)) as refused:
        take(model.model_validate(fields), NOBODY)
    error = refused.value
    if isinstance(error, ValidationError):
        [one] = error.errors()
        error = RequestValidationError([one | {"loc": ("body", *one["loc"])}])
    fault = fault_of(error)
    assert time.perf_counter() - started < 2
    assert (fault.status, len(fault.message) < 500) == (400, True), fault.message
    assert fault.param or "256 fields" in fault.message


def test_json_that_breaks_off_is_no_fields_fault(http):
    for content in (b'{"prompt":', b'{"prompt": "x",}', b"{broken"):
        error = error_of(http.post("/v1/completions", content=content, headers=JSON))
        assert (error["param"], error["code"]) == (None, "json_invalid")
        assert "JSON" in error["message"]


# OpenAI's details ---------------------------------------------------------------------------------------------


def test_what_openai_takes_is_taken(http):
    greedy = choice(complete(http, temperature=0))["text"]
    assert choice(complete(http, temperature=1, top_p=0))["text"] == greedy
    soon = {"max_tokens": 900, "stop": greedy[:2]}
    for fields in ({"stop": ""}, {"stop": []}, {"stop": [""]}, {"logit_bias": {}}, {"n": None}, soon):
        assert complete(http, **fields).status_code == 200, fields
    for null in (
        "ignore_eos",
        "keep",
        "return_token_map",
        "stop_token_ids",
        "skip_special_tokens",
        "add_special_tokens",
    ):
        assert choice(complete(http, **{null: None}))["text"] == greedy


def test_log_probabilities_have_the_sampled_token(http):
    forced = {"logit_bias": {"504": 100}, "max_tokens": 2}
    for number in (0, 1, 20):
        told = choice(complete(http, logprobs=number, **forced))["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == 2
        if number == 0:
            assert told["top_logprobs"] is None
        else:
            assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"], strict=True))
            assert [len(top) in (number, number + 1) for top in told["top_logprobs"]] == [True, True]
    named = choice(complete(http, logprobs=1, return_tokens_as_token_ids=True, **forced))["logprobs"]
    assert named["tokens"] == ["token_id:504"] * 2
    assert "token_id:504" in named["top_logprobs"][0]
    answer = chat(http, logprobs=True, return_tokens_as_token_ids=True, **forced)
    assert choice(answer)["logprobs"]["content"][0]["token"] == "token_id:504"


def test_text_offsets_go_on_from_chunk_to_chunk(http):
    body = {"prompt": "The harbour", "max_tokens": 40, "temperature": 0, "logprobs": 1, "logit_bias": {"504": 0}}
    whole = choice(http.post("/v1/completions", json=body))["logprobs"]["text_offset"]
    _, chunks = streamed(http, "/v1/completions", body)
    assert len(chunks) > 2
    assert [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]] == whole


def test_head_is_answered_where_get_is(http):
    for path in ("/", "/health", "/v1/models", "/metrics", "/openapi.json"):
        got, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    assert http.head("/nothing").status_code == 404
    assert error_of(http.get("/v1/embeddings"), 404)["message"].startswith("there is no /v1/embeddings here")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/health", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("DELETE", "/v1/knowledge", "GET, POST, HEAD"),
        ("POST", "/v1/knowledge/3", "DELETE"),
    ],
)
def test_a_method_that_is_not_allowed_is_told_which_are(http, method, path, allow):
    answer = http.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allow)


def test_other_origins_are_served_if_the_operator_says_so(reference):
    loop = ScriptedLoop(lambda prompt: [Event("x", (5,), finish_reason="stop")])
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    with TestClient(
        create_app(Worker(reference, loop), model=MODEL, allowed_origins=["https://chat.example"])
    ) as client:
        preflight = client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
        refused = client.post("/v1/completions", json={"prompt": ""}, headers={"Origin": "https://chat.example"})
        assert refused.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert "X-Sparsex-Ignored-Fields" in refused.headers["Access-Control-Expose-Headers"]
        headers = {"Origin": "https://chat.example", "Authorization": "Bearer none"}
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
        streamed = client.post("/v1/chat/completions", json=body, headers=headers)
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert streamed.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert client.options("/v1/models", headers=asked | {"Origin": "https://evil.example"}).status_code == 400
    with pytest.raises(InvalidRequestError, match=r"allowed_origins has 'chat.example/x'"):
        create_app(Worker(reference, loop), model=MODEL, allowed_origins=["chat.example/x"])


def test_other_origins_are_not_served_by_default(live):
    headers = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{live.url}/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    assert "Access-Control-Allow-Origin" not in answer.headers
