"""Adapters over HTTP: named as models at all endpoints, loaded and unloaded while requests run."""

import concurrent.futures
import contextlib
import dataclasses
import json
import random
import types

import openai
import pytest
from adapter_files import random_tensors, write, write_adapter
from conftest import TALKING
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from live import ScriptedLoop, live_server, make_engine, wait_for

from sparsex_jax import SamplingParams
from sparsex_jax.errors import HubError, InvalidRequestError, UnsupportedModelError
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.models import Models
from sparsex_jax.serving.request_log import RequestLog

PROMPT = "Which harbour opens at dawn, and who keeps the list of boats in the green book?"
CHAT = [{"role": "user", "content": PROMPT}]
FEW = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
SPARE = "spare"  # is loaded and unloaded by tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters that change answers, and one that is loaded later."""
    top = tmp_path_factory.mktemp("adapters")
    kinds = ["q_proj", "v_proj", "o_proj", "down_proj"]

    def made(name, seed):
        tensors = random_tensors(TALKING, kinds, rank=8, seed=seed)
        return write(top / name, tensors, r=8, lora_alpha=32, target_modules=kinds, base_model_name_or_path="tiny")

    return {name: made(name, seed) for seed, name in enumerate(["north", "south", SPARE, "other"])}


def engine_with_adapters(folders):
    engine = make_engine(max_adapters=3)
    for name in ("north", "south"):
        engine.load_adapter(name, folders[name])
    return engine


def options(folders):
    return {"adapters": {name: str(folders[name]) for name in ("north", "south")}, "allow_adapter_updates": True}


def load(client, name, source):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(source)})


def unload(client, name, **fields):
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name} | fields)


def complete(client, model, prompt=PROMPT, **fields):
    body = {"model": model, "prompt": prompt, "return_token_ids": True} | FEW | fields
    return client.post("/v1/completions", json=body)


def answer(reply):
    return reply.json()["choices"][0]["token_ids"]


def adapters_served(client):
    return [card["id"] for card in client.get("/v1/models").json()["data"] if card["parent"]]


# Which names are served ----------------------------------------------------------------------------------------------


class Loaded(RuleBasedStateMachine):
    """Adapters come and go while requests begin and end, in any order."""

    names = st.sampled_from(["a", "b", "c"])

    def __init__(self):
        super().__init__()
        self.there, self.requests = {}, []
        engine = types.SimpleNamespace(
            admission=types.SimpleNamespace(adapters=Names(self.there)),
            load_adapter=lambda name, _: self.there.update({name: types.SimpleNamespace(name=name)}),
            unload_adapter=lambda name, timeout_s: self.there.pop(name),
        )
        self.models = Models(engine, "base", {})

    @rule(name=names)
    def load(self, name):
        if name in self.there:
            with pytest.raises(InvalidRequestError, match="is loaded already"):
                self.models.check_new(name)
        else:
            self.models.check_new(name)
            self.models.load(name, f"from {name}", None)

    @rule(name=names, fails=st.booleans())
    def unload(self, name, fails):
        """The engine may refuse, where sequences of requests that ended are still there."""
        used = [each for each, _ in self.requests].count(name)
        refusal = RequestError if name not in self.there else Refused if fails or used else None
        with pytest.raises(refusal) if refusal else contextlib.nullcontext(), self.models.leaving(name):
            with pytest.raises(RequestError, match="is being unloaded, and not served here any more"):
                self.models.adapter_of(name)
            with pytest.raises(RequestError, match="no adapter"), self.models.leaving(name):
                raise AssertionError("it is leaving already")
            assert self.models.num_requests(name) == used
            if fails or used:
                raise Refused
            self.models.unload(name)

    @rule(name=names)
    def begin(self, name):
        if name in self.there:
            held = contextlib.ExitStack()
            held.enter_context(self.models.using(self.models.adapter_of(name)))
            self.requests.append((name, held))
        else:
            with pytest.raises(RequestError, match=f"model '{name}' is not served here"):
                self.models.adapter_of(name)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data):
        self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))[1].close()

    @invariant()
    def what_is_served_is_what_is_loaded(self):
        served = [(each.name, each.source, each.parent) for each in self.models]
        assert served == [("base", "base", None), *((name, f"from {name}", "base") for name in self.there)]
        assert all(name in self.there for name, _ in self.requests)


class Names:
    """The engine's, of adapters that are there."""

    def __init__(self, there):
        self.there = there

    def __iter__(self):
        return iter(self.there.values())

    def check_new(self, name):
        if name in self.there:
            raise InvalidRequestError(f"adapter {name!r} is loaded already")


class Refused(Exception):
    """The engine refuses."""


TestLoaded = Loaded.TestCase
TestLoaded.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


# A scripted loop answers, which has no weights -------------------------------------------------------------------


FOREVER = "Say more."  # this prompt is not answered to its end


def script(prompt):
    return [Event("...", (1,)), None] if len(prompt) < 8 else [Event("Ok.", (1, 2), finish_reason="stop")]


@pytest.fixture(scope="module")
def scripted(folders):
    engine = engine_with_adapters(folders)
    with live_server(engine, loop=ScriptedLoop(script), **options(folders)) as live:
        yield live


@pytest.fixture
def client(scripted):
    with scripted.http() as client:
        yield client
        unload(client, SPARE)


def test_adapters_are_listed_behind_the_model(scripted, client, folders):
    base, north, south = client.get("/v1/models").json()["data"]
    assert (base["id"], base["root"], base["parent"]) == ("tiny", "tiny", None)
    assert (north["id"], north["root"], north["parent"]) == ("north", str(folders["north"]), "tiny")
    assert north["max_model_len"] == base["max_model_len"]
    assert client.get("/v1/models/south").json() == south
    assert [model.id for model in scripted.client().models.list()] == ["tiny", "north", "south"]
    assert [model.id for model in scripted.anthropic().models.list()] == ["tiny", "north", "south"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": CHAT}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/knowledge", {"text": "a"}),
    ],
)
def test_unknown_models_are_refused_by_name_everywhere_and_adapters_are_not(client, path, body):
    refused = client.post(path, json=body | {"model": "west"})
    assert refused.status_code == 404
    assert "model 'west' is not served here; 'tiny', 'north', 'south' are" in refused.json()["error"]["message"]
    if not path.startswith("/v1/messages"):
        assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("model_not_found", "model")
    if path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
        assert client.post(path, json=body | {"model": "south"}).json() == client.post(path, json=body).json()


def test_the_official_client_hears_that_a_model_is_not_there(scripted):
    with pytest.raises(openai.NotFoundError, match="'west' is not served here"):
        scripted.client().completions.create(model="west", prompt="a")
    with pytest.raises(openai.NotFoundError):
        scripted.client().models.retrieve("west")


def test_adapters_that_cannot_be_loaded_are_refused(client, folders, tmp_path):
    small = write_adapter(tmp_path / "small", dataclasses.replace(TALKING, hidden_size=64))
    wide = write(tmp_path / "wide", random_tensors(TALKING, rank=24), r=24)
    refused = {
        404: [(SPARE, tmp_path / "nowhere", "no directory of an adapter")],
        400: [
            ("north", folders["north"], "adapter 'north' is loaded already"),
            ("tiny", folders["north"], "adapter 'tiny' has the name of the model"),
            (SPARE, small, "is stored as (4, 64)"),
            (SPARE, wide, "rank 24, and max_adapter_rank=16"),
            ("a\nb", folders["north"], "must be printable"),
        ],
    }
    for status, cases in refused.items():
        for name, source, message in cases:
            reply = load(client, name, source)
            assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text
            assert reply.json()["error"]["param"] == ("lora_path" if name == SPARE else "lora_name")
    load(client, SPARE, folders[SPARE])
    full = load(client, "fourth", folders["other"])
    assert (full.status_code, "max_adapters=3" in full.json()["error"]["message"]) == (400, True)
    assert full.json()["error"]["param"] == "lora_name"
    gone = unload(client, "tiny")
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "lora_name")
    assert "no adapter 'tiny' is loaded; there are: north, south, spare" in gone.json()["error"]["message"]
    extra = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y", "load_inplace": True})
    assert (extra.status_code, extra.json()["error"]["param"]) == (400, "load_inplace")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (HubError("the hub cannot be reached"), 502, "hub_unavailable"),
        (UnsupportedModelError("use_dora=True is not supported"), 400, "unsupported_adapter"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_told_with_a_code(client, monkeypatch, error, status, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sparsex_jax.serving.adapters.read_adapter", fail)
    reply = load(client, SPARE, "OWNER/adapter")
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["message"]) == (
        status,
        code,
        str(error),
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_any_body_is_answered_by_a_status_that_names_what_is_wrong(client, seed):
    rng = random.Random(seed)
    values = [None, "", "x", "../..", "/", "a=b", 0, 1.5, True, [], {}, ["x"], {"a": 1}, "tiny", "\x00", "x" * 5000]
    for _ in range(12):
        body = {
            name: rng.choice(values) for name in ("lora_name", "lora_path", "load_inplace", "x") if rng.random() < 0.7
        }
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            reply = client.post(path, json=body)
            assert 400 <= reply.status_code < 500, (path, body, reply.text)
            assert reply.json()["error"]["message"]
    assert adapters_served(client) == ["north", "south"]


def test_adapters_stay_as_they_are_where_requests_may_not_change_them(scripted, folders, tmp_path):
    """The server that runs is asked as it would be without the option, and with keys."""
    service = scripted.server._service
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "sk-alice"\nadapters = true\n[bob]\nkey = "sk-bob"\n')
    open_to_all, service.allow_adapter_updates = service.access, False
    try:
        with scripted.http() as client:
            refused = load(client, SPARE, folders[SPARE])
            assert (refused.status_code, unload(client, "north").status_code) == (403, 403)
            assert "--allow-adapter-updates" in refused.json()["error"]["message"]
        service.allow_adapter_updates, service.access = True, Access.load(keys, Limits())
        with scripted.http("sk-bob") as bob, scripted.http("sk-alice") as alice:
            refused = load(bob, SPARE, folders[SPARE])
            assert (refused.status_code, "adapters = true" in refused.json()["error"]["message"]) == (403, True)
            assert load(alice, SPARE, folders[SPARE]).status_code == 200
            assert SPARE in adapters_served(bob)
            assert unload(alice, SPARE).status_code == 200
    finally:
        service.allow_adapter_updates, service.access = True, open_to_all


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/responses", {"input": PROMPT}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 1}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_adapter_that_a_request_names_is_asked_and_told(scripted, client, path, body, stream):
    asked = scripted.worker.loop.adapters
    for model, adapter in {"tiny": None, "north": "north", None: None, "south": "south"}.items():
        reply = client.post(path, json=body | {"model": model, "stream": stream})
        assert (reply.status_code, asked[-1]) == (200, adapter)
        assert f'"model": "{model or "tiny"}"' in reply.text


def test_an_adapter_is_not_unloaded_while_a_request_uses_it(client, folders):
    load(client, SPARE, folders[SPARE])
    with client.stream("POST", "/v1/completions", json={"model": SPARE, "prompt": FOREVER, "stream": True}) as stream:
        lines = stream.iter_lines()  # which would close the response where nothing held it
        next(lines)
        refused = unload(client, SPARE, timeout_s=0)
        assert refused.status_code == 409
        assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("adapter_in_use", "lora_name")
        assert (
            "adapter 'spare' cannot be unloaded: 1 request with it did not end within timeout_s=0"
            in refused.json()["error"]["message"]
        )
        assert adapters_served(client) == ["north", "south", SPARE]
    wait_for(lambda: unload(client, SPARE).status_code == 200)  # the client has gone, and its request with it
    assert adapters_served(client) == ["north", "south"]


def test_an_adapter_leaves_once_its_last_request_has_ended(scripted, client, folders):
    load(client, SPARE, folders[SPARE])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        forever = {"model": SPARE, "prompt": FOREVER, "stream": True}
        with client.stream("POST", "/v1/completions", json=forever) as stream:
            lines = stream.iter_lines()
            next(lines)
            leaving = pool.submit(unload, client, SPARE, timeout_s=30)
            wait_for(lambda: complete(client, SPARE).status_code == 404)
            refused = complete(client, SPARE).json()["error"]
            assert "model 'spare' is being unloaded, and not served here any more; 'tiny', " in refused["message"]
            assert unload(client, SPARE).status_code == 404  # it is being unloaded already
            assert complete(client, "north").status_code == 200
            assert not leaving.done()
        assert leaving.result().text == "Success: LoRA adapter 'spare' removed successfully."
    assert adapters_served(client) == ["north", "south"]
    for wrong in (-1, 1e9, "soon", "NaN"):
        assert unload(client, SPARE, timeout_s=wrong).json()["error"]["param"] == "timeout_s"


# A small model answers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="module")
def engine(folders):
    return engine_with_adapters(folders)


@pytest.fixture(scope="module")
def alone(engine):
    """What each answers by itself, before there is a server."""
    few = SamplingParams(max_new_tokens=4, ignore_eos=True)
    return {
        name: engine.generate(PROMPT, few, keep=False, adapter=None if name == "tiny" else name).token_ids
        for name in ("tiny", "north", "south")
    }


@pytest.fixture(scope="module")
def live(engine, alone, folders, log):
    with live_server(engine, request_log=RequestLog.open(log), **options(folders)) as live:
        yield live


@pytest.fixture
def http(live):
    with live.http() as client:
        yield client
        client.post("/v1/unload_lora_adapter", json={"lora_name": SPARE})


@pytest.mark.slow
def test_each_answers_as_it_does_alone_also_where_all_run_at_once(http, alone):
    assert len({tuple(ids) for ids in alone.values()}) == 3
    names = [*alone] * 3
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        replies = list(pool.map(lambda name: complete(http, name), names))
    for name, reply in zip(names, replies, strict=True):
        body = reply.json()
        assert (answer(reply), body["model"]) == (alone[name], name)
        assert body["sparsex"].get("adapter", {}).get("name") == (None if name == "tiny" else name)
    assert answer(complete(http, None)) == alone["tiny"]


@pytest.mark.slow
def test_every_protocol_takes_an_adapter_as_its_model(live):
    client, anthropic = live.client(), live.anthropic()
    said = {}
    for model in ("tiny", "north"):
        chat = client.chat.completions.create(model=model, messages=CHAT, max_tokens=4, temperature=0)
        *_, last = client.chat.completions.create(model=model, messages=CHAT, max_tokens=4, temperature=0, stream=True)
        response = client.responses.create(model=model, input=PROMPT, max_output_tokens=16, temperature=0)
        message = anthropic.messages.create(model=model, messages=CHAT, max_tokens=4, extra_body={"temperature": 0})
        assert {chat.model, last.model, response.model, message.model} == {model}
        acted = [each.model_extra["sparsex"].get("adapter") for each in (chat, response, message)]
        assert [each and each["name"] for each in acted] == [None if model == "tiny" else model] * 3
        said[model] = (chat.choices[0].message.content, response.output_text, message.content[0].text)
    assert all(with_it != without for with_it, without in zip(said["north"], said["tiny"], strict=True))


@pytest.mark.slow
def test_an_adapter_is_loaded_answers_and_is_unloaded(http, folders):
    loaded = load(http, SPARE, folders[SPARE])
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'spare' added successfully.")
    assert http.get(f"/v1/models/{SPARE}").json()["root"] == str(folders[SPARE])
    first = answer(complete(http, SPARE))
    assert complete(http, SPARE).json()["sparsex"]["prefix_tokens"] > 0
    gone = unload(http, SPARE)
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'spare' removed successfully.")
    assert complete(http, SPARE).status_code == 404
    assert unload(http, SPARE).status_code == 404
    load(http, SPARE, folders["other"])
    other = complete(http, SPARE)
    assert answer(other) != first
    assert other.json()["sparsex"]["prefix_tokens"] == 0, "nothing of the adapter that had the name before"
    assert adapters_served(http) == ["north", "south", SPARE]


@pytest.mark.slow
def test_an_adapter_is_not_unloaded_while_a_request_is_held_with_it(live, http, folders):
    load(http, SPARE, folders[SPARE])
    held = {"round": {"id": "both", "size": 2, "wait_ms": 60_000}}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(complete, http, SPARE, **held)
        wait_for(lambda: live.worker.loop.stats.held == 1)
        refused = unload(http, SPARE, timeout_s=0.1)
        second = pool.submit(complete, http, "north", **held)
        assert {first.result().status_code, second.result().status_code} == {200}
    assert refused.status_code == 409
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("adapter_in_use", "lora_name")
    assert (
        "adapter 'spare' cannot be unloaded: 1 request with it did not end within timeout_s=0"
        in refused.json()["error"]["message"]
    )
    assert adapters_served(http) == ["north", "south", SPARE]
    assert unload(http, SPARE).status_code == 200
    assert adapters_served(http) == ["north", "south"]


@pytest.mark.slow
def test_requests_go_on_while_adapters_come_and_go(http, folders, alone):
    """Whoever names the adapter that comes and goes gets its answer, or hears that it is not there."""
    load(http, SPARE, folders[SPARE])
    expected = answer(complete(http, SPARE, keep=False))

    def ask(name):
        reply = complete(http, name, keep=False)
        return name, reply.status_code, answer(reply) if reply.status_code == 200 else None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, name) for name in ["north", SPARE, "tiny", SPARE, "south"] * 4]
        changes = [change for _ in range(4) for change in (unload(http, SPARE), load(http, SPARE, folders[SPARE]))]
        outcomes = [each.result() for each in asked]
    assert {change.status_code for change in changes} <= {200, 400, 404, 409}
    wanted = alone | {SPARE: expected}
    for name, status, ids in outcomes:
        assert status == 200 or (name, status) == (SPARE, 404)
        assert ids in (None, wanted[name])
    assert unload(http, SPARE).status_code in (200, 404)


@pytest.mark.slow
def test_knowledge_is_kept_and_found_under_its_adapter(http):
    text = "The boats of the green book are the Heron, the Tern and the Plover, and the Heron leaves first of all."
    kept = http.post("/v1/knowledge", json={"text": text, "model": "north"}).json()
    plain = http.post("/v1/knowledge", json={"text": text, "company": False}).json()
    assert (kept["model"], plain["model"]) == ("north", "tiny")
    assert kept["handle"] != plain["handle"]
    assert [each["model"] for each in http.get("/v1/knowledge").json()["data"]] == ["north", "tiny"]
    http.delete(f"/v1/knowledge/{plain['handle']}")
    found = {
        name: complete(http, name, prompt=f"{text} Which leaves?", keep=False).json()["sparsex"]["prefix_tokens"]
        for name in ("north", "south", "tiny")
    }
    assert found["north"] > 0
    assert found["south"] == found["tiny"] == 0


@pytest.mark.slow
def test_knowledge_of_an_adapter_goes_with_it(http, folders):
    load(http, SPARE, folders[SPARE])
    handle = http.post("/v1/knowledge", json={"text": PROMPT * 2, "model": SPARE}).json()["handle"]
    assert unload(http, SPARE).status_code == 200
    assert handle not in [each["handle"] for each in http.get("/v1/knowledge").json()["data"]]
    assert http.delete(f"/v1/knowledge/{handle}").status_code == 404


@pytest.mark.slow
def test_what_stands_before_an_invocation_is_found_by_everybody(http, engine, tmp_path):
    context, call = (
        "The Heron leaves at six, the Tern at seven, and the Plover not before nine. " * 2,
        " Who leaves last?",
    )
    ids = http.post("/tokenize", json={"prompt": call}).json()["tokens"]
    tensors = random_tensors(TALKING, rank=8, seed=9)
    activated = write(tmp_path, tensors, r=8, lora_alpha=32, alora_invocation_tokens=ids)
    assert load(http, SPARE, activated).status_code == 200
    before = complete(http, "tiny", prompt=context).json()["sparsex"]["prompt_tokens"]
    called = complete(http, SPARE, prompt=context + call).json()["sparsex"]
    assert called["adapter"] == {"name": SPARE, "tokens": len(ids)}
    assert called["prefix_tokens"] >= before - 1
    silent = complete(http, SPARE, prompt=context)
    assert silent.json()["sparsex"]["adapter"]["tokens"] == 0
    assert answer(silent) == answer(complete(http, "tiny", prompt=context))
    assert answer(complete(http, SPARE, prompt=context + call)) != answer(complete(http, "tiny", prompt=context + call))


@pytest.mark.slow
def test_metrics_and_the_log_name_adapters(http, log):
    def prompts(name):
        line = f'sparsex_adapter_prompts_total{{adapter="{name}"}} '
        return float(next(each for each in http.get("/metrics").text.splitlines() if each.startswith(line)).split()[1])

    before = prompts("north"), prompts("south")
    complete(http, "north", n=2)
    complete(http, "tiny")
    wait_for(lambda: (prompts("north"), prompts("south")) == (before[0] + 2, before[1]))
    wait_for(lambda: len(log.read_text().splitlines()) > 1)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {None, "north"} <= {line["adapter"] for line in lines if line["endpoint"] == "/v1/completions"}


@pytest.mark.slow
def test_adapters_share_what_they_are_asked_to(folders):
    engine = make_engine(max_adapters=2, share_adapters=True)
    for name in ("north", "south"):
        engine.load_adapter(name, folders[name])

    def found(reply):
        report = reply.json()["sparsex"]
        return report["prefix_tokens"], report["approximate_prefix_tokens"], report.get("sharing")

    with live_server(engine) as live, live.http() as client:
        asked = {"sharing": "pre_lr", "reuse": {"method": "prefix", "only_if_faster": False}}
        nothing = {"cross_adapter_tokens": 0, "unseen_tokens": 0}
        assert found(complete(client, "north", **asked)) == (0, 0, {"mode": "pre_lr"} | nothing)
        prefix, others, shared = found(complete(client, "south", **asked))
        assert prefix == 0 < others
        assert shared == {"mode": "pre_lr", "cross_adapter_tokens": others, "unseen_tokens": 0}
        assert found(complete(client, "south", reuse=asked["reuse"])) == (0, 0, None)
        kept = client.post("/v1/knowledge", json={"text": PROMPT, "model": "north", "sharing": "base_shared"}).json()
        assert (kept["model"], kept["sharing"], kept["num_tokens"]) == (
            "north",
            "base_shared",
            kept["prefilled_tokens"],
        )
        longer = f"{PROMPT} And so on."
        first, again = (found(complete(client, "south", prompt=longer, sharing="base_shared"))[2] for _ in range(2))
        assert first["unseen_tokens"] == first["cross_adapter_tokens"] >= kept["num_tokens"] - 1
        assert again["unseen_tokens"] < first["unseen_tokens"] < again["cross_adapter_tokens"]
        assert [each["sharing"] for each in client.get("/v1/knowledge").json()["data"]] == ["base_shared"]
        by_sparsex = {"sharing": "base_shared", "reuse": {"method": "sparsex"}}
        assert "needs the method prefix" in complete(client, "south", **by_sparsex).json()["error"]["message"]
        for fields, why in (
            ({"sharing": "all"}, "sharing"),
            ({"model": None, "sharing": "pre_lr"}, "needs an adapter"),
        ):
            refused = client.post("/v1/completions", json={"model": "north", "prompt": PROMPT} | fields)
            assert (refused.status_code, why in refused.json()["error"]["message"]) == (400, True)
