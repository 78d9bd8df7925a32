"""The approximate prefix, and healing: conversations keep their prefix after a turn that pasted segments."""

import dataclasses
import itertools
import threading
import types

import numpy as np
import pytest
from conftest import tiny_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import Full, InvalidRequestError, Naive, Prefix, ReuseConfig, SamplingParams, SparseX
from sparsex_jax.config import METHODS, EngineConfig
from sparsex_jax.reuse.cost import ChunkTimes, Speeds
from sparsex_jax.reuse.prompt import TokenKind

RNG = np.random.default_rng(16)
NOTES = [RNG.integers(1, 97, length).tolist() for length in (60, 47, 80)]
QUESTIONS = [RNG.integers(1, 97, 9).tolist() for _ in range(4)]
METHOD = SparseX(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2, tail_tokens=0)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)


def count(report, kind) -> int:
    return int((report.kind == kind).sum())


def turns(engine, methods, namespace="default", new=GREEDY):
    """A conversation behind notes that were remembered in another order: (prompt, generation) turn by turn."""
    for note in NOTES:
        engine.remember(note, namespace=namespace)
    prompt = [1, *itertools.chain(*reversed(NOTES))]
    for question, method in zip(itertools.cycle(QUESTIONS), methods, strict=False):
        prompt = prompt + question
        out = engine.generate(prompt, new, reuse=method, namespace=namespace)
        yield prompt, out
        prompt = prompt + list(out.token_ids)


def test_a_turn_costs_its_new_tokens_only():
    engine = tiny_engine()
    reports = [out.report for _, out in turns(engine, [METHOD] * 4)]
    assert count(reports[0], TokenKind.REUSED) > 150
    for before, report in itertools.pairwise(reports):
        # The last token of an answer was no input before, so its KV is not there.
        assert report.fresh_tokens == len(QUESTIONS[0]) + 1
        assert count(report, TokenKind.APPROXIMATE) == report.prompt_tokens - report.fresh_tokens - 1
        assert count(report, TokenKind.PREFIX) == 1
        assert before.prompt_tokens < report.prompt_tokens
        assert report.computed_fraction == report.fresh_tokens / report.prompt_tokens


def test_it_is_the_kv_that_the_last_answer_was_read_from():
    """Going on from the middle of an answer gives the rest of that answer, to the token."""
    engine = tiny_engine()
    *_, (prompt, out) = turns(engine, [METHOD] * 2)
    answer = list(out.token_ids)
    again = engine.generate(prompt + answer[:3], SamplingParams(5, temperature=0, ignore_eos=True), reuse=METHOD)
    assert list(again.token_ids) == answer[3:]
    assert count(again.report, TokenKind.APPROXIMATE) > 150
    engine.admission.check_books()


STRICTER = [
    Full(),
    Prefix(),
    SparseX(boundary_layer=2, recompute_ratio=0.2, overflow_tokens=2, tail_tokens=0),
    SparseX(boundary_layer=1, recompute_ratio=0.3, overflow_tokens=2, tail_tokens=0),
    SparseX(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=3, tail_tokens=0),
    SparseX(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2, tail_tokens=0, min_segment_tokens=17),
    SparseX(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2, tail_tokens=0, pool_tokens=4),
    ReuseConfig("focus", recompute_ratio=0.1),
    ReuseConfig("random", boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2, tail_tokens=0),
]


@pytest.mark.parametrize("method", STRICTER, ids=lambda method: method.method)
def test_a_stricter_method_never_gets_it(method):
    engine = tiny_engine()
    *_, (prompt, out) = turns(engine, [METHOD] * 2)
    follow_up = prompt + list(out.token_ids)
    report = engine.prefill(follow_up, reuse=method).report
    assert count(report, TokenKind.APPROXIMATE) == 0
    assert count(report, TokenKind.PREFIX) <= 1
    if not method.uses_segments:
        assert report.fresh_tokens >= len(follow_up) - 1


def test_a_laxer_method_gets_it_and_another_namespace_does_not():
    engine = tiny_engine()
    *_, (prompt, out) = turns(engine, [METHOD] * 2)
    follow_up = prompt + list(out.token_ids)
    for laxer in (Naive(), SparseX(boundary_layer=0, recompute_ratio=0.1, overflow_tokens=0, tail_tokens=0)):
        assert count(engine.prefill(follow_up, reuse=laxer).report, TokenKind.APPROXIMATE) > 150
    other = engine.prefill(follow_up, reuse=METHOD, namespace="other").report
    assert other.fresh_tokens == len(follow_up)


def test_what_a_laxer_method_left_behind_is_not_taken_for_more():
    """Naive's turn goes on behind sparsex's; sparsex then finds its own part of the conversation only."""
    engine = tiny_engine()
    history = list(turns(engine, [METHOD, METHOD, Naive(), METHOD]))
    careful = len(history[1][0]) + GREEDY.max_new_tokens - 1
    report = history[3][1].report
    assert count(report, TokenKind.APPROXIMATE) + count(report, TokenKind.PREFIX) == careful
    assert count(report, TokenKind.REUSED) > 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_methods_accept_is_a_partial_order(data):
    def method(name):
        options = {"boundary_layer": st.none() | st.integers(0, 6), "recompute_ratio": st.sampled_from([0.1, 0.5])}
        options |= {"overflow_tokens": st.sampled_from([0, 16]), "head_tokens": st.sampled_from([0, 8])}
        options |= {"coverage": st.sampled_from([0.0, 0.5, 0.9]), "max_ratio": st.sampled_from([0.5, 1.0])}
        drawn = {option: data.draw(values) for option, values in options.items()}
        if name == "cacheblend":
            drawn["boundary_layer"] = drawn["boundary_layer"] or 1
        return ReuseConfig.fitting(name, **drawn)

    a, b, c = (method(data.draw(st.sampled_from(list(METHODS)))) for _ in range(3))
    for one in (a, b, c):
        assert one.accepts(one, 6) == one.uses_segments
    if a.accepts(b, 6) and b.accepts(c, 6):
        assert a.accepts(c, 6)
    if a.accepts(b, 6) and b.accepts(a, 6):
        mine, others = (getattr(one, "without_excerpts", one) for one in (a, b))  # excerpts themselves are exact
        assert mine.resolved(6) == others.resolved(6)


# Healing ------------------------------------------------------------------------------------------------------


def test_after_healing_a_conversation_is_exact():
    engine = tiny_engine()
    *_, (prompt, out) = turns(engine, [METHOD] * 3)
    follow_up = prompt + list(out.token_ids) + QUESTIONS[3]
    assert engine.stats()["approximate_tokens"] > 150
    assert engine.heal() == len(prompt) + GREEDY.max_new_tokens - 2  # all but the first, which was exact, and the last
    assert engine.stats()["approximate_tokens"] == 0
    assert engine.heal() == 0
    reused = engine.prefill(follow_up, reuse=METHOD)
    assert count(reused.report, TokenKind.PREFIX) == len(prompt) + GREEDY.max_new_tokens - 1
    assert count(reused.report, TokenKind.APPROXIMATE) == 0
    full = engine.prefill(follow_up, reuse=Full(), keep=False)
    np.testing.assert_allclose(reused.logits, full.logits, atol=1e-3)
    engine.admission.check_books()


def test_healing_one_conversation_keeps_the_others_that_share_its_beginning():
    engine = tiny_engine()
    (prompt, first), *_ = turns(engine, [METHOD])
    branches = [prompt + list(first.token_ids) + question for question in QUESTIONS[1:]]
    ends = [branch + list(engine.generate(branch, GREEDY, reuse=METHOD).token_ids) for branch in branches]
    while engine.stats()["approximate_tokens"] > 40:  # the shared beginning, and some of the branches
        assert engine.loop.heal() is not None
    for end in ends:
        assert engine.prefill(end, reuse=METHOD).report.fresh_tokens <= 2
    engine.heal()
    for end in ends:
        report = engine.prefill(end, reuse=Prefix()).report
        assert report.fresh_tokens <= 2
    engine.admission.check_books()


def test_healing_waits_for_requests_and_a_chunk_is_small():
    engine = tiny_engine()
    *_, (prompt, _) = turns(engine, [METHOD] * 2)
    engine.loop.submit(prompt, GREEDY, reuse=METHOD, listener=lambda event: None)
    assert engine.loop.heal() is None
    while engine.loop.step():
        pass
    finished = engine.loop.stats.finished
    before = engine.loop.stats.healed_tokens
    assert engine.loop.heal() is not None
    most = max(engine.runner.shapes.buckets[0][0], engine.config.page_size)
    assert 0 < engine.loop.stats.healed_tokens - before <= most + 1
    assert engine.loop.stats.finished == finished  # healing is no request


def test_a_request_that_comes_while_a_chunk_is_healed_is_next(monkeypatch):
    engine, begun = tiny_engine(), []
    list(turns(engine, [METHOD] * 2))
    begin, request = engine.runner.begin, RNG.integers(1, 97, 31).tolist()

    def observed(plans, *late):
        begun.append([len(plan.prompt) for plan in plans])
        if len(begun) == 1:
            engine.loop.submit(request, GREEDY, listener=lambda event: None)
        return begin(plans, *late)

    monkeypatch.setattr(engine.runner, "begin", observed)
    while engine.loop.step() or engine.loop.heal() is not None:  # as a server's worker does
        pass
    assert begun[1] == [len(request)]
    assert len(begun) > 3
    assert engine.stats()["approximate_tokens"] == 0


def test_healing_can_be_turned_off_and_a_failure_pauses_it(monkeypatch):
    engine = tiny_engine(healing=0.0)
    list(turns(engine, [METHOD] * 2))
    assert engine.loop.heal() is None
    assert engine.heal() > 150  # asked for
    engine = tiny_engine()
    list(turns(engine, [METHOD] * 2))

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "begin", broken)
        assert engine.loop.heal() is None
        with pytest.raises(RuntimeError, match="broken"):
            engine.heal()
    assert engine.loop.heal() is None
    assert engine.generate(NOTES[0], GREEDY).token_ids
    monkeypatch.setattr("sparsex_jax.scheduler.healing.time", types.SimpleNamespace(monotonic=lambda: float("inf")))
    assert engine.loop.heal() is not None
    engine.admission.check_books()


def test_healing_leaves_frozen_content_alone():
    engine = tiny_engine()
    spare = engine.config.num_pages - 24
    frozen = engine.remember(RNG.integers(1, 97, spare * engine.config.page_size // 2).tolist(), frozen=True)
    list(turns(engine, [METHOD] * 2))
    engine.heal()
    assert frozen in [entry.handle for entry in engine.entries()]
    engine.admission.check_books()


def test_healing_counts_the_page_that_an_exact_beginning_is_copied_from():
    """A turn that ends in the middle of a page is healed first; the next one, in a page of its own, begins with it."""
    engine, method = tiny_engine(store_tokens=64 * 16), dataclasses.replace(METHOD, only_if_faster=False)
    note = RNG.integers(1, 97, 120).tolist()
    engine.remember(note)
    prompt = [1, *note, *RNG.integers(1, 97, 330).tolist()]
    for _ in range(4):
        prompt += engine.generate(prompt, GREEDY, reuse=method).token_ids
    frozen = engine.remember(RNG.integers(1, 97, 27 * 16).tolist(), frozen=True, namespace="frozen")
    held = engine.cache.allocate(3)
    assert engine.heal() > 400
    assert frozen in [entry.handle for entry in engine.entries()]
    assert engine.stats()["approximate_tokens"] == 0
    engine.cache.release(held)


def test_a_listener_that_heals_is_refused_and_healing_stays_on():
    engine, refused = tiny_engine(), []

    def listener(event):
        with pytest.raises(RuntimeError, match="a listener called the engine"):
            engine.heal()
        refused.append(event)

    list(turns(engine, [METHOD] * 2))
    engine.loop.submit(NOTES[0], SamplingParams(1), listener=listener)
    while engine.loop.step():
        pass
    assert refused
    assert engine.heal() > 150


def test_arguments_of_healing_are_checked():
    with pytest.raises(InvalidRequestError, match="healing=2 must be a number from 0 to 1"):
        EngineConfig(healing=2)
    for seconds in (-1, float("nan"), "1"):
        with pytest.raises(InvalidRequestError, match=f"seconds={seconds!r} must be a number >= 0 or None"):
            tiny_engine().heal(seconds)


def test_a_tiny_share_of_healing_rests_as_long_as_a_thread_can_wait():
    engine = tiny_engine(healing=1e-300)
    list(turns(engine, [METHOD] * 2))
    assert engine.loop.heal() == threading.TIMEOUT_MAX


# What admission takes of it ----------------------------------------------------------------------------------


def speeds(row: float, layer: float) -> Speeds:
    """A layer takes this long, and as much more for each row."""
    times = ChunkTimes(rows=(1, 10000), layer=(layer, layer + 10000 * row), key=(0.0, 0.0))
    return Speeds(small=times, large=times, start=0.0, boundary=0.0, copy=0.0, copied_token=0.0)


@pytest.mark.parametrize(
    ("measured", "found"),
    [(speeds(row=1.0, layer=0.0), TokenKind.APPROXIMATE), (speeds(row=0.0, layer=1.0), TokenKind.FRESH)],
    ids=["rows cost", "rows are free"],
)
def test_the_exact_prefix_is_taken_where_it_is_hardly_slower(measured, found):
    engine = tiny_engine()
    *_, (prompt, out) = turns(engine, [dataclasses.replace(METHOD, only_if_faster=False)] * 2)
    engine.admission.choice.speeds = measured
    report = engine.prefill(prompt + list(out.token_ids), reuse=METHOD).report
    assert count(report, found) > 150
    forced = dataclasses.replace(METHOD, only_if_faster=False)
    assert count(engine.prefill(prompt + list(out.token_ids), reuse=forced).report, TokenKind.FRESH) < 10


def test_nothing_is_searched_where_no_segment_could_save_time(monkeypatch):
    engine = tiny_engine()
    engine.remember(NOTES[0])
    engine.admission.choice.speeds = speeds(row=0.001, layer=1.0)
    monkeypatch.setattr(engine.cache, "_find_runs", None)
    assert engine.prefill([1, *NOTES[0]], reuse=METHOD).report.fresh_tokens == len(NOTES[0]) + 1


def test_segments_behind_a_prefix_are_pasted_where_that_pays():
    engine, more = tiny_engine(), RNG.integers(1, 97, 120).tolist()
    engine.remember(more)
    (prompt, out), *_ = turns(engine, [dataclasses.replace(METHOD, only_if_faster=False)])
    follow_up = prompt + list(out.token_ids) + more + QUESTIONS[1]
    for measured, pasted in ((speeds(row=1.0, layer=0.0), True), (speeds(row=1.0, layer=500.0), False)):
        engine.admission.choice.speeds = measured
        report = engine.prefill(follow_up, reuse=METHOD, keep=False).report
        assert bool(report.segments) is pasted
        assert count(report, TokenKind.APPROXIMATE) > 150
    engine.admission.check_books()
