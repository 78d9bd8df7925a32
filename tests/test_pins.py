"""Pins of requests: what is pinned stays for its time, whatever else is asked, and nobody waits for it in vain."""

import numpy as np
import pytest
from conftest import idle, run, tiny_engine

from sparsex_jax import (
    InvalidRequestError,
    NoRoomError,
    Pin,
    PinRefused,
    ReuseConfig,
    SamplingParams,
    StoreFullError,
    UnknownPinError,
)
from sparsex_jax.config import EngineConfig
from sparsex_jax.scheduler.pinning import Pinning

TEN = SamplingParams(10, ignore_eos=True)


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def pinning_engine(**changes):
    """An engine with 20 pages of 16 tokens, and the clock of its pins: a list of one number."""
    engine, clock = tiny_engine(**{"store_tokens": 320, "company_tokens": 0} | changes), [0.0]
    engine.admission.clock = lambda: clock[0]
    return engine, clock


def fill(engine, seeds=range(100, 106)):
    """Prompts that need the whole store."""
    for seed in seeds:
        engine.generate(text(seed, 100), TEN)


def found(engine, prompt, namespace="default"):
    done = engine.generate([*prompt, 5], SamplingParams(1), namespace=namespace, keep=False)
    return done.report.prefix_tokens


def test_what_is_pinned_outlives_others_until_its_time_is_over():
    engine, clock = pinning_engine()
    prompt = text(1, 80)
    done = engine.generate(prompt, TEN, pin=Pin("agent", 300))
    whole = prompt + done.token_ids[:-1]
    assert (done.pin.key, done.pin.num_tokens, done.pin.num_pages, done.pin.seconds_left) == ("agent", 89, 6, 300)
    assert engine.pins("default") == engine.pins() == [done.pin]
    assert engine.pins("other") == []
    fill(engine)
    assert found(engine, whole) == 89
    assert engine.stats()["pinned"] == 6
    assert engine.max_context == 14 * 16
    clock[0] = 299.0
    fill(engine)
    assert engine.pins()[0].seconds_left == 1
    assert found(engine, whole) == 89
    clock[0] = 300.0
    fill(engine)
    assert found(engine, whole) == 0
    assert engine.pins() == []
    assert engine.stats()["pinned"] == engine.stats()["pins"] == 0
    assert idle(engine)


def test_the_next_request_of_the_key_takes_the_pin_with_it():
    engine, clock = pinning_engine()
    first, common = text(1, 60), 48
    engine.generate(first, SamplingParams(4, ignore_eos=True), pin=Pin("agent", 300))
    clock[0] = 200.0
    second = first[:common] + text(2, 30)
    done = engine.generate(second, TEN, pin=Pin("agent"))  # no time: that of the pin
    assert (done.pin.num_tokens, done.pin.seconds_left) == (87, 300)
    fill(engine)
    assert found(engine, second) == len(second)
    assert found(engine, first) == common
    assert engine.generate(text(3, 20), TEN, pin=Pin("nobody")).pin is None
    assert engine.unpin("agent").num_pages == 6
    with pytest.raises(UnknownPinError, match="no pin 'agent'"):
        engine.unpin("agent")
    fill(engine)
    assert found(engine, second) == 0


def test_namespaces_have_pins_of_their_own():
    engine, _ = pinning_engine()
    one, two = text(1, 40), text(2, 40)
    engine.generate(one, TEN, namespace="a", pin=Pin("agent", 60))
    engine.generate(two, TEN, namespace="b", pin=Pin("agent", 60))
    assert [(pin.namespace, pin.key) for pin in engine.pins()] == [("a", "agent"), ("b", "agent")]
    with pytest.raises(UnknownPinError):
        engine.unpin("agent")
    engine.unpin("agent", namespace="b")
    fill(engine)
    assert (found(engine, one, "a"), found(engine, two, "b")) == (40, 0)


def test_pins_that_do_not_fit_are_refused_and_the_request_is_answered():
    engine, _ = pinning_engine()
    kept = engine.generate(text(1, 70), TEN, pin=Pin("kept", 60)).pin  # 5 of the 10 pages that pins may have
    done = engine.generate(text(2, 120), TEN, pin=Pin("large", 60))
    assert (done.finish_reason, len(done.token_ids)) == ("length", 10)
    assert isinstance(done.pin, PinRefused)
    assert done.pin.key == "large"
    assert (
        "needs 9 pages of 16 tokens, and all pins together would have 14 of the 10 that they may have" in done.pin.why
    )
    larger = engine.generate(text(1, 70) + text(3, 110), TEN, pin=Pin("kept", 900))
    assert isinstance(larger.pin, PinRefused)
    assert [(pin.key, pin.num_pages) for pin in engine.pins()] == [("kept", kept.num_pages)]  # stays as it was
    assert engine.pins()[0].seconds_left <= 60
    engine.admission.check_books()


def test_nothing_is_pinned_where_pins_may_have_nothing():
    engine, _ = pinning_engine(max_pinned=0.0)
    assert isinstance(engine.generate(text(1, 40), TEN, pin=Pin(ttl_s=60)).pin, PinRefused)


def test_without_a_key_the_request_names_its_pin():
    engine, _ = pinning_engine()
    keys = [engine.generate(text(1, 40), TEN, pin=Pin(ttl_s=60)).pin.key for _ in range(2)]
    assert len(set(keys)) == 2
    assert [pin.key for pin in engine.pins()] == keys
    assert engine.stats()["pinned"] < 2 * engine.pins()[0].num_pages  # they share pages


def test_the_answers_of_one_call_share_a_pin():
    engine, _ = pinning_engine()
    prompts = [text(1, 40), text(2, 50)]
    done = engine.generate_batch(prompts, TEN, pin=Pin("both", 60))
    assert max(each.pin.num_pages for each in done) == engine.pins()[0].num_pages == 4 + 4
    fill(engine)
    assert [found(engine, prompt) for prompt in prompts] == [40, 50]


def test_a_request_that_pins_leave_no_room_is_refused_at_once():
    engine, clock = pinning_engine()
    engine.generate(text(1, 140), TEN, pin=Pin("agent", 60))  # 10 of 20 pages
    assert engine.generate(text(2, 150), TEN).finish_reason == "length"
    with pytest.raises(
        NoRoomError, match="needs 11 pages of 16 tokens of its own, and frozen texts and 1 pins leave 10"
    ):
        engine.generate(text(3, 160), TEN)
    assert engine.generate(text(1, 140) + text(4, 100), TEN).report.prefix_tokens == 140  # these need no room
    clock[0] = 61.0
    assert engine.generate(text(3, 160), TEN).finish_reason == "length"


def test_pins_and_frozen_texts_leave_each_other_room():
    engine, _ = pinning_engine()
    engine.generate(text(1, 140), TEN, pin=Pin("agent", 60))
    with pytest.raises(
        StoreFullError, match="needs 2 pages of 16 tokens, and pins have 10 of the 20 that frozen texts"
    ):
        engine.remember(text(2, 32), frozen=True)
    engine.unpin("agent")
    handle = engine.remember(text(2, 32), frozen=True)
    assert isinstance(engine.generate(text(1, 140), TEN, pin=Pin("agent", 60)).pin, PinRefused)
    prompt = text(2, 32) + text(3, 100)
    assert engine.generate(prompt, TEN, pin=Pin("agent", 60)).pin.num_pages == 9  # of which 2 stay anyway
    engine.forget(handle)
    assert engine.pins()[0].num_pages == 7
    engine.admission.check_books()


def test_a_pin_takes_nothing_from_those_who_run():
    engine, _ = pinning_engine()
    events = []
    large = SamplingParams(200, ignore_eos=True)  # 14 pages with its prompt
    engine.loop.submit(text(1, 20), large, listener=events.append)
    for _ in range(4):
        engine.loop.step()
    done = engine.generate(text(2, 100), TEN, pin=Pin("agent", 60))
    assert isinstance(done.pin, PinRefused)
    assert "too few for requests that run now" in done.pin.why
    run(engine.loop)
    assert sum(len(event.token_ids) for event in events) == 200
    assert engine.generate(text(2, 100), TEN, pin=Pin("agent", 60)).pin.num_pages == 7


def test_cancelled_and_failed_requests_pin_nothing():
    engine, _ = pinning_engine()
    events = []
    ticket = engine.loop.submit(text(1, 40), TEN, pinning=Pinning(Pin("agent", 60)), listener=events.append)
    ticket.cancel()
    run(engine.loop)
    assert events[-1].finish_reason == "cancelled"
    assert events[-1].pin is None
    assert engine.pins() == []


def test_pins_follow_healing_and_end_with_a_lost_store(monkeypatch):
    engine, _ = pinning_engine(healing=0.5)
    donor, naive = text(1, 40), ReuseConfig(method="naive")
    engine.generate(donor, TEN)
    prompt = text(2, 5) + donor + text(3, 10)
    assert engine.generate(prompt, TEN, reuse=naive, pin=Pin("agent", 60)).report.reused_tokens > 0
    before = engine.pins()
    assert engine.heal() > 0
    assert engine.stats()["approximate_tokens"] == 0
    assert [pin.key for pin in engine.pins()] == [pin.key for pin in before]
    fill(engine)
    assert found(engine, prompt) >= 48  # exact now
    engine.admission.check_books()
    monkeypatch.setattr(engine.runner, "recover", lambda: True)
    assert engine.recover()
    assert engine.pins() == []
    assert engine.stats()["free"] == 20


BAD = {
    "nothing": (lambda: Pin(), "a pin needs a key or ttl_s"),
    "empty key": (lambda: Pin("", 5), "key='' must be a string of 1 to 512 characters"),
    "long key": (lambda: Pin("x" * 513, 5), "1 to 512 characters"),
    "a number as key": (lambda: Pin(5, 5), "key=5 must be"),
    "no time": (lambda: Pin("x", 0), "ttl_s=0 must be more than 0 and at most 86400 seconds"),
    "too long": (lambda: Pin("x", 86401), "ttl_s=86401 must be"),
    "no number": (lambda: Pin("x", "5m"), "ttl_s='5m' must be"),
    "true": (lambda: Pin("x", True), "ttl_s=True must be"),
    "not finite": (lambda: Pin("x", float("nan")), "ttl_s=nan must be"),
    "share": (lambda: EngineConfig(max_pinned=1.5), "max_pinned=1.5 must be a number from 0 to 1"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_wrong_pins_are_refused(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


def test_a_pin_and_keep_exclude_each_other():
    engine, _ = pinning_engine()
    with pytest.raises(InvalidRequestError, match="keep=False and a pin exclude each other"):
        engine.generate(text(1, 20), TEN, keep=False, pin=Pin("x", 5))
    with pytest.raises(InvalidRequestError, match="pin='x' must be a Pin"):
        engine.generate(text(1, 20), TEN, pin="x")
