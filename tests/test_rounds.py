"""Rounds: members wait for each other, no longer than they say, and get what each would get alone."""

import contextlib
import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from conftest import CONFIG, TINY, idle, run, tiny_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from live import live_server, make_engine
from test_loop import PARAMS, POISONED, TEXT, facts, submit

from sparsex_jax import Engine, InvalidRequestError, ReuseConfig, Round, SamplingParams
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.scheduler.sequence import State

SPARSE = ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.2, overflow_tokens=4, tail_tokens=8)
NEVER = 60_000  # milliseconds
FEW = SamplingParams(max_new_tokens=4)
BLOCKS = [TEXT[at : at + length] for at, length in ((0, 60), (200, 35), (400, 45))]


def member(number=0, size=2, wait_ms=NEVER, name="round"):
    """The arguments of a member: a prompt that no other has, and its place in a round."""
    return TEXT[1000 + 50 * number : 1020 + 50 * number], FEW, Member(Round(name, size, wait_ms))


def join(loop, number=0, size=2, wait_ms=NEVER, name="round", **options):
    prompt, sampling, place = member(number, size, wait_ms, name)
    return submit(loop, prompt, sampling, member=place, **options)


def shuffled(rng, number, blocks, most=90):
    """A prompt for each member: its own beginning, the blocks in an order of its own, and a question."""
    prompts = []
    for each in range(number):
        own = TEXT[2000 + 100 * each : 2000 + 100 * each + int(rng.integers(10, most))]
        order = [blocks[place] for place in rng.permutation(len(blocks))]
        prompts.append(np.concatenate([own, *order, TEXT[3000 + 30 * each :][:12]]))
    return prompts


def as_if_alone(engine, prompt, sampling, **options):
    """What a prompt gets now. Nothing of it is kept, not even when its donors were used."""
    last_used = engine.cache.last_used()
    [out] = engine.generate_batch([prompt], sampling, keep=False, **options)
    engine.cache._pool.last_used[:] = last_used
    return out


def watch_plans(engine):
    """A list that grows by the number of requests in each prefill plan."""
    plans, begin = [], engine.runner.begin
    engine.runner.begin = lambda stages, late: plans.append(len(stages)) or begin(stages, late)
    return plans


def watch_donors(engine):
    """A list that grows by the segments of each sequence that is admitted, with the tokens of its prompt."""
    found, admit = [], engine.admission.admit

    def watched(sequence, tokens, *args):
        admit(sequence, tokens, *args)
        found.append((tokens, sequence.match.segments))

    engine.admission.admit = watched
    return found


# What members get ---------------------------------------------------------------------------------------------


def test_members_get_what_they_get_alone_from_the_same_donors_in_one_plan():
    prompts = shuffled(np.random.default_rng(1), 3, BLOCKS, 20)
    engine = tiny_engine(prefill_tokens=sum(map(len, prompts)) - 20)
    for at, block in itertools.product((3500, 3550, 3600), BLOCKS):  # each has three donors that are equally good
        engine.remember(np.concatenate([TEXT[at : at + 20], block]))
    few = ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2, tail_tokens=8)
    options = {"reuse": few, "return_logits": True}
    alone = [as_if_alone(engine, each, FEW, **options) for each in prompts]
    plans, found = watch_plans(engine), watch_donors(engine)
    together = engine.generate_batch(prompts, FEW, round=Round("first", 3, NEVER), **options)
    assert plans == [3], "more rows than the budget, but not more work"
    for one, out in zip(alone, together, strict=True):
        np.testing.assert_array_equal(out.report.active, one.report.active)
        assert np.abs(out.logits - one.logits).max() < 1e-3
        assert out.token_ids == one.token_ids
        assert facts(out.report) == facts(one.report) | {"round": facts(out.report)["round"]}
        share = out.report.round
        assert (share.id, share.size, share.members, share.late) == ("first", 3, 3, False)
    for block in BLOCKS:
        assert len({tuple(slots_of(block, tokens, segments)) for tokens, segments in found}) == 1
    assert engine.loop.stats.complete_rounds == 1
    assert idle(engine)


def slots_of(block, tokens, segments):
    """Where a prompt gets the middle of a block from."""
    at = next(at for at in range(len(tokens)) if np.array_equal(tokens[at : at + len(block)], block)) + len(block) // 2
    return [slot for each in segments if each.start <= at < each.end for slot in each.slots[at - each.start :][:1]]


def test_exact_donors_come_first_however_long_and_new_others_are():
    engine = tiny_engine()
    block, behind = BLOCKS[0], TEXT[500:560]
    engine.remember(block)
    approximate = np.concatenate([TEXT[600:640], block, behind])
    engine.generate(approximate, FEW, reuse=SPARSE)  # in which the block is a copy, and what follows saw it
    [first, *_] = engine.cache.lookup(np.concatenate([TEXT[700:710], block, behind]), "default").segments
    assert (first.exact, first.donor_start, first.length) == (True, 0, len(block))


def test_the_order_in_which_members_come_changes_nothing():
    prompts, answers = shuffled(np.random.default_rng(2), 3, [TEXT[400:500], BLOCKS[0]]), []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):  # nothing is stored, so that one computes what they share
        engine = tiny_engine()
        outs = engine.generate_batch([prompts[at] for at in order], FEW, reuse=SPARSE, round=Round("any", 3))
        answers.append([outs[order.index(at)] for at in range(3)])
    assert sum(out.report.reused_tokens for out in answers[0]) > 200
    for other in answers[1:]:
        for one, out in zip(answers[0], other, strict=True):
            np.testing.assert_array_equal(out.report.active, one.report.active)
            assert out.token_ids == one.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "smollm"])
def test_eight_agents_in_four_rounds(model, request):
    """Everybody's answers are blocks of everybody's next prompt, in an order of its own, behind histories that grow."""
    rng = np.random.default_rng(4)
    if model == "tiny":
        config = dataclasses.replace(CONFIG, store_tokens=16384, max_num_seqs=8)
        engine, words = Engine(TINY, PARAMS, config=config), 96
    else:
        engine, words = request.getfixturevalue("smollm"), 40000
    text = rng.integers(1, words, 4000).astype(np.int32)
    histories = [text[100 * each : 100 * each + int(rng.integers(20, 80))] for each in range(8)]
    said = [text[3000 + 60 * each : 3000 + 60 * each + 40] for each in range(8)]
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    options = {"reuse": SPARSE, "namespace": "eight agents", "return_logits": True}
    for block in said:
        engine.remember(block, namespace="eight agents")
    for number in range(4):
        asked = [
            np.concatenate([own, *(said[at] for at in rng.permutation(8)), text[2500 + number : 2510 + number]])
            for own in histories
        ]
        alone = [as_if_alone(engine, each, sampling, **options) for each in asked]
        together = engine.generate_batch(asked, sampling, round=Round(f"round {number}", 8, NEVER), **options)
        for one, out in zip(alone, together, strict=True):
            np.testing.assert_array_equal(out.report.active, one.report.active)
            assert np.abs(out.logits - one.logits).max() < 1e-3
            assert out.token_ids == one.token_ids
            assert out.report.segments == one.report.segments
        assert all(out.report.round.members == 8 for out in together)
        said = [np.array(out.token_ids, np.int32) for out in together]
        histories = [np.append(own, block) for own, block in zip(histories, said, strict=True)]


# Who comes, and who does not ----------------------------------------------------------------------------------


def test_members_are_held_until_all_are_there_and_others_are_not():
    engine = tiny_engine()
    first, other = join(engine.loop, 0), submit(engine.loop, TEXT[:30], FEW)
    while not other.finish_reason:
        engine.loop.step()
    assert engine.loop.stats.held == 1
    assert not first
    second = join(engine.loop, 1)
    run(engine.loop)
    assert [first.finish_reason, second.finish_reason, engine.loop.stats.held] == ["length", "length", 0]
    assert first.report.round.members == 2
    assert idle(engine)


def test_a_member_that_never_comes_delays_the_others_for_the_shortest_time_that_one_of_them_names():
    engine, began = tiny_engine(), time.perf_counter()
    waiting = [join(engine.loop, number, size=3, wait_ms=wait) for number, wait in enumerate((NEVER, 50))]
    run(engine.loop)
    assert time.perf_counter() - began < 30
    shares = [heard.report.round for heard in waiting]
    assert [(share.size, share.members) for share in shares] == [(3, 2), (3, 2)]
    assert 0.05 <= shares[1].waited_s < 30
    assert engine.loop.stats.cut_short_rounds == 1


def test_one_that_comes_late_is_not_held():
    engine = tiny_engine()
    first = join(engine.loop, 0, wait_ms=0)
    engine.loop.step()
    late = join(engine.loop, 1)
    run(engine.loop)
    assert (late.report.round.late, late.report.round.waited_s, late.report.round.members) == (True, 0.0, 1)
    assert not first.report.round.late
    assert engine.loop.stats.complete_rounds == 0


def test_a_cancelled_member_leaves_its_place_to_its_second_try():
    engine = tiny_engine()
    first = join(engine.loop, 0)
    engine.loop.step()
    first.ticket.cancel()
    second = join(engine.loop, 0)
    engine.loop.step()
    assert first.finish_reason == "cancelled"
    assert not second
    third = join(engine.loop, 1)
    run(engine.loop)
    assert [second.finish_reason, third.finish_reason] == ["length", "length"]
    assert idle(engine)


def test_one_that_fails_fails_alone():
    engine = tiny_engine(POISONED)
    good = [join(engine.loop, number, size=3) for number in range(2)]
    bad = submit(engine.loop, [1, 2, 96], FEW, member=Member(Round("round", 3, NEVER)))
    run(engine.loop)
    assert bad.finish_reason == "error"
    assert [heard.finish_reason for heard in good] == ["length", "length"]
    assert good[0].report.round.members == 3
    assert idle(engine)


def test_several_answers_to_a_prompt_are_one_member():
    engine = tiny_engine()
    prompt, sampling, place = member(0)
    heard = [submit(engine.loop, prompt, sampling, member=place) for _ in range(2)]
    engine.loop.step()
    assert not any(heard)
    heard.append(join(engine.loop, 1))
    run(engine.loop)
    assert [each.finish_reason for each in heard] == ["length"] * 3


def test_while_all_are_held_the_loop_rests():
    engine = tiny_engine()
    first = join(engine.loop, 0, wait_ms=300)
    began, rounds = time.perf_counter(), 0
    while not first.finish_reason:
        engine.loop.step()
        rounds += 1
    assert time.perf_counter() - began >= 0.3
    assert rounds < 100


def test_what_is_held_begins_when_nobody_comes_any_more():
    engine = tiny_engine()
    first = join(engine.loop, 0)
    engine.loop.step()
    assert engine.loop.stats.held == 1
    engine.loop.hold_nobody()
    run(engine.loop)
    second = join(engine.loop, 1, name="another")
    run(engine.loop)
    assert [each.finish_reason for each in (first, second)] == ["length"] * 2
    assert engine.loop.stats.cut_short_rounds == 2


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": "", "size": 2}, "round.id='' must be a string of 1 to 512 characters"),
        ({"id": "x" * 513, "size": 2}, "1 to 512"),
        ({"id": 3, "size": 2}, "round.id=3"),
        ({"id": "x", "size": 0}, "round.size=0 must be an integer >= 1"),
        ({"id": "x", "size": True}, "round.size=True"),
        ({"id": "x", "size": 2, "wait_ms": 60_001}, "round.wait_ms=60001 must be an integer from 0 to 60000"),
        ({"id": "x", "size": 2, "wait_ms": -1}, "round.wait_ms=-1"),
    ],
)
def test_fields_out_of_their_limits_are_named(fields, said):
    with pytest.raises(InvalidRequestError, match=said):
        Round(**fields)


def test_what_does_not_go_together_is_refused_and_changes_nothing():
    engine = tiny_engine()
    loop = engine.loop
    with pytest.raises(InvalidRequestError, match=r"round\.size=5 must be at most 4, max_num_seqs"):
        join(loop, 0, size=5)
    first = join(loop, 0, size=2)
    with pytest.raises(InvalidRequestError, match=r"round\.size=3 must be 2"):
        join(loop, 1, size=3)
    elsewhere = join(loop, 1, size=3, namespace="other", wait_ms=0)  # ids are names within a namespace
    second = join(loop, 1, size=2)
    with pytest.raises(InvalidRequestError, match=r"round\.id='round' has all its 2 members"):
        join(loop, 2, size=2)
    with pytest.raises(InvalidRequestError, match="must be a Round"):
        engine.generate(TEXT[:9], FEW, round="round")
    with pytest.raises(InvalidRequestError, match="has all its 1 members"):
        engine.generate_batch([TEXT[:9], TEXT[20:29]], FEW, round=Round("small", 1))
    run(loop)
    assert [each.finish_reason for each in (first, second, elsewhere)] == ["length"] * 3
    again = join(loop, 3, size=1)  # all have ended, and the id is free
    run(loop)
    assert again.report.round.members == 1
    assert idle(engine)


# Random lives -------------------------------------------------------------------------------------------------


class RoundMachine(RuleBasedStateMachine):
    """Members come, leave, and time passes. Nobody waits for ever, and no round has more members than places."""

    def __init__(self):
        super().__init__()
        self.engine, self.heard = tiny_engine(store_tokens=40 * 16), []

    @rule(
        name=st.sampled_from("ab"),
        size=st.integers(1, 3),
        wait_ms=st.sampled_from([0, 1, NEVER]),
        number=st.integers(0, 5),
        namespace=st.sampled_from(["default", "other"]),
        answers=st.integers(1, 2),
    )
    def come(self, name, size, wait_ms, number, namespace, answers):
        prompt, _, place = member(number, size, wait_ms, name)
        with contextlib.suppress(InvalidRequestError):  # of another size, or one too many
            for _ in range(answers):
                self.heard.append(submit(self.engine.loop, prompt, FEW, member=place, namespace=namespace))

    @rule(data=st.data())
    def leave(self, data):
        if self.heard:
            data.draw(st.sampled_from(self.heard)).ticket.cancel()

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            self.engine.loop.step()

    @invariant()
    def places_are_kept(self):
        loop = self.engine.loop
        for one in loop.policy.sequences:
            gathering = one.member.gathering
            assert len(gathering.there) <= gathering.size
            assert one.state in (State.WAITING, State.FINISHED) or not one.is_held

    def teardown(self):
        for heard in self.heard:
            if heard.ticket._sequence.is_held:
                heard.ticket.cancel()
        run(self.engine.loop)
        assert all(heard.finish_reason in ("length", "stop", "cancelled") for heard in self.heard)
        assert self.engine.loop.stats.held == self.engine.loop.stats.waiting == 0
        assert idle(self.engine)


TestRounds = pytest.mark.slow(RoundMachine.TestCase)
TestRounds.settings = settings(
    max_examples=12, stateful_step_count=15, suppress_health_check=list(HealthCheck), deadline=None
)


# Through HTTP -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    with live_server(make_engine()) as server:
        yield server


def ask(live, results, path, body, number):
    with live.http() as http:
        results[number] = http.post(path, json=body).json()


@pytest.mark.slow
def test_members_may_come_through_different_endpoints(live):
    place = {"id": "mixed", "size": 4, "wait_ms": NEVER}
    message = {"role": "user", "content": "Who keeps the light?"}
    asked = [
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 2, "round": place}),
        ("/v1/messages", {"model": "tiny", "messages": [message], "max_tokens": 2, "round": place}),
        ("/v1/responses", {"input": "Who keeps the light?", "max_output_tokens": 2, "round": place}),
        ("/v1/completions", {"prompt": "Who keeps the light?", "max_tokens": 2, "round": place}),
    ]
    results = [None] * len(asked)
    threads = [threading.Thread(target=ask, args=(live, results, *each, at)) for at, each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shares = [results[0]["sparsex"]["round"], results[3]["sparsex"]["round"]]
    assert all(share["members"] == 4 and not share["late"] for share in shares), results
    with live.http() as http:
        assert 'sparsex_rounds_total{members="all"} 1.0' in http.get("/metrics").text


NOTES = (
    "The lamp of the lighthouse is lit at dusk, and its keeper sleeps by day. He came from the north when young, "
    "and has not left the rock since but for two winters. His dog is called Tar. ",
    "Boats bring oil and bread on the first day of each month, if the sea lets them. The mate is a niece of "
    "the keeper, who knows the rocks by their names. She is to be a pilot. ",
    "The old harbour has silted up, so the boats land at the new one, an hour on foot to the south. Its inn has "
    "four rooms and a cook who was at sea. Nobody there speaks of the storm. ",
)


@pytest.mark.slow
def test_agents_of_rounds_are_stored_as_mirrors_and_go_on():
    """Three rounds of three, who hear all notes in orders of their own and go on with what they heard."""
    method = {"method": "sparsex", "boundary_layer": 0, "recompute_ratio": 0.05, "pool_tokens": 16}
    asked = {"reuse": method, "max_tokens": 4, "temperature": 0}
    heard = [f"You are agent {number}. " for number in range(3)]
    with live_server(make_engine(mirrors=True, page_size=16, choose="always")) as live, live.http() as http:
        for turn in range(3):
            place, results = {"id": f"turn {turn}", "size": 3, "wait_ms": NEVER}, [None] * 3
            for number in range(3):
                heard[number] += "".join(NOTES[(number + turn + at) % 3] for at in range(3)) + "What follows? "
            bodies = [asked | {"prompt": prompt, "round": place} for prompt in heard]
            threads = [
                threading.Thread(target=ask, args=(live, results, "/v1/completions", body, number))
                for number, body in enumerate(bodies)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            reports = [result["sparsex"] for result in results]
            assert all(report["round"]["members"] == 3 for report in reports), results
            assert all(report["reused_tokens"] + report["recomputed_tokens"] > 100 for report in reports if turn)
            heard = [prompt + result["choices"][0]["text"] for prompt, result in zip(heard, results, strict=True)]
        store = http.get("/v1/store").json()
        assert store["derived"] > 10
        assert store["spare"] + store["saved"] >= store["derived"] - store["base"]
        assert f'sparsex_pages{{state="spare"}} {store["spare"]}.0' in http.get("/metrics").text


@pytest.mark.parametrize(
    ("place", "param"),
    [
        ({"size": 2}, "round.id"),
        ({"id": "x"}, "round.size"),
        ({"id": "", "size": 2}, "round.id"),
        ({"id": "x", "size": 0}, "round.size"),
        ({"id": "x", "size": 99}, "round.size"),
        ({"id": "x", "size": True}, "round.size"),
        ({"id": "x", "size": "2"}, "round.size"),
        ({"id": "x", "size": 2, "wait_ms": "5"}, "round.wait_ms"),
        ({"id": "x", "size": 2, "wait_ms": 60_001}, "round.wait_ms"),
        ("x", "round"),
    ],
)
def test_requests_with_wrong_rounds_are_refused_by_name(live, place, param):
    with live.http() as http:
        reply = http.post("/v1/completions", json={"prompt": "Who?", "max_tokens": 1, "round": place})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param, reply.json()
