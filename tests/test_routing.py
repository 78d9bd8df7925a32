"""Digests, the policy and the router, without engines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax.errors import DigestError, InvalidRequestError, NoReplicaError
from sparsex_jax.routing import (
    Applied,
    Ask,
    Candidates,
    Holdings,
    LeastLoaded,
    Load,
    Position,
    RoundRobin,
    Router,
    SegmentPolicy,
    Sketch,
    Update,
)
from sparsex_jax.routing.holders import Holders, counted

SKETCH = Sketch(b"a fleet's secret", every=4)
TAG, OTHER = SKETCH.tag("docs"), SKETCH.tag("other")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def text(seed: int, length: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 49152, length, dtype=np.int32)


def ask(*texts: np.ndarray, namespace: str = "docs", group: bytes | None = None) -> Ask:
    return Ask.of(SKETCH, np.concatenate(texts), namespace, group)


def holding(*texts: np.ndarray, namespace: str = "docs") -> Holdings:
    holdings = Holdings()
    for each in texts:
        holdings.add(SKETCH.tag(namespace), SKETCH.samples(each, namespace).tolist())
    return holdings


def router(*names: str, policy=None, **options) -> Router:
    made = Router(policy or SegmentPolicy(), clock=options.pop("clock", Clock()), **options)
    for name in names:
        made.join(name)
    return made


# Digests ----------------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_where_the_text_stands():
    inner = text(0)
    whole = np.concatenate([text(1, 37), inner, text(2, 11)])
    assert set(SKETCH.samples(inner, "docs").tolist()) <= set(SKETCH.samples(whole, "docs").tolist())
    assert 0.5 < len(SKETCH.samples(inner, "docs")) / ((256 - 7) / 4) < 2


def test_samples_of_several_texts_are_those_of_each():
    texts = np.stack([text(0), text(1)])
    for one, each in zip(texts, SKETCH.samples_of_each(texts, "docs"), strict=True):
        assert SKETCH.samples(one, "docs").tolist() == each.tolist()
    assert [len(each) for each in SKETCH.samples_of_each(texts[:, :7], "docs")] == [0, 0]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=64), st.text(max_size=8), st.text(max_size=8))
def test_no_hit_across_namespaces_or_fleets(tokens, one, other):
    """Also of the plainest texts, of four words only."""
    prompt = np.array(tokens, np.int32)
    made = router("a")
    made.apply("a", holding(prompt, namespace=one).snapshot())
    for sketch, namespace in ((SKETCH, other), (Sketch(b"another's secret", 4), one)):
        if sketch is not SKETCH or one != other:
            assert made.route(Ask.of(sketch, prompt, namespace)).hit_tokens == 0


def test_a_digest_does_not_have_the_samples_of_another_namespace():
    """Two namespaces with the same text have nothing in common that could be compared."""
    ours, theirs = (set(SKETCH.samples(text(0), name).tolist()) for name in ("docs", "other"))
    assert TAG != OTHER
    assert len(ours & theirs) == 0


changes = st.lists(st.tuples(st.sampled_from([TAG, OTHER]), st.integers(0, 9), st.booleans()), max_size=60)


@given(changes, st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_deltas_give_the_snapshot(steps, told_after, lost):
    """Whatever is stored and evicted, and whatever gets lost on the way, once a gap is made up for by a snapshot."""
    holdings, made, texts = Holdings(), router("a"), {}
    made.apply("a", holdings.snapshot())
    for number, (tag, sample, comes) in enumerate(steps):
        count = texts.get((tag, sample), 0)
        if comes:
            holdings.add(tag, [sample])
            texts[tag, sample] = count + 1
        elif count:
            holdings.remove(tag, [sample])
            texts[tag, sample] = count - 1
        delta = holdings.delta() if number in told_after else None
        if delta and number not in lost and made.apply("a", Update.from_bytes(delta.to_bytes())) is Applied.GAP:
            assert made.position("a") == Position()
            assert made.apply("a", holdings.snapshot()) is Applied.APPLIED
        made.check()
    last = holdings.delta()
    if (last is not None and made.apply("a", last) is Applied.GAP) or made.position("a").seq != holdings.seq:
        made.apply("a", holdings.snapshot())
    fresh = router("a")
    fresh.apply("a", holdings.snapshot())
    held = {key for key, count in texts.items() if count}
    assert holdings.num_samples == len(held) == fresh.states()["a"]["samples"]
    for tag, sample in texts:
        probe = Ask(tag, np.array([sample], np.uint32), 8)
        expected = 8.0 if (tag, sample) in held else 0.0
        assert fresh.route(probe).hit_tokens == expected
        assert made.route(probe).hit_tokens == expected


def test_what_was_never_added_cannot_be_removed():
    holdings = holding(text(0))
    with pytest.raises(KeyError, match="removed more often"):
        holdings.remove(TAG, [1])
    assert holdings.delta() is not None
    assert holdings.delta() is None


@given(st.booleans(), changes)
def test_an_update_is_its_bytes(whole, steps):
    by_tag = {}
    for tag, sample, comes in steps:
        by_tag.setdefault((tag, comes), set()).add(sample)
    added, removed = (
        {tag: np.array(sorted(each), np.uint32) for (tag, comes), each in by_tag.items() if comes is wanted}
        for wanted in (True, False)
    )
    update = Update(7, 3, whole, added, removed)
    read = Update.from_bytes(update.to_bytes())
    assert (read.epoch, read.seq, read.whole) == (7, 3, whole)
    for ours, theirs in ((added, read.added), (removed, read.removed)):
        assert {tag: each.tolist() for tag, each in ours.items()} == {
            tag: each.tolist() for tag, each in theirs.items()
        }


@given(st.binary(max_size=80), st.integers(0, 40))
def test_other_bytes_are_refused(noise, cut):
    good = holding(text(0)).snapshot().to_bytes()
    for bad in (noise, good[: len(good) - 1 - cut], good + noise[:1] + b"x"):
        with pytest.raises(DigestError, match="update"):
            Update.from_bytes(bad)


@pytest.mark.parametrize(("options", "message"), [({"key": b"short"}, "key"), ({"every": 3}, "every=3")])
def test_a_wrong_sketch_is_refused(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        Sketch(**{"key": b"k" * 16} | options)


# Holders ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.sets(st.integers(0, 6), max_size=4)), max_size=40))
def test_holders_are_sets_by_slot(steps):
    holders, expected = Holders(), {}
    for slot, comes, samples in steps:
        own = expected.setdefault(slot, set())
        if comes:
            holders.add(slot, TAG, samples)
            own |= samples
        else:
            holders.remove(slot, TAG, samples)
            own -= samples
        holders.check()
    found = [holders.of(TAG).get(sample, 0) for sample in range(7)]
    assert counted(found, 21).tolist() == [len(expected.get(slot, ())) for slot in range(21)]


# The policy -------------------------------------------------------------------------------------------------


def candidates(hits, queued=None, running=None) -> Candidates:
    number = len(hits)
    hashes = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return Candidates(
        np.array(hits, np.float64),
        np.array(queued or [0] * number, np.float64),
        np.array(running or [0] * number, np.int64),
        hashes,
    )


def test_the_replica_that_holds_most_is_chosen_until_its_queue_costs_more():
    policy = SegmentPolicy(reuse_cost=0.1, slack=0.0)
    assert policy.choose(1000, candidates([0, 900, 300]), 5) == 1
    assert policy.choose(1000, candidates([0, 900, 300], [0, 2100, 0]), 5) == 1  # 2860 against 2920
    assert policy.choose(1000, candidates([0, 900, 300], [0, 2200, 0]), 5) == 2
    assert policy.choose(1000, candidates([0, 900, 300], running=[0, 60, 60]), 5) == 0


@given(st.integers(0, 2**64 - 1), st.integers(2, 30))
def test_ties_stick_to_content_and_outlive_others(content, number):
    policy, all_of_them = SegmentPolicy(), candidates([0] * number)
    chosen = policy.choose(100, all_of_them, content)
    assert policy.choose(100, all_of_them, content) == chosen
    gone = (chosen + 1) % number
    rest = [i for i in range(number) if i != gone]
    fewer = Candidates(*(getattr(all_of_them, name)[rest] for name in ("hits", "queued", "running", "hashes")))
    assert rest[policy.choose(100, fewer, content)] == chosen


def test_two_choices_take_the_shorter_queue():
    """Within the slack, of the two that the content draws; other contents draw others."""
    policy, number = SegmentPolicy(slack=1.0), 16
    queues = list(range(0, 2 * number, 2))
    chosen = [policy.choose(100, candidates([0] * number, queues), content) for content in range(4000)]
    shares = np.bincount(chosen, minlength=number) / len(chosen)
    # the probability that the best of two of 16 is of rank r: (15 - r) / 120
    assert np.abs(shares - (15 - np.arange(16)) / 120).max() < 0.03


def test_other_policies():
    assert [RoundRobin().choose(1, candidates([0, 9]), 0) for _ in range(2)] == [0, 0]
    policy = RoundRobin()
    assert [policy.choose(1, candidates([0, 9]), 0) for _ in range(4)] == [0, 1, 0, 1]
    assert LeastLoaded().choose(100, candidates([100, 0], [5, 0]), 0) == 1
    with pytest.raises(InvalidRequestError, match="slack=-1"):
        SegmentPolicy(slack=-1)


# The router -------------------------------------------------------------------------------------------------


def test_prompts_go_where_their_segments_are():
    made, documents = router("a", "b", assume_s=0), [text(i) for i in range(4)]
    made.apply("a", holding(documents[0], documents[1]).snapshot())
    made.apply("b", holding(documents[2], documents[3]).snapshot())
    for order, where in (((1, 0), "a"), ((3, 2), "b"), ((2, 3), "b")):
        ticket = made.route(ask(*(documents[i] for i in order), text(9, 32)))
        assert ticket.replica == where
        assert 0.8 * 512 < ticket.hit_tokens <= 544
        made.done(ticket)
    made.check()


def test_a_burst_of_equal_prompts_stays_together_until_the_queue_costs_more():
    """Before any digest says so: they are expected where the first one went."""
    made = router(*"abcd")
    tickets = [made.route(ask(text(0), text(i + 1, 32))) for i in range(3)]
    assert len({ticket.replica for ticket in tickets}) == 1
    assert tickets[0].hit_tokens == 0
    assert tickets[2].hit_tokens > 200
    crowd = [made.route(ask(text(0), text(i + 10, 32))) for i in range(60)]
    assert len({ticket.replica for ticket in crowd}) == 4


def test_what_failed_is_not_expected():
    clock = Clock()
    made = router("a", clock=clock, assume_s=2.0)
    made.done(made.route(ask(text(0))), failed=True)
    ticket = made.route(ask(text(0)))
    assert ticket.hit_tokens == 0
    made.done(ticket)
    clock.now = 1.9
    again = made.route(ask(text(0)))
    assert again.hit_tokens == 256
    made.done(again, failed=True)
    clock.now = 2.1
    assert made.route(ask(text(0))).hit_tokens == 0


def test_a_silent_replica_is_thought_to_hold_nothing():
    clock = Clock()
    made = router("a", clock=clock, stale_after_s=10)
    made.apply("a", holding(text(0)).snapshot())
    clock.now = 10.0
    assert made.route(ask(text(0))).hit_tokens == 256
    clock.now = 10.1
    assert made.route(ask(text(0))).hit_tokens == 0
    made.report("a", Load())
    assert made.route(ask(text(0))).hit_tokens == 256


def test_updates_of_another_epoch_or_number_are_gaps():
    holdings, made = holding(text(0)), router("a")
    first = holdings.delta()
    assert made.apply("a", first) is Applied.GAP
    assert made.apply("a", holdings.snapshot()) is Applied.APPLIED
    assert made.apply("a", first) is Applied.OLD
    assert made.apply("a", holdings.snapshot()) is Applied.OLD
    restarted = holding(text(1))
    restarted.delta()
    restarted.add(TAG, [5])
    assert made.apply("a", restarted.delta()) is Applied.GAP
    assert made.route(ask(text(0))).hit_tokens == 256  # until the snapshot comes
    assert made.apply("a", restarted.snapshot()) is Applied.APPLIED
    assert made.route(ask(text(1))).hit_tokens == 256
    assert made.apply("nobody", restarted.snapshot()) is Applied.OLD
    with pytest.raises(DigestError, match="a snapshot removes nothing"):
        made.apply("a", Update(1, 1, True, {}, {TAG: np.array([1], np.uint32)}))


def test_told_loads_count_as_well_as_sent_requests():
    made = router("a", "b", policy=LeastLoaded())
    made.report("a", Load(queued_tokens=1000))
    assert [made.route(ask(text(i))).replica for i in range(5)] == ["b"] * 4 + ["a"]


def test_a_group_stays_together_while_its_replica_lives():
    made = router(*"abc", policy=RoundRobin())
    group = [made.route(ask(text(i), group=b"round 1")).replica for i in range(4)]
    assert len(set(group)) == 1
    elsewhere = made.route(ask(text(9), namespace="other", group=b"round 1")).replica
    assert elsewhere != group[0]
    made.leave(group[0])
    assert made.route(ask(text(5), group=b"round 1")).replica != group[0]
    made.check()


def test_a_replica_that_leaves_gives_back_its_requests():
    made = router("a", "b", policy=RoundRobin())
    made.apply("a", holding(text(0)).snapshot())
    tickets = [made.route(ask(text(i))) for i in range(4)]
    made.started(tickets[0])
    assert made.leave("a") == [tickets[0], tickets[2]]
    assert made.leave("a") == []
    for ticket in tickets:
        made.done(ticket)
        made.started(ticket)
    made.check()
    made.join("a")
    assert made.states()["a"] == {"samples": 0, "queued_tokens": 0, "running": 0, "open": 0, "silent_s": 0}
    made.leave("a")
    made.leave("b")
    with pytest.raises(NoReplicaError):
        made.route(ask(text(0)))


def test_a_request_that_went_elsewhere_counts_there():
    made = router("a", "b", policy=RoundRobin())
    ticket = made.route(ask(text(0)))
    made.moved(ticket, "b")
    assert (made.states()["a"]["open"], made.states()["b"]["open"]) == (0, 1)
    made.started(ticket)
    assert made.states()["b"] | {"silent_s": 0} == {
        "samples": 0,
        "queued_tokens": 0,
        "running": 1,
        "open": 1,
        "silent_s": 0,
    }
    with pytest.raises(NoReplicaError, match="'c'"):
        made.moved(ticket, "c")
    made.done(ticket)
    made.check()


def test_only_those_that_may_are_chosen():
    made = router("a", "b")
    made.apply("a", holding(text(0)).snapshot())
    assert made.route(ask(text(0)), among=["b"]).replica == "b"
    with pytest.raises(NoReplicaError):
        made.route(ask(text(0)), among=[])


steps = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "route", "start", "done", "fail", "wait", "move"]), st.integers(0, 7)),
    max_size=60,
)


@given(steps)
def test_whatever_happens_the_router_adds_up(events):
    clock, tickets = Clock(), []
    made = router(clock=clock, assume_s=1.0)
    for what, number in events:
        name = "abcdefgh"[number]
        if what == "join":
            made.join(name)
        elif what == "leave":
            made.leave(name)
        elif what == "wait":
            clock.now += 0.3
        elif what == "route" and made.replicas:
            tickets.append(made.route(ask(text(number, 8 * number), group=b"g" if number == 7 else None)))
        elif tickets and what in ("start", "done", "fail"):
            ticket = tickets[number % len(tickets)]
            {"start": made.started, "done": made.done, "fail": lambda t: made.done(t, failed=True)}[what](ticket)
        elif tickets and what == "move" and name in made.replicas:
            made.moved(tickets[number % len(tickets)], name)
        made.check()
    for ticket in tickets:
        made.done(ticket)
    assert all(state["open"] == 0 and abs(state["queued_tokens"]) < 1e-6 for state in made.states().values())
    clock.now += 2
    if made.replicas:
        assert made.route(ask(text(1, 64))).hit_tokens == 0


def test_more_replicas_than_slots_are_taken():
    made = router(*(f"r{i}" for i in range(40)))
    made.apply("r33", holding(text(0)).snapshot())
    assert made.route(ask(text(0))).replica == "r33"
    made.check()
