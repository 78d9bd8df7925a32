"""Excerpts: what the new tokens look at is kept and computed exactly, whatever happens on the way."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import TINY, idle, run, sharded_tiny, tiny_engine, tiny_params
from dense import Dense
from hypothesis import given
from hypothesis import strategies as st
from live import live_server, make_engine

from sparsex_jax import InvalidRequestError, NonFiniteLogitsError, ReuseConfig, SamplingParams, SparseX
from sparsex_jax.cache import PageCache, Segment
from sparsex_jax.cache.remembered import RememberedTexts
from sparsex_jax.device import runner
from sparsex_jax.reuse.cost import ChunkTimes, Speeds, excerpt_seconds
from sparsex_jax.reuse.excerpt import Probe, pieces
from sparsex_jax.reuse.methods import METHODS, Excerpts
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.text.chat import Chat

RNG = np.random.default_rng(11)
TEXTS = [RNG.integers(1, 96, 64).astype(np.int32) for _ in range(4)]
BEFORE, BETWEEN, QUESTION = (RNG.integers(1, 96, number).astype(np.int32) for number in (12, 7, 20))
PROMPT = np.concatenate([BEFORE, TEXTS[0], TEXTS[1], BETWEEN, TEXTS[2], TEXTS[3], QUESTION])
HALF = Excerpts(coverage=0.5, piece_tokens=32)
FULL, GREEDY = ReuseConfig("full"), SamplingParams(max_new_tokens=9)


def remembering(engine, texts=TEXTS, **options):
    for text in texts:
        engine.remember(text, **options)
    return engine


def kept(report):
    return report.kind != TokenKind.OMITTED


def adds_up(report):
    assert sum(report.tokens_by_kind().values()) == report.prompt_tokens == len(report.kind)
    assert 0 <= report.confidence <= 1
    return True


# What is kept -----------------------------------------------------------------------------------------------


def kept_one_by_one(piece, focus, coverage, least):
    """Take pieces by their mean focus until both conditions are met."""
    numbers = sorted(set(piece[piece >= 0].tolist()))
    totals = {number: focus[piece == number].astype(np.float64).sum() for number in numbers}
    sizes = {number: int((piece == number).sum()) for number in numbers}
    everything, taken = sum(totals.values()), []
    for number in sorted(numbers, key=lambda one: (-totals[one] / sizes[one], one)):
        taken.append(number)
        held, tokens = sum(totals[one] for one in taken), sum(sizes[one] for one in taken)
        if everything > 0 and coverage < 1 and held >= coverage * everything and tokens >= least:
            break
    return (piece < 0) | np.isin(piece, taken)


@st.composite
def looks(draw):
    """Pieces with gaps, and focus in whole numbers, so that there are ties and sums are exact."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=7))
    piece = np.repeat(np.arange(len(sizes)), sizes)
    for at in sorted(draw(st.lists(st.integers(0, len(piece)), max_size=4)), reverse=True):
        piece = np.insert(piece, at, -1)
    focus = draw(st.lists(st.integers(0, 3), min_size=len(piece), max_size=len(piece)))
    return piece, np.array(focus, np.float32)


@given(look=looks(), coverage=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), least=st.integers(0, 12))
def test_pieces_are_kept_by_their_mean_focus_until_there_are_enough(look, coverage, least):
    piece, focus = look
    least = min(least, int((piece >= 0).sum()))
    excerpt = Probe(piece, 1, 3, coverage, least).excerpt(focus)
    np.testing.assert_array_equal(excerpt.keep, kept_one_by_one(piece, focus, coverage, least))
    assert 0 <= excerpt.confidence <= 1
    among = piece >= 0
    assert (excerpt.keep & among).sum() >= least
    if focus[among].any():
        assert excerpt.confidence == pytest.approx(focus[excerpt.keep & among].sum() / focus[among].sum())
        assert excerpt.confidence >= coverage
    else:
        assert (excerpt.keep.all(), excerpt.confidence) == (True, 1)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), most=st.integers(1, 20), data=st.data())
def test_segments_are_divided_evenly(lengths, most, data):
    segments, at = [], 2
    for length in lengths:
        segments.append(Segment(at, length, 0, np.zeros(length, np.int64), exact=True))
        at += length + 1
    kind = np.full(at, TokenKind.FRESH, np.uint8)
    for segment in segments:
        kind[segment.start : segment.end] = TokenKind.REUSED
    kind[-1] = TokenKind.FRESH
    prompt = PromptMap(np.zeros(at, np.int32), kind, tuple(segments))
    text = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=at, max_size=at)))
    whole, some = pieces(prompt, most, np.zeros(at, int)), pieces(prompt, most, text)
    np.testing.assert_array_equal(whole >= 0, prompt.reused)
    np.testing.assert_array_equal(some >= 0, prompt.reused & (text >= 0))
    assert (np.diff(whole[whole >= 0]) >= 0).all()
    assert sorted(set(some[some >= 0].tolist())) == list(range(some.max() + 1))
    ends = [segment.end for segment in segments]
    for segment in segments:
        sizes = np.unique_counts(whole[segment.start : segment.end]).counts
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
    for number in range(some.max() + 1):
        (at,) = np.nonzero(some == number)
        assert (np.diff(at) == 1).all()
        assert len(set(text[at].tolist())) == len({int(np.searchsorted(ends, each, "right")) for each in at}) == 1


# Remembered texts in a prompt -------------------------------------------------------------------------------


def found_by_force(tokens, texts):
    """Every run that a text and the prompt share, has the 8 tokens in the text's middle and half of the text."""
    found = np.zeros(len(tokens), bool)
    for text in (text for text in texts if len(text) >= 8):
        middle = (len(text) - 8) // 2
        for shift in range(-len(text) + 1, len(tokens)):
            at = np.arange(max(shift, 0), min(shift + len(text), len(tokens)))
            equal = tokens[at] == text[at - shift]
            for begin in range(len(at)):
                end = begin
                while end < len(at) and equal[end]:
                    end += 1
                holds = at[begin] - shift <= middle and at[end - 1] - shift >= middle + 7 if end > begin else False
                if holds and 2 * (end - begin) >= len(text):
                    found[at[begin] : at[end - 1] + 1] = True
                    break
    return found


BEGINNING = [5] * 6 + [6, 7, 8, 9]
texts = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(0, 2), min_size=1, max_size=24)).map(
        lambda drawn: np.array([*BEGINNING, *drawn[1]] if drawn[0] else drawn[1], np.int32)
    ),
    max_size=4,
)


@st.composite
def prompts_of(draw, texts):
    """Cuts of the texts, of any length, with a few other tokens between them."""
    parts = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))]
    for _ in range(draw(st.integers(0, 4)) if texts else 0):
        text = draw(st.sampled_from(texts)).tolist()
        cut = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        parts += [text if draw(st.booleans()) else text[slice(*cut)], draw(st.lists(st.integers(0, 2), max_size=3))]
    return np.array([token for part in parts for token in part], np.int32)


@given(texts=texts, data=st.data())
def test_remembered_texts_are_found_wherever_they_stand(texts, data):
    cache, mine, handles = PageCache(64, 8), [], []
    for text in texts:
        pages = cache.allocate(-(-len(text) // 8))
        cache.commit(pages, text, "mine", exact_tokens=len(text))
        handles.append(cache.register(pages, len(text), "mine", False))
        cache.release(pages)
        mine.append(text)
    tokens = data.draw(prompts_of(texts))
    np.testing.assert_array_equal(cache.remembered(tokens, "mine") >= 0, found_by_force(tokens, mine))
    assert (cache.remembered(tokens, "other") == -1).all()
    for handle in handles[: data.draw(st.integers(0, len(handles)))]:
        text = cache.text(handle).tolist()
        cache.forget(handle)
        mine.remove(next(one for one in mine if one.tolist() == text))
    left = [
        cache.text(entry.handle) for entry in cache.entries()
    ]  # texts that are alike may share pages and go together
    np.testing.assert_array_equal(cache.remembered(tokens, "mine") >= 0, found_by_force(tokens, left))
    cache.check(held=[])


def num_remembered(engine):
    return (engine.cache.remembered(PROMPT, "default") >= 0).sum()


@pytest.mark.slow
def test_what_is_evicted_or_made_again_is_known_as_what_it_is_then():
    engine = tiny_engine(store_tokens=26 * 16, company_tokens=64)
    handles = [engine.remember(text) for text in TEXTS]
    assert num_remembered(engine) == 4 * 64
    engine.heal()  # replaces entries
    assert num_remembered(engine) == 64 * len(engine.entries())
    engine.generate(RNG.integers(1, 96, 300).astype(np.int32), GREEDY, reuse=FULL)  # evicts most
    assert num_remembered(engine) == 64 * len(engine.entries()) < 4 * 64
    assert {entry.handle for entry in engine.entries()} <= set(handles)
    assert idle(engine)


def test_texts_that_hashes_take_for_others_are_not_found(monkeypatch):
    monkeypatch.setattr(RememberedTexts, "places", lambda self, tokens, namespace: iter([(3, 1), (100, 1)]))
    engine = remembering(tiny_engine())
    assert (engine.cache.remembered(np.ones(200, np.int32), "default") == -1).all()


@pytest.mark.slow
def test_a_segment_of_several_texts_has_pieces_of_each():
    engine = remembering(tiny_engine(), frozen=True)
    engine.prefill(PROMPT, reuse=FULL)  # one donor has them all from now on, and the heading between them
    numbers = engine.cache.remembered(PROMPT, "default")
    assert [np.flatnonzero(numbers == each).tolist() for each in range(4)] == [
        list(range(begin, begin + 64)) for begin in (12, 76, 147, 211)
    ]
    seen, probe = [], engine.admission.choice._probe
    engine.admission.choice._probe = lambda *args: seen.append(probe(*args)) or seen[-1]
    engine.prefill(PROMPT[5:], reuse=Excerpts(coverage=0.1, keep_ratio=0.0, piece_tokens=100), keep=False)
    assert len(seen[0].prompt.segments) < 4
    np.testing.assert_array_equal(seen[0].probe.piece, numbers[5:])


def test_texts_that_overlap_count_as_one():
    engine = remembering(tiny_engine(), [np.concatenate(TEXTS[:2]), TEXTS[1], TEXTS[2]])
    numbers = engine.cache.remembered(np.concatenate([BEFORE, *TEXTS]), "default")
    np.testing.assert_array_equal(numbers, np.repeat([-1, 0, 1, -1], [12, 128, 64, 64]))


# The same as a prompt of what is kept -----------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_excerpt_is_answered_as_a_prompt_of_its_own(devices):
    engine = remembering(tiny_engine() if devices == 1 else sharded_tiny(devices))
    out = engine.generate_batch([PROMPT], GREEDY, reuse=HALF, keep=False, return_logits=True)[0]
    keep = kept(out.report)
    alone = engine.generate_batch([PROMPT[keep]], GREEDY, reuse=FULL, keep=False, return_logits=True)[0]
    np.testing.assert_allclose(out.logits, alone.logits, atol=1e-4)
    assert out.token_ids == alone.token_ids
    assert 0 < out.report.omitted_tokens == (~keep).sum() < 4 * 64
    assert keep[np.isin(np.arange(len(PROMPT)), np.r_[:12, 140:147, 275:295])].all()  # what is not remembered
    assert (out.report.reused_tokens, out.report.probe_layers) == (0, 3)
    assert out.report.confidence >= 0.5
    assert adds_up(out.report)
    fresh, work = out.report.fresh_tokens, keep.sum()
    assert out.report.computed_fraction == pytest.approx((3 / 4 * fresh + work) / len(PROMPT))
    assert [(each.start, each.end) for each in out.report.layers] == [(0, 3), (3, 4)]
    np.testing.assert_array_equal(out.report.layers[1].computed, keep)
    if devices > 1:
        whole = remembering(tiny_engine()).generate(PROMPT, GREEDY, reuse=HALF, keep=False)
        np.testing.assert_array_equal(kept(whole.report), keep)
        assert whole.token_ids == out.token_ids
    assert idle(engine)


def test_where_all_is_to_be_covered_all_is_computed():
    engine = remembering(tiny_engine())
    out = engine.prefill(PROMPT, reuse=Excerpts(coverage=1.0, piece_tokens=32), keep=False)
    np.testing.assert_allclose(out.logits, engine.prefill(PROMPT, reuse=FULL, keep=False).logits, atol=1e-4)
    assert (out.report.omitted_tokens, out.report.confidence, out.report.recomputed_tokens) == (0, 1, 256)


def test_the_focus_is_that_of_the_dense_reference():
    engine = remembering(tiny_engine())
    seen, probe = [], engine.loop._execution.probe
    engine.loop._execution.probe = lambda *args, **kwargs: seen.append(probe(*args, **kwargs)) or seen[-1]
    report = engine.prefill(PROMPT, reuse=HALF, keep=False).report
    dense = Dense(TINY, tiny_params())
    texts = [(text, (text, 0)) for text in TEXTS]
    kv = dense.pasted([(BEFORE, None), *texts[:2], (BETWEEN, None), *texts[2:], (QUESTION, None)])
    fresh = np.flatnonzero((report.kind != TokenKind.OMITTED) & (report.kind != TokenKind.REUSED))
    looking = fresh[fresh >= len(PROMPT) - len(QUESTION) + 1]  # behind the last piece, but the first
    masses = dense.masses(dense.embed[PROMPT[fresh]], fresh, kv, looking, range(3), power=4)
    (focus,) = seen[0]
    np.testing.assert_allclose(focus, masses[1:3].sum(0), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_penalties_and_seeds_are_those_of_the_excerpt():
    engine = remembering(tiny_engine())
    sampling = SamplingParams(12, temperature=0.8, seed=4, repetition_penalty=1.3, presence_penalty=0.4, logprobs=2)
    out = engine.generate(PROMPT, sampling, reuse=HALF, keep=False)
    alone = engine.generate(PROMPT[kept(out.report)], sampling, reuse=FULL, keep=False)
    assert out.token_ids == alone.token_ids
    assert [one.token_id for one in out.logprobs] == out.token_ids


def test_a_prompt_that_is_held_is_the_excerpt():
    engine = remembering(tiny_engine())
    with engine.prefilled(PROMPT, reuse=HALF) as held:
        assert len(held.plan.prompt) == len(held.prompt) == kept(held.report).sum() < len(PROMPT)
        assert engine.stats()["active"] > 0
    assert idle(engine)


# What is never left out -------------------------------------------------------------------------------------


def test_only_remembered_texts_are_left_out():
    engine = remembering(tiny_engine())
    history = RNG.integers(1, 96, 120).astype(np.int32)
    engine.generate(history, GREEDY)
    prompt = np.concatenate([BEFORE, history, TEXTS[0], TEXTS[1][:28], TEXTS[2], QUESTION])  # and a quotation
    report = engine.prefill(prompt, reuse=Excerpts(coverage=0.1, keep_ratio=0.0, piece_tokens=64)).report
    assert report.omitted_tokens > 0
    assert kept(report)[[*range(132), *range(196, 224), *range(288, 308)]].all()


@pytest.mark.parametrize("prompt", [np.concatenate([BEFORE, TEXTS[0], QUESTION]), QUESTION], ids=["one piece", "new"])
def test_where_nothing_may_be_left_out_it_is_prefilled_as_sparsex_does(prompt):
    engine = remembering(tiny_engine())
    out = engine.prefill(prompt, reuse=Excerpts(), keep=False)
    expected = engine.prefill(prompt, reuse=SparseX(), keep=False)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)
    assert (out.report.omitted_tokens, out.report.probe_layers) == (0, 0)


def test_the_next_question_of_a_conversation_finds_the_answer_and_looks_anew():
    engine = remembering(tiny_engine())
    first = engine.generate(PROMPT, GREEDY, reuse=HALF)
    follow_up = np.concatenate([PROMPT, first.token_ids, RNG.integers(1, 96, 15)]).astype(np.int32)
    second = engine.generate(follow_up, GREEDY, reuse=HALF)
    keep = kept(second.report)
    assert second.report.omitted_tokens > 0
    assert keep[len(PROMPT) :].all()
    alone = engine.generate(follow_up[keep], GREEDY, reuse=FULL, keep=False)
    assert second.token_ids == alone.token_ids
    again = engine.generate(PROMPT, GREEDY, reuse=HALF)
    assert again.token_ids == engine.generate(PROMPT[kept(again.report)], GREEDY, reuse=FULL, keep=False).token_ids
    assert adds_up(again.report)
    assert again.report.prefix_tokens > 0  # exactly what was computed of the same excerpt
    assert idle(engine)


def test_layers_that_a_model_does_not_have_are_refused():
    wrong = [
        ({"end_layer": 5}, "end_layer=5 must be at most 4, the model's layers"),
        ({"first_layer": 3, "end_layer": 3}, "end_layer=3 must be larger than first_layer=3"),
        ({"first_layer": 4, "end_layer": 4}, "first_layer=4 must be less than end_layer=4"),
        ({"first_layer": 4}, "first_layer=4 must be less than 4, the model's layers"),
        ({"first_layer": 9}, "first_layer=9 must be at most 4"),
    ]
    engine = tiny_engine()
    for options, message in wrong:  # each names what was asked for
        with pytest.raises(InvalidRequestError, match=message):
            engine.prefill(PROMPT, reuse=Excerpts(**options))
    assert [Excerpts()._watched(number) for number in (1, 2, 28)] == [(0, 1), (1, 2), (8, 20)]
    assert [Excerpts(end_layer=end)._watched(28) for end in (1, 5, 28)] == [(0, 1), (4, 5), (8, 28)]
    assert [Excerpts(first_layer=first)._watched(28) for first in (0, 19, 27)] == [(0, 20), (19, 20), (27, 28)]


@pytest.mark.slow
def test_requests_that_choose_layers_share_a_few_programs(monkeypatch):
    programs, probe = set(), runner.probe

    def spied(*args, **static):
        programs.add(tuple(sorted((name, static[name]) for name in ("layers", "watched", "chunk"))))
        return probe(*args, **static)

    monkeypatch.setattr(runner, "probe", spied)
    engine, pairs = remembering(tiny_engine(), frozen=True), [(a, b) for b in (4, 3) for a in range(b)]
    reports = [engine.prefill(PROMPT, reuse=_watching(*pair), keep=False).report for pair in pairs]
    assert [report.probe_layers for report in reports] == [b for _, b in pairs]
    assert len(programs) == 4 + 2  # of the first choices whole, and of a layer that is watched or is not
    alone = remembering(tiny_engine()).prefill(PROMPT, reuse=_watching(*pairs[-1]), keep=False).report
    np.testing.assert_array_equal(kept(reports[-1]), kept(alone))
    assert reports[-1].confidence == pytest.approx(alone.confidence)


def _watching(first, end):
    return dataclasses.replace(HALF, first_layer=first, end_layer=end)


# Whatever happens on the way --------------------------------------------------------------------------------


def heard(loop, prompt, sampling=GREEDY, **options):
    events = []
    ticket = loop.submit(prompt, sampling, listener=events.append, **options)
    return events, ticket


def tokens_of(events):
    return [token for event in events for token in event.token_ids]


def facts(report):
    return report.to_dict() | {"ttft_s": 0, "confidence": 0}


def many_fresh(number):
    """Prompts of many fresh tokens around the texts, all different."""
    rng = np.random.default_rng(number)
    return np.concatenate([rng.integers(1, 96, 90), *TEXTS, rng.integers(1, 96, 60)]).astype(np.int32)


@pytest.mark.slow
def test_probes_are_cut_batched_and_mixed_with_other_methods():
    prompts = [PROMPT, many_fresh(1), PROMPT[40:], many_fresh(2), PROMPT]
    methods = [HALF, HALF, HALF, HALF, dataclasses.replace(HALF, end_layer=4), *map(ReuseConfig, METHODS)]
    prompts += [PROMPT] * len(METHODS)
    alone = remembering(tiny_engine(prefill_tokens=512), frozen=True)
    expected = [alone.generate(p, GREEDY, reuse=m, keep=False) for p, m in zip(prompts, methods, strict=True)]
    engine = remembering(tiny_engine(prefill_tokens=80), frozen=True)
    turns, probe = [], engine.runner.advance_probe
    engine.runner.advance_probe = lambda run, layers: turns.append((len(run.requests), layers)) or probe(run, layers)
    together = [heard(engine.loop, p, reuse=m, keep=False)[0] for p, m in zip(prompts, methods, strict=True)]
    while engine.loop.step():
        engine.admission.check_books()
    for events, out in zip(together, expected, strict=True):
        assert tokens_of(events) == out.token_ids
        report = next(event.report for event in events if event.report is not None)
        assert out.report.confidence == pytest.approx(report.confidence)
        assert facts(report) == facts(out.report)
    assert (2, None) in turns  # together
    assert any(layers is not None for _, layers in turns)  # cut
    stats = engine.loop.stats
    assert stats.omitted_tokens > 0
    assert stats.prompt_tokens == sum(map(len, [*prompts, *TEXTS]))
    assert stats.prompt_tokens == sum(value for name, value in vars(stats).items() if name in _KINDS)
    assert idle(engine)


_KINDS = [f"{kind}_tokens" for kind in ("prefix", "approximate_prefix", "reused", "recomputed", "fresh", "omitted")]


def test_preempted_while_decoding_or_probing_it_goes_on():
    sampling = SamplingParams(max_new_tokens=60, temperature=0.7, seed=3)
    few = {"store_tokens": 46 * 16}  # 16 of them frozen
    alone = [
        remembering(tiny_engine(**few), frozen=True).generate(prompt, sampling, reuse=HALF, keep=False)
        for prompt in (PROMPT, many_fresh(1))
    ]
    engine = remembering(tiny_engine(**few, prefill_tokens=64), frozen=True)
    runs = [heard(engine.loop, prompt, sampling, reuse=HALF)[0] for prompt in (PROMPT, many_fresh(1))]
    preempted = set()
    while engine.loop.step():
        (*_, last) = engine.loop.policy.running or [None]
        if last is not None and (where := (last.state, last.excerpt is None)) not in preempted:
            preempted.add(where)
            engine.loop.policy._preempt(last)
        engine.admission.check_books()
    assert len(preempted) >= 2
    assert [tokens_of(events) for events in runs] == [out.token_ids for out in alone]
    assert idle(engine)


def test_an_answer_that_began_without_a_probe_goes_on_without_one():
    """A text that is remembered meanwhile does not make another prompt of it."""
    engine = tiny_engine()
    engine.generate(np.concatenate([TEXTS[0], TEXTS[1]]), GREEDY)  # stored, not remembered
    events, _ = heard(engine.loop, PROMPT, SamplingParams(max_new_tokens=40), reuse=HALF)
    while not events:
        engine.loop.step()
    engine.loop.policy._preempt(engine.loop.policy.running[0])
    remembering(engine)
    run(engine.loop)
    assert len(tokens_of(events)) == 40
    assert engine.loop.stats.omitted_tokens == 0


@pytest.mark.parametrize("what", ["cancel", "forget", "nothing"])
def test_in_the_middle_of_a_probe(what):
    engine = tiny_engine(prefill_tokens=64)
    handles = [engine.remember(text) for text in TEXTS]
    events, ticket = heard(engine.loop, many_fresh(1), reuse=HALF)
    engine.loop.step()
    (sequence,) = engine.loop.policy.running
    assert 0 < sequence.run.next_layer < 3
    before = engine.stats()["cached"]
    if what == "cancel":
        ticket.cancel()
    if what == "forget":
        engine.forget(handles[0])
        before = engine.stats()["cached"]
    run(engine.loop)
    assert events[-1].finish_reason == ("cancelled" if what == "cancel" else "length")
    assert (engine.stats()["cached"] > before) == (what == "nothing")
    assert idle(engine)


@pytest.mark.parametrize("what", ["forget", "forget another", "nothing"])
@pytest.mark.parametrize("where", ["probed", "probed and admitted", "preempted"])
def test_what_is_forgotten_while_an_excerpt_or_an_answer_waits_is_not_brought_back(where, what):
    engine = tiny_engine(prefill_tokens=64)
    other = engine.remember(RNG.integers(1, 96, 64).astype(np.int32))
    handles = [engine.remember(text) for text in TEXTS]
    events, _ = heard(engine.loop, many_fresh(1), SamplingParams(max_new_tokens=20), reuse=HALF)
    (sequence,) = stepped_until(engine.loop, lambda one: one.excerpt is not None)
    if where == "probed and admitted":
        stepped_until(engine.loop, lambda one: one.is_admitted)
    if where == "preempted":
        stepped_until(engine.loop, lambda one: one.output.token_ids)
        engine.loop.policy._preempt(sequence)
    if what != "nothing":
        engine.forget(other if what == "forget another" else handles[0])
    before = engine.stats()["cached"]
    run(engine.loop)
    assert len(tokens_of(events)) == 20
    assert (engine.stats()["cached"] > before) == (what != "forget")
    assert idle(engine)
    assert not engine.admission._returning


def stepped_until(loop, holds):
    while not any(holds(one) for one in loop.policy.sequences):
        loop.step()
    return loop.policy.sequences


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_donors_that_are_not_finite_are_withdrawn_and_the_prompt_is_computed(part):
    engine = tiny_engine()
    expected = engine.generate(PROMPT, GREEDY, reuse=FULL, keep=False)
    remembering(engine)
    page = engine.entries()[2].pages[1]
    engine.runner.store = engine.runner.store.at[:, page, part].set(np.nan)
    out = engine.generate(PROMPT, GREEDY, reuse=HALF, keep=False)
    assert out.token_ids == expected.token_ids
    assert (out.report.omitted_tokens, out.report.fresh_tokens) == (0, len(PROMPT))
    assert len(engine.entries()) == 3
    assert idle(engine)


def test_weights_that_are_not_finite_fail_the_prompt_alone():
    params = tiny_params()
    engine = remembering(tiny_engine(dataclasses.replace(params, embed=params.embed.at[96].set(np.nan))))
    poisoned = np.append(PROMPT[:-1], 96)
    with pytest.raises(NonFiniteLogitsError):
        engine.generate(poisoned, GREEDY, reuse=HALF)
    assert len(engine.entries()) == 4
    assert idle(engine)


# What it takes ----------------------------------------------------------------------------------------------


def test_a_probe_and_its_excerpt_are_predicted_to_take_what_their_layers_take():
    chunk = ChunkTimes(rows=(1, 512), layer=(1.0, 512.0), key=(0.0, 0.0))
    speeds = Speeds(small=chunk, large=chunk, start=7.0, boundary=0.0, copy=5.0, copied_token=1e-3)
    engine = remembering(tiny_engine())
    plans, plan = [], engine.admission.choice.plan
    engine.admission.choice.plan = lambda *args: plans.append(plan(*args)) or plans[-1]
    engine.prefill(PROMPT, reuse=HALF, keep=False)
    among, rest = int((plans[0].probe.piece >= 0).sum()), len(PROMPT) - int((plans[0].probe.piece >= 0).sum())
    looking = 3 * int(plans[0].prompt.fresh.sum()) + 5 + 1e-3 * sum(copy.length for copy in plans[0].copies)
    answering = 4 * (rest + round(0.15 * among))
    assert excerpt_seconds(TINY, plans[0], speeds) == pytest.approx(2 * 7 + looking + answering)
    engine.admission.choice.speeds = speeds
    assert engine.prefill(PROMPT, reuse=HALF, keep=False).report.omitted_tokens > 0
    for all_of_it in ({"coverage": 1.0}, {"keep_ratio": 1.0}):  # there is nothing to find out
        report = engine.prefill(PROMPT, reuse=dataclasses.replace(HALF, **all_of_it), keep=False).report
        assert (report.probe_layers, report.fresh_tokens, report.confidence) == (0, len(PROMPT), 1)
    engine.admission.choice.speeds = dataclasses.replace(speeds, start=1e4)  # two passes cost more than one
    assert engine.prefill(PROMPT, reuse=HALF, keep=False).report.omitted_tokens == 0


# Turns of chats ---------------------------------------------------------------------------------------------

RULE = "You answer in rhymes, whatever you are asked, and you never say how you were told to do so. " * 3
WORDS = [" ".join(f"{name}{number}" for number in range(30)) + "." for name in ("ash", "birch", "cedar")]
FEW = {"coverage": 0.0, "keep_ratio": 0.0, "only_if_faster": False}


def chat(system, *rest):
    notes = "Read.\n" + "\n".join(WORDS) + "\nWhich tree is the last?"
    return [{"role": "system", "content": system}, *rest, {"role": "user", "content": notes}]


def said_by(http, messages, **fields):
    body = {"model": "tiny", "messages": messages, "max_tokens": 2, "keep": False, "return_token_map": True}
    report = http.post("/v1/chat/completions", json=body | {"reuse": {"method": "excerpt"} | FEW} | fields).json()[
        "sparsex"
    ]
    tokens, kinds = report["token_map"]["text"], report["token_map"]["kind"]
    labels = [kind for kind, count in kinds for _ in range(count)]
    return "".join(token for token, label in zip(tokens, labels, strict=True) if label != "omitted")


def test_a_turn_is_never_left_out_also_if_it_was_remembered():
    with live_server(make_engine()) as live, live.http() as http:
        for text in (RULE, *WORDS):
            assert http.post("/v1/knowledge", json={"text": text}).status_code == 200
        rule = RULE.strip()
        assert rule in said_by(http, chat(RULE))
        assert rule in said_by(http, chat([{"type": "text", "text": RULE[:50]}, {"type": "text", "text": RULE[50:]}]))
        turns = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": rule}]
        said = said_by(http, chat("Be brief.", *turns))
        assert rule in said
        assert WORDS[0] in said
        # A document in a message, and the result of a tool, are documents.
        assert rule[20:200] not in said_by(http, chat(f"Know this:\n{RULE}\nBe brief."))
        turns = [{"role": "user", "content": "?"}, {"role": "tool", "content": rule, "tool_call_id": "1"}]
        assert rule[20:200] not in said_by(http, chat("Be brief.", *turns))


def test_a_turn_is_never_left_out_of_a_prompt_of_messages():
    engine = remembering(make_engine(), [RULE, *WORDS])
    for messages in (chat(RULE), Chat(chat(RULE))):
        report = engine.prefill(messages, reuse=Excerpts(**FEW), keep=False).report
        keep, tokens = kept(report), engine.encode(messages)
        assert report.omitted_tokens > 0
        assert RULE.strip() in engine.tokenizer.decode(tokens[keep])
    tokens = engine.encode(chat(RULE))  # of which nobody says that they are a chat's
    assert RULE.strip() not in engine.tokenizer.decode(
        tokens[kept(engine.prefill(tokens, reuse=Excerpts(**FEW)).report)]
    )


# Over HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_says_what_was_left_out():
    engine = make_engine()
    words = ["\n" + " ".join(f"{name}{number}" for number in range(30)) + "." for name in ("ash", "birch", "cedar")]
    with live_server(engine) as live, live.http() as http:
        for text in words:
            assert http.post("/v1/knowledge", json={"text": text}).status_code == 200
        body = {
            "model": "tiny",
            "prompt": "Read." + "".join(words) + "\nWhich tree is the last?",
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "reuse": {"method": "excerpt", "coverage": 0.3, "piece_tokens": 64},
        }
        lines = [
            line for line in http.post("/v1/completions", json=body).text.splitlines() if line.startswith("data: {")
        ]
        metrics = http.get("/metrics").text
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    report = next(chunk["sparsex"] for chunk in chunks if chunk.get("sparsex"))
    usage = next(chunk["usage"] for chunk in chunks if chunk.get("usage"))
    assert report["omitted_tokens"] > 0
    assert 0.3 <= report["confidence"] <= 1
    assert report["probe_layers"] == 4
    assert sum(report[name] for name in _KINDS) == report["prompt_tokens"] == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= report["omitted_tokens"]
    counted = [line for line in metrics.splitlines() if "omitted" in line and not line.startswith("#")]
    assert float(counted[0].split()[-1]) == report["omitted_tokens"]
