"""Pins over HTTP: what is asked, what the reply says, and who may see and release them."""

import pytest
from live import live_server, make_engine

from sparsex_jax.serving.access import Access, Limits

CHAT = [{"role": "user", "content": "Which harbour opens at dawn, and who keeps the list of boats in the green book?"}]
FEW = {"max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def clock():
    return [0.0]


@pytest.fixture(scope="module")
def live(tmp_path_factory, clock):
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    limits = {"alice": "", "bob": "max_pinned_tokens = 4096", "carol": "max_pinned_tokens = 16"}
    keys.write_text("".join(f'[{name}]\nkey = "sk-{name}"\n{limit}\n' for name, limit in limits.items()))
    engine = make_engine()
    engine.admission.clock = lambda: clock[0]
    with live_server(engine, access=Access.load(keys, Limits())) as live:
        yield live


@pytest.fixture
def alice(live):
    with live.http("sk-alice") as client:
        yield client
        for pin in client.get("/v1/pins").json()["data"]:
            client.delete(f"/v1/pins/{pin['key']}")


def ask(client, **fields):
    return client.post("/v1/chat/completions", json={"messages": CHAT} | FEW | fields).json()


def test_a_chat_is_pinned_until_it_is_released_or_its_time_is_over(alice, clock):
    pin = ask(alice, prompt_cache_key="a/b c", prompt_cache_options={"ttl": "5m"})["sparsex"]["pin"]
    assert (pin["pinned"], pin["key"], pin["seconds_left"]) == (True, "a/b c", 300)
    assert alice.get("/v1/pins").json()["data"] == [
        {"object": "pin"} | {name: value for name, value in pin.items() if name != "pinned"}
    ]
    assert alice.get("/v1/store").json()["pins"] == 1
    gone = alice.delete("/v1/pins/a%2Fb%20c")
    assert (gone.status_code, gone.json()["pages"]) == (200, pin["pages"])
    again = alice.delete("/v1/pins/a%2Fb%20c")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_pin")
    ask(alice, prompt_cache_key="x", prompt_cache_options={"ttl": 60})
    clock[0] += 59
    assert alice.get("/v1/pins").json()["data"][0]["seconds_left"] == 1
    clock[0] += 1
    assert alice.get("/v1/pins").json()["data"] == []


def test_keys_and_salts_see_and_release_only_their_own(live, alice):
    ask(alice, prompt_cache_key="x", prompt_cache_options={"ttl": 60})
    ask(alice, prompt_cache_key="y", prompt_cache_options={"ttl": 60}, cache_salt="s")
    with live.http("sk-bob") as bob:
        assert bob.get("/v1/pins").json()["data"] == []
        assert bob.delete("/v1/pins/x").status_code == 404
    assert [pin["key"] for pin in alice.get("/v1/pins").json()["data"]] == ["x"]
    assert alice.delete("/v1/pins/y").status_code == 404
    assert alice.delete("/v1/pins/y?cache_salt=s").status_code == 200


def test_the_official_client_pins_in_chats_and_responses_and_streams(live, alice):
    client = live.client("sk-alice")
    options = {"ttl": "30m"}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=3, stream=True, prompt_cache_key="x", prompt_cache_options=options
        )
    )
    assert chunks[-1].sparsex["pin"]["seconds_left"] == 1800
    done = client.responses.create(
        model="tiny", input="Hello", max_output_tokens=3, prompt_cache_key="y", prompt_cache_options=options
    )
    assert done.sparsex["pin"]["key"] == "y"
    kept = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=3, extra_body={"prompt_cache_options": {"ttl": 5}}
    )
    assert kept.sparsex["pin"]["key"] == kept._request_id
    assert len(alice.get("/v1/pins").json()["data"]) == 3


def test_messages_are_pinned_too(alice):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "prompt_cache_options": {"ttl": 5}}
    assert alice.post("/v1/messages", json=body).json()["sparsex"]["pin"]["pinned"]
    streamed = alice.post("/v1/messages", json=body | {"stream": True}).text
    assert '"pinned": true' in streamed


def test_hints_without_a_time_pin_nothing(alice):
    for hints in ({"prompt_cache_key": "x"}, {"prompt_cache_retention": "24h"}, {"prompt_cache_options": {}}):
        assert "pin" not in ask(alice, **hints)["sparsex"]
    pin = ask(alice, prompt_cache_key="x", prompt_cache_retention="24h")["sparsex"]["pin"]
    assert pin["seconds_left"] == 24 * 3600


def test_what_does_not_fit_is_said(live):
    with live.http("sk-bob") as bob:
        refuses_a_second_pin(bob)
        bob.delete("/v1/pins/one")


def refuses_a_second_pin(bob):
    long = [{"role": "user", "content": "dawn " * 1500}]
    fields = {"messages": long, "prompt_cache_options": {"ttl": 60}}
    assert ask(bob, **fields, prompt_cache_key="one")["sparsex"]["pin"]["pinned"]
    other = fields | {"messages": [{"role": "user", "content": "bell " * 1500}]}
    answer = ask(bob, **other, prompt_cache_key="two")
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["sparsex"]["pin"].keys() == {"pinned", "key", "why"}
    assert "all pins together" in answer["sparsex"]["pin"]["why"]


def test_one_key_leaves_the_others_their_part_of_what_pins_may_have(live, alice):
    half = {"prompt_cache_options": {"ttl": 60}, "prompt_cache_key": "half"}
    words = [[{"role": "user", "content": f"{word} " * 600}] for word in ("dawn", "bell")]
    assert ask(alice, messages=words[0], **half)["sparsex"]["pin"]["pinned"]
    more = ask(alice, messages=words[1], **half | {"prompt_cache_key": "more"})["sparsex"]["pin"]
    assert "the part of all pins that one key may have" in more["why"]
    with live.http("sk-bob") as bob:
        assert ask(bob, messages=words[1], **half)["sparsex"]["pin"]["pinned"]
        bob.delete("/v1/pins/half")
    assert ask(alice, messages=words[1], **half)["sparsex"]["pin"]["pinned"], "it takes the place of the key's own pin"


def test_a_limit_of_the_file_takes_the_place_of_the_part(live):
    with live.http("sk-carol") as carol:
        pin = ask(carol, prompt_cache_options={"ttl": 60}, prompt_cache_key="x")["sparsex"]["pin"]
    assert (pin["pinned"], "max_pinned_tokens=16 is" in pin["why"]) == (False, True)


BAD = [
    ({"prompt_cache_options": {"ttl": 0}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": "25h"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": True}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": [5]}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": 5}, "keep": False}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"mode": "x"}}, "prompt_cache_options.mode"),
    ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
    ({"prompt_cache_key": "x" * 513}, "prompt_cache_key"),
    ({"prompt_cache_key": 5}, "prompt_cache_key"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_wrong_fields_are_named(alice, fields, param):
    assert ask(alice, **fields)["error"]["param"] == param
