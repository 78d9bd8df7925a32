"""Decode dispatches and prefills that are sent before the host has seen the tokens of the dispatch before."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import idle, run, tiny_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_properties import EngineMachine

from sparsex_jax import ReuseConfig, SamplingParams
from sparsex_jax.device.runner import PrefillRun
from sparsex_jax.device.sampling import Sampled
from sparsex_jax.scheduler import loop, policy
from sparsex_jax.scheduler.execution import Execution
from sparsex_jax.scheduler.sequence import Event, State

RNG = np.random.default_rng(7)
TEXT = RNG.integers(1, 96, 600).astype(np.int32)
FULL = ReuseConfig("full")
END = 90  # the model's end token here; a random model draws it often


@pytest.fixture
def ahead(monkeypatch):
    """However fast the device is, dispatches are sent ahead."""
    monkeypatch.setattr(policy, "ROUND_SECONDS", 0.0)


def engine_with_an_end(**changes):
    engine = tiny_engine(**changes)
    engine.loop.requests.end_tokens = (END,)
    return engine


def hear(loop, prompt, new=60, **options):
    """Submit a request. The list that is returned gets its events."""
    heard = []
    options = {"reuse": FULL, "listener": heard.append} | options
    sampling = options.pop("sampling", None) or SamplingParams(max_new_tokens=new, ignore_eos=True)
    return heard, loop.submit(prompt, sampling, **options)


def answer_so_far(heard: list[Event]):
    return [token for event in heard for token in event.token_ids]


def answer(heard: list[Event]):
    return answer_so_far(heard), heard[-1].finish_reason


def watch(engine, monkeypatch):
    """What happens from now on, in order: `send`, `fetch` of decode tokens, `prefill`."""
    order, runner, get = [], engine.runner, jax.device_get
    send, advance = runner.start_decode, runner.advance

    def fetch(tree):
        if isinstance(tree, Sampled):
            order.append("fetch")
        return get(tree)

    runner.start_decode = lambda *args: order.append("send") or send(*args)
    runner.advance = lambda *args: order.append("prefill") or advance(*args)
    monkeypatch.setattr("sparsex_jax.scheduler.execution.jax.device_get", fetch)
    return order


def decoding(engine, number=2, new=60):
    """The events of sequences that decode, one dispatch of which is on its way."""
    heard = [hear(engine.loop, TEXT[20 * at : 20 * at + 10], new)[0] for at in range(number)]
    for _ in range(20):
        if engine.loop._execution.ahead is not None:
            return heard
        engine.loop.step()
    raise AssertionError("nothing was sent ahead")


def alone():
    """What those get who are `decoding`, two of them."""
    return [answer(hear_alone(TEXT[20 * at : 20 * at + 10], 60)) for at in (0, 1)]


def lose_tokens(engine, monkeypatch):
    """The next tokens cannot be fetched, and the store is lost with them."""
    get, failures = jax.device_get, [RuntimeError("the device is gone")]

    def fetch(tree):
        if isinstance(tree, Sampled) and failures:
            engine.runner.store.delete()
            raise failures.pop()
        return get(tree)

    monkeypatch.setattr("sparsex_jax.scheduler.execution.jax.device_get", fetch)


# The order --------------------------------------------------------------------------------------------------


def test_the_next_dispatch_is_sent_before_the_tokens_of_this_one_are_seen(ahead, monkeypatch):
    engine = tiny_engine()
    heard, _ = hear(engine.loop, TEXT[:10], 25)
    engine.loop.step()
    order = watch(engine, monkeypatch)
    tell = engine.loop._tell
    monkeypatch.setattr(engine.loop, "_tell", lambda *args: order.append("tell") or tell(*args))
    run(engine.loop)
    assert order == ["send", *["send", "fetch", "tell"] * 5, "fetch", "tell"]
    assert [len(event.token_ids) for event in heard] == [1, *[4] * 6]


def test_long_steps_are_sent_for_by_twos(ahead, monkeypatch):
    """A request that comes meanwhile waits for the end of a dispatch."""
    engine = tiny_engine()
    monkeypatch.setattr(policy, "LONG_SECONDS", 0.0)
    heard, _ = hear(engine.loop, TEXT[:10], 8)
    run(engine.loop)
    assert [len(event.token_ids) for event in heard] == [1, 2, 2, 2, 1]
    assert answer(heard) == answer(hear_alone(TEXT[:10], 8))


def test_the_next_dispatch_is_sent_before_the_first_tokens_are_seen(ahead, monkeypatch):
    """Those who decode already, and who is prefilled, decode together."""
    engine = tiny_engine()
    monkeypatch.setattr(policy, "LONG_SECONDS", 0.0)
    heard = decoding(engine)
    engine.loop.step()
    late, _ = hear(engine.loop, TEXT[100:120], 8)
    order = watch(engine, monkeypatch)
    engine.loop.step()
    assert order == ["prefill", "fetch", "send", "fetch"], "the tokens of those who decoded, and the first one"
    assert len(engine.loop._execution.ahead.sequences) == 3
    assert len(answer_so_far(late)) == 1
    run(engine.loop)
    assert answer(late) == answer(hear_alone(TEXT[100:120], 8))
    assert [answer(one) for one in heard] == alone()
    assert idle(engine)


def test_devices_that_the_host_steers_get_it_sent_early_too(ahead, monkeypatch):
    """What is drawn from is decided on the host there, and dispatches are of a few short programs."""
    monkeypatch.setattr(policy, "LONG_SECONDS", 0.0)
    drawn = [SamplingParams(max_new_tokens=9, temperature=1.0, top_k=k, seed=k, ignore_eos=True) for k in (0, 5, 7)]

    def answers(engine):
        heard = []
        for at, sampling in enumerate(drawn):
            heard.append(hear(engine.loop, TEXT[50 * at : 50 * at + 30], sampling=sampling)[0])
            engine.loop.step()
        run(engine.loop)
        assert idle(engine)
        return [answer(one) for one in heard]

    steered = tiny_engine()
    steered.runner.host_steers = True
    with order(*ORDERS["one after the other"]):
        expected = answers(tiny_engine())
    assert answers(steered) == expected


def test_a_first_token_that_ends_an_answer_is_the_last_one(ahead, monkeypatch):
    """Tokens behind it are on their way when the host sees it."""
    for long in (float("inf"), 0.0):
        monkeypatch.setattr(policy, "LONG_SECONDS", long)
        engine = engine_with_an_end()
        heard = decoding(engine, 1)
        first = engine.generate(TEXT[100:120], SamplingParams(max_new_tokens=1), reuse=FULL, keep=False).token_ids[0]
        engine.loop.requests.end_tokens = (first,)
        late, _ = hear(engine.loop, TEXT[100:120], sampling=SamplingParams(max_new_tokens=8))
        run(engine.loop)
        assert answer(late) == ([first], "stop")
        assert answer(heard[0]) == answer(hear_alone(TEXT[:10], 60))
        assert idle(engine)


def test_penalties_count_a_first_token_that_the_host_has_not_seen(ahead, monkeypatch):
    """It cannot come again."""
    tokens = []
    for long in (float("inf"), 0.0):
        monkeypatch.setattr(policy, "LONG_SECONDS", long)
        engine = tiny_engine()
        decoding(engine, 1)
        penalised = SamplingParams(max_new_tokens=12, presence_penalty=2.0, frequency_penalty=2.0, logprobs=1)
        late, _ = hear(engine.loop, TEXT[100:120], sampling=penalised)
        run(engine.loop)
        tokens.append(answer(late))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("loses", [False, True], ids=["prefill fails", "store is lost"])
def test_what_stands_on_a_lost_prefill_is_dropped(ahead, monkeypatch, loses):
    engine = tiny_engine()
    monkeypatch.setattr(policy, "LONG_SECONDS", 0.0)
    heard = decoding(engine)
    late, _ = hear(engine.loop, TEXT[300:320], 20)
    computed, failures = PrefillRun.computed, [RuntimeError("broken")]

    def broken(run):
        if failures:
            assert engine.loop._execution.ahead is not None
            if loses:
                engine.runner.store.delete()
            raise failures.pop()
        return computed(run)

    monkeypatch.setattr(PrefillRun, "computed", broken)
    run(engine.loop)
    assert answer(late) == ([], "error")
    assert [answer(one) for one in heard] == alone()
    assert idle(engine)


def test_one_after_the_other_where_the_device_is_faster_than_the_host(monkeypatch):
    engine = tiny_engine()
    hear(engine.loop, TEXT[:10], 1 + 3 * 16)
    engine.loop.step()
    order = watch(engine, monkeypatch)
    run(engine.loop)
    assert order == ["send", "fetch"] * 3


def test_who_comes_meanwhile_waits_for_what_is_on_its_way_and_no_more(ahead, monkeypatch):
    engine = tiny_engine()
    decoding(engine)
    order = watch(engine, monkeypatch)
    late, _ = hear(engine.loop, TEXT[100:120], 2)
    engine.loop.step()
    assert order == ["prefill", "fetch", "fetch"], "the last is its first token"
    run(engine.loop)
    assert len(answer(late)[0]) == 2
    assert idle(engine)


def test_who_comes_before_the_next_dispatch_is_sent_waits_for_this_one_alone(ahead, monkeypatch):
    """The next one is sent late, for the sake of those who come until then."""
    engine = tiny_engine()
    decoding(engine)
    order, late = watch(engine, monkeypatch), []

    def comes(dispatch):
        if not late:
            late.append(hear(engine.loop, TEXT[100:120], 2)[0])
        return 10.0

    monkeypatch.setattr(engine.loop._execution, "seconds_left", comes)
    engine.loop.step()
    assert order == ["prefill", "fetch", "fetch"], "the last is its first token"
    monkeypatch.setattr(engine.loop._execution, "seconds_left", lambda dispatch: 0.0)
    run(engine.loop)
    assert len(answer(late[0])[0]) == 2
    assert idle(engine)


def test_a_prefill_that_asks_the_host_something_is_sent_behind_the_tokens(ahead, monkeypatch):
    """Its call returns late, and the tokens would wait for it."""
    engine = tiny_engine()
    monkeypatch.setattr(engine.runner, "asks_nothing", lambda stages: False)
    decoding(engine)
    order = watch(engine, monkeypatch)
    hear(engine.loop, TEXT[100:120], 2)
    engine.loop.step()
    assert order == ["fetch", "prefill", "fetch"]


def test_a_prefill_that_is_cut_by_layers_is_sent_behind_the_tokens(ahead, monkeypatch):
    """The host waits for each part of it."""
    engine = tiny_engine(prefill_tokens=16)
    segment = engine.remember(TEXT[300:364])
    assert segment
    decoding(engine)
    order = watch(engine, monkeypatch)
    prompt = np.concatenate([TEXT[500:505], TEXT[300:364], TEXT[510:515]])
    hear(engine.loop, prompt, 2, reuse=ReuseConfig("sparsex", boundary_layer=1))
    engine.loop.step()
    assert order == ["fetch", "prefill"]
    run(engine.loop)
    assert idle(engine)


def test_a_dispatch_is_sent_when_the_tokens_before_it_are_due(ahead, monkeypatch):
    engine = tiny_engine()
    decoding(engine)
    order, execution = watch(engine, monkeypatch), engine.loop._execution
    seconds, waited = iter([1.0, 0.1, loop.LEAD_SECONDS, -1.0]), []
    monkeypatch.setattr(execution, "seconds_left", lambda dispatch: next(seconds))
    monkeypatch.setattr(engine.loop._news, "wait", waited.append)
    engine.loop.step()
    assert order == ["send", "fetch"]
    assert len(waited) == 2
    dispatch = execution.ahead
    jax.block_until_ready(dispatch.sampled.token)
    monkeypatch.undo()
    assert execution.seconds_left(dispatch) == 0.0


def test_nothing_is_sent_ahead_for_sequences_that_all_end(ahead, monkeypatch):
    engine = tiny_engine()
    hear(engine.loop, TEXT[:10], 5)
    engine.loop.step()
    order = watch(engine, monkeypatch)
    run(engine.loop)
    assert order == ["send", "fetch"]
    assert engine.loop._execution.ahead is None


def test_nothing_is_sent_ahead_where_pages_are_few(ahead, monkeypatch):
    """Of 6 pages the two have 4, and soon all: the younger one is preempted as it would be otherwise."""
    answers = []
    for seconds in (0.0, float("inf")):
        monkeypatch.setattr(policy, "ROUND_SECONDS", seconds)
        engine = tiny_engine(store_tokens=6 * 16, decode_steps=4)
        heard = [hear(engine.loop, TEXT[at : at + 10], 60)[0] for at in (0, 50)]
        run(engine.loop)
        answers.append([answer(one) for one in heard])
        assert engine.loop.policy.preemptions > 0
        assert idle(engine)
    assert answers[0] == answers[1]


# What comes of it -------------------------------------------------------------------------------------------


def cut_short(engine):
    """Sampling that a stop token, which only the host knows, ends within a dispatch, and the tokens until then."""
    drawn = SamplingParams(max_new_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    whole = engine.generate(TEXT[:10], drawn, reuse=FULL, keep=False).token_ids
    at = next(at for at in range(10, 60) if at % 4 == 2 and whole[at] not in whole[:at])
    return dataclasses.replace(drawn, stop_token_ids=(whole[at],)), whole[: at + 1]


def test_tokens_of_who_has_ended_are_thrown_away(ahead):
    engine = tiny_engine()
    stops, tokens = cut_short(engine)
    heard, _ = hear(engine.loop, TEXT[:10], sampling=stops, namespace="stopped")
    other, _ = hear(engine.loop, TEXT[200:210])
    run(engine.loop)
    assert answer(heard) == (tokens, "stop")
    assert len(answer(other)[0]) == 60
    committed = [node for node in engine.cache.tree.live_nodes() if node.namespace == "stopped"]
    assert max(node.start + node.length for node in committed) == 10 + len(tokens) - 1, "the last was no input"
    assert idle(engine)


def test_slots_of_ended_sequences_stay_until_fewer_slots_do(ahead, monkeypatch):
    """Four sequences; one ends, and dispatches go on ahead; then two are left, whose batch is made anew."""
    engine = tiny_engine()
    lengths = (13, 60, 30, 61)
    expected = [answer(hear_alone(TEXT[at : at + 9], new)) for at, new in enumerate(lengths)]
    heard = [hear(engine.loop, TEXT[at : at + 9], new)[0] for at, new in enumerate(lengths)]
    sizes, send = [], engine.runner.start_decode
    engine.runner.start_decode = lambda state, *args: sizes.append(len(state.token)) or send(state, *args)
    run(engine.loop)
    assert [answer(one) for one in heard] == expected
    assert set(sizes) == {2, 4}, "of two slots one stays with the last sequence"
    assert idle(engine)


def hear_alone(prompt, new):
    engine = tiny_engine()
    heard, _ = hear(engine.loop, prompt, new)
    run(engine.loop)
    return heard


def test_pages_of_a_cancelled_sequence_are_free_at_once_and_can_be_written(ahead):
    engine = tiny_engine(store_tokens=10 * 16)
    expected = answer(hear_alone(TEXT[300:400], 20))
    heard = []
    listener = heard.append
    ticket = engine.loop.submit(
        TEXT[:40], SamplingParams(max_new_tokens=80, ignore_eos=True), reuse=FULL, listener=listener, keep=False
    )
    while engine.loop._execution.ahead is None:
        engine.loop.step()
    ticket.cancel()
    late, _ = hear(engine.loop, TEXT[300:400], 20)
    engine.loop.step()
    assert heard[-1].finish_reason == "cancelled"
    engine.loop.admission.check_books()
    run(engine.loop)
    assert answer(late) == expected
    assert idle(engine)


@pytest.mark.parametrize("loses", [False, True], ids=["dispatch fails", "store is lost"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_dispatch_that_fails_ahead_ends_only_who_is_at_fault(ahead, loses, number):
    """With one sequence it is at fault; several go on one by one, or from the beginning, and nobody fails."""
    engine = tiny_engine()
    heard = decoding(engine, number)
    send, calls = engine.runner.start_decode, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 1:
            if loses:
                engine.runner.store.delete()
            raise RuntimeError("broken")
        return send(*args)

    engine.runner.start_decode = broken
    run(engine.loop)
    if number == 1:
        assert [one[-1].finish_reason for one in heard] == ["error"]
    else:
        assert [answer(one) for one in heard] == alone()
    assert idle(engine)


def test_what_stands_on_a_lost_dispatch_is_dropped(ahead, monkeypatch):
    """The tokens of a dispatch cannot be had, and the one behind it is under way."""
    engine = tiny_engine()
    heard = decoding(engine)
    lose_tokens(engine, monkeypatch)
    engine.loop.step()
    assert engine.loop._execution.ahead is None
    run(engine.loop)
    assert [answer(one) for one in heard] == alone()
    assert idle(engine)


@pytest.mark.parametrize("loses", [False, True], ids=["prefill fails", "store is lost"])
def test_a_prefill_that_cannot_be_sent_ends_only_who_is_at_fault(ahead, loses):
    engine = tiny_engine()
    heard = decoding(engine)
    advance = engine.runner.advance

    def broken(*args):
        engine.runner.advance = advance
        if loses:
            engine.runner.store.delete()
        raise RuntimeError("broken")

    engine.runner.advance = broken
    late, _ = hear(engine.loop, TEXT[300:320], 20)
    run(engine.loop)
    assert answer(late) == ([], "error")
    assert [answer(one) for one in heard] == alone()
    assert idle(engine)


def test_a_prefill_behind_a_lost_dispatch_is_made_anew(ahead, monkeypatch):
    engine = tiny_engine()
    heard = decoding(engine)
    late, _ = hear(engine.loop, TEXT[300:320], 20)
    lose_tokens(engine, monkeypatch)
    order = watch(engine, monkeypatch)
    engine.loop.step()
    assert order[0] == "prefill"
    run(engine.loop)
    assert answer(late) == answer(hear_alone(TEXT[300:320], 20))
    assert [answer(one) for one in heard] == alone()
    assert idle(engine)


def test_a_dispatch_for_nobody_harms_nobody(ahead):
    """All end by a token that the device does not know, while one more dispatch is under way."""
    engine = tiny_engine()
    stops, tokens = cut_short(engine)
    assert engine.generate(TEXT[:10], stops, reuse=FULL, keep=False).token_ids == tokens
    left = engine.loop._execution.ahead
    assert left is not None
    assert left.sequences == []
    assert (
        engine.generate(TEXT[300:400], SamplingParams(max_new_tokens=20), reuse=FULL).token_ids
        == (answer(hear_alone(TEXT[300:400], 20))[0])
    )
    assert engine.loop._execution.ahead is None
    assert idle(engine)


# Any traffic ------------------------------------------------------------------------------------------------

requests = st.fixed_dictionaries(
    {
        "after": st.integers(0, 6),  # rounds behind the request before it
        "at": st.integers(0, 3),
        "length": st.integers(1, 50),
        "new": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ends": st.sampled_from(["never", "end", "stop"]),
        "reuse": st.sampled_from(["full", "prefix"]),
        "cancelled": st.one_of(st.none(), st.none(), st.integers(0, 8)),  # rounds behind its submission
    }
)


def sampling_of(request, number):
    stops = {"stop": tuple(range(0, 97, 9))}.get(request["ends"], ())
    return SamplingParams(
        max_new_tokens=request["new"],
        temperature=request["temperature"],
        seed=number,
        ignore_eos=request["ends"] != "end",
        stop_token_ids=stops,
    )


def lives(engine, traffic):
    """What each request is told in the end, its report among it, with the books looked at in each round."""
    loop, told, tickets, cancels = engine.loop, [], [], {}
    now = 0
    for number, request in enumerate(traffic):
        for _ in range(request["after"]):
            step(loop, now, cancels)
            now += 1
        prompt = TEXT[100 * request["at"] : 100 * request["at"] + request["length"]]
        sampling = sampling_of(request, number)
        heard, ticket = hear(loop, prompt, sampling=sampling, reuse=ReuseConfig(request["reuse"]))
        told.append(heard)
        tickets.append(ticket)
        if request["cancelled"] is not None:
            cancels.setdefault(now + request["cancelled"], []).append(ticket)
    while loop._has_work():
        step(loop, now, cancels)
        now += 1
    assert idle(engine)
    EngineMachine.stored_kv_is_that_of_the_tokens_claimed(SimpleNamespace(engine=engine))
    return told


def step(loop, now, cancels):
    for ticket in cancels.pop(now, ()):
        ticket.cancel()
    loop.step()
    loop.admission.check_books()
    ahead = loop._execution.ahead
    assert ahead is None or all(one.state in (State.DECODING, State.FINISHED) for one in ahead.batch.sequences)


@contextlib.contextmanager
def order(round_seconds, long_seconds, sends_prefills):
    """The loop within sends what it may before it has seen what is in front of it, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "ROUND_SECONDS", round_seconds)
        patch.setattr(policy, "LONG_SECONDS", long_seconds)
        if not sends_prefills:
            patch.setattr(Execution, "can_send", lambda *_: False)
        yield


NEVER = float("inf")
ORDERS = {"one after the other": (NEVER, NEVER, False), "ahead": (0.0, NEVER, True), "long steps": (0.0, 0.0, True)}


def check_against_one_after_the_other(traffic, pages, name):
    results = []
    for each in (name, "one after the other"):
        with order(*ORDERS[each]):
            results.append(lives(engine_with_an_end(store_tokens=pages * 16, decode_steps=4), traffic))
    for request, one, other in zip(traffic, *results, strict=True):
        tokens, expected = (answer(heard)[0] for heard in (one, other))
        shorter = min(len(tokens), len(expected))
        assert tokens[:shorter] == expected[:shorter]
        reasons = {heard[-1].finish_reason for heard in (one, other)}
        if request["cancelled"] is None:
            assert (len(tokens), len(reasons)) == (len(expected), 1)
        assert "error" not in reasons
    return results


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(requests, min_size=1, max_size=7), st.sampled_from([12, 40]), st.sampled_from(["ahead", "long steps"]))
def test_any_traffic_gets_what_it_gets_one_after_the_other(traffic, pages, name):
    check_against_one_after_the_other(traffic, pages, name)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(requests, min_size=1, max_size=12), st.sampled_from([8, 12, 40]), st.sampled_from(["ahead", "long steps"])
)
def test_much_traffic_gets_what_it_gets_one_after_the_other(traffic, pages, name):
    check_against_one_after_the_other(traffic, pages, name)


class ManyLivesAhead(EngineMachine):
    """Any life of an engine that sends ahead: what is stored is what is claimed."""

    def __init__(self):
        self._order = contextlib.ExitStack()
        self._order.enter_context(order(*ORDERS["long steps"]))
        super().__init__()

    def teardown(self):
        self._order.close()
        super().teardown()


ManyLivesAhead.TestCase.settings = settings(EngineMachine.TestCase.settings, max_examples=60)
test_many_lives_ahead = pytest.mark.slow(ManyLivesAhead.TestCase)
