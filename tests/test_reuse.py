"""Reuse, compared with full recompute and with the dense reference, through the engine's public calls."""

import dataclasses

import numpy as np
import pytest
from conftest import TINY, found_in_segments, tiny_engine
from dense import Dense, engine_logits, stored_kv

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.reuse.prompt import TokenKind

FULL = ReuseConfig(method="full")
EXACT = 1e-3  # float32 on a 135M model
EXACT_TINY = 1e-5


def text_ids(engine, seed, length):
    """Tokens that look like text: words drawn at random from the vocabulary, without the special tokens before them."""
    vocab_size = engine.model.vocab_size
    return np.random.default_rng(seed).integers(min(1000, vocab_size // 8), vocab_size, length).astype(np.int32)


def mixed_prompt(engine, namespace, length):
    """A prompt with two remembered documents in swapped order, and new text before, between and behind them."""
    part = length // 5
    documents = [text_ids(engine, seed, 2 * part) for seed in (1, 2)]
    for document in documents:
        engine.remember(document, namespace=namespace)
    new = [text_ids(engine, seed, max(part // 3, 1)) for seed in (3, 4, 5)]
    return np.concatenate([new[0], documents[1], new[1], documents[0], new[2]])


@pytest.mark.parametrize("length", [100, *(pytest.param(length, marks=pytest.mark.slow) for length in (333, 700))])
@pytest.mark.parametrize("reuse", [ReuseConfig(recompute_ratio=1.0, boundary_layer=3), ReuseConfig(boundary_layer=30)])
def test_recomputing_everything_equals_full(smollm, length, reuse):
    namespace = f"all-{length}"
    prompt = mixed_prompt(smollm, namespace, length)
    out = smollm.prefill(prompt, reuse=reuse, namespace=namespace, keep=False)
    pasted = reuse.boundary_layer < 30  # nothing is pasted where every layer computes everything
    assert found_in_segments(out.report) == pasted * 2 * 2 * (length // 5)
    full = engine_logits(smollm, prompt, reuse=FULL, namespace=namespace, keep=False)
    assert np.abs(out.logits - full).max() < EXACT


@pytest.mark.parametrize("method", ["prefix", "naive", "sparsex"])
def test_without_a_hit_every_method_is_a_plain_prefill(tiny, method):
    prompt = text_ids(tiny, 7, 150)
    out = tiny.prefill(prompt, reuse=ReuseConfig(method=method), namespace=f"nothing-{method}")
    assert (out.report.prefix_tokens, out.report.reused_tokens, out.report.computed_fraction) == (0, 0, 1.0)
    assert np.abs(out.logits - engine_logits(tiny, prompt, reuse=FULL)).max() < EXACT_TINY


@pytest.mark.parametrize("shared", [63, 64, 65, 200])
def test_a_prefix_hit_changes_nothing(tiny, shared):
    namespace = f"prefix-{shared}"
    prompt = text_ids(tiny, shared, 260)
    tiny.remember(prompt[:shared], namespace=namespace)
    out = tiny.prefill(prompt, reuse=ReuseConfig(method="prefix"), namespace=namespace, keep=False)
    assert out.report.prefix_tokens == shared
    assert np.abs(out.logits - engine_logits(tiny, prompt, reuse=FULL, keep=False)).max() < EXACT_TINY


def test_hits_change_nothing_on_a_real_model(smollm):
    prompt = text_ids(smollm, 65, 130)
    smollm.remember(prompt[:65], namespace="real")
    full = engine_logits(smollm, prompt, reuse=FULL, keep=False)
    for found in (65, 129):  # a prefix of it at first, all of it then
        out = smollm.prefill(prompt, reuse=ReuseConfig(method="prefix"), namespace="real")
        assert out.report.prefix_tokens == found
        assert np.abs(out.logits - full).max() < EXACT


@pytest.mark.parametrize("length", [64, 65, 127, 128])
@pytest.mark.parametrize("method", ["prefix", pytest.param("naive", marks=pytest.mark.slow), "sparsex"])
def test_a_full_hit_still_computes_its_last_token(tiny, method, length):
    namespace = f"hit-{length}"
    prompt = text_ids(tiny, length, length)
    tiny.remember(prompt, namespace=namespace)
    out = tiny.prefill(prompt, reuse=ReuseConfig(method=method), namespace=namespace, keep=False)
    assert (out.report.prefix_tokens, out.report.active_tokens) == (length - 1, 1)
    assert np.abs(out.logits - engine_logits(tiny, prompt, reuse=FULL, keep=False)).max() < EXACT_TINY


def test_aligned_keys_are_those_of_the_segment_alone_at_its_new_position(smollm):
    document = text_ids(smollm, 11, 90)
    smollm.remember(document, namespace="align")
    prompt = np.concatenate([text_ids(smollm, 12, 37), document])
    with smollm.prefilled(prompt, reuse=ReuseConfig(method="naive"), namespace="align") as sequence:
        (segment,) = sequence.plan.prompt.segments
        pages = np.asarray(sequence.pages)
        places = np.arange(37, 37 + 89)  # the last token is computed
        page_size = smollm.config.page_size
        keys, values = stored_kv(smollm, pages[places // page_size] * page_size + places % page_size)
    assert (segment.start, segment.length, segment.donor_start) == (37, 90, 0)
    alone = Dense(smollm.model, smollm.runner.params).full(document, first_position=37)[1]
    np.testing.assert_allclose(keys, np.array([k for k, _ in alone])[:, :89], atol=2e-3)
    np.testing.assert_array_equal(values, stored_kv(smollm, segment.slots[:89])[1])


A, B = (np.random.default_rng(seed).integers(1, 97, 70).astype(np.int32) for seed in (100, 101))
NEW = np.random.default_rng(102).integers(1, 97, 200).astype(np.int32)


def new(length, at=0):
    return NEW[at : at + length], None


def cut(document, start=0, end=70):
    return document[start:end], (document, start)


INTERLEAVINGS = {
    "start, not a prefix": [cut(A, 5), new(20)],
    "middle": [new(11), cut(A), new(20, 50)],
    "end": [new(40), cut(A)],
    "prompt ends one token behind": [new(40), cut(A), new(1, 90)],
    "adjacent": [new(10), cut(A), cut(B), new(15, 60)],
    "one-token gaps": [new(1), cut(A), new(1, 50), cut(B), new(1, 60)],
    "the same segment twice": [new(9), cut(A), new(13, 40), cut(A), new(21, 80)],
    "a segment cut in half": [new(7), cut(A, 0, 35), new(30, 60), cut(A, 35, 70), new(10, 120)],
    "odd offsets": [new(3), cut(B, 13, 66), new(29, 30), cut(A, 21, 58), new(17, 90)],
    "many": [new(5), cut(A, 3, 40), new(6, 10), cut(B, 9, 70), new(2, 30), cut(A, 30, 70), new(12, 50)],
}


def remember_both(engine):
    for document in (A, B):
        engine.remember(document, namespace="n")


@pytest.mark.parametrize("pieces", INTERLEAVINGS.values(), ids=INTERLEAVINGS)
def test_interleavings_give_the_expected_plan(tiny, pieces):
    remember_both(tiny)
    tokens = np.concatenate([piece for piece, _ in pieces])
    report = tiny.prefill(tokens, reuse=ReuseConfig(method="naive"), namespace="n").report
    expected = np.concatenate(
        [np.full(len(p), TokenKind.FRESH if donor is None else TokenKind.REUSED) for p, donor in pieces]
    )
    expected[-1] = TokenKind.FRESH
    starts = np.cumsum([0, *[len(piece) for piece, _ in pieces]])[:-1]
    segments = [(s, len(p), donor[1]) for s, (p, donor) in zip(starts, pieces, strict=True) if donor]
    found = [(s.start, s.length, s.donor_start) for s in report.segments]
    np.testing.assert_array_equal(report.kind, expected)
    assert found == segments


@pytest.mark.parametrize("boundary", [0, 2])
@pytest.mark.parametrize("pieces", INTERLEAVINGS.values(), ids=INTERLEAVINGS)
def test_sparsex_is_the_algorithm_of_the_dense_reference(tiny, pieces, boundary):
    remember_both(tiny)
    tokens = np.concatenate([piece for piece, _ in pieces])
    reuse = ReuseConfig(boundary_layer=boundary, recompute_ratio=0.2, overflow_tokens=3, tail_tokens=8)
    out = tiny.prefill(tokens, reuse=reuse, namespace="n")
    logits, active = Dense(tiny.model, tiny.runner.params).sparsex(pieces, boundary, 0.2, 3, 8)
    np.testing.assert_array_equal(out.report.active, active)
    assert out.report.active_tokens == active.sum()
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)


def test_a_second_boundary_leaves_the_fresh_tokens_only(tiny):
    remember_both(tiny)
    pieces = INTERLEAVINGS["many"]
    reuse = ReuseConfig(boundary_layer=1, second_boundary=3, recompute_ratio=0.3, overflow_tokens=2, tail_tokens=8)
    out = tiny.prefill(np.concatenate([p for p, _ in pieces]), reuse=reuse, namespace="n")
    logits, active = Dense(tiny.model, tiny.runner.params).sparsex(pieces, 1, 0.3, 2, 8, second=3)
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)
    total, fresh = len(active), out.report.fresh_tokens
    assert out.report.computed_fraction == pytest.approx((total + 2 * active.sum() + fresh) / (4 * total))


def test_naive_copies_and_aligns(tiny):
    remember_both(tiny)
    pieces = INTERLEAVINGS["many"]
    out = tiny.prefill(np.concatenate([p for p, _ in pieces]), reuse=ReuseConfig(method="naive"), namespace="n")
    logits, _ = Dense(tiny.model, tiny.runner.params).sparsex(pieces, 0, 0.0, 0, 0)
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)


def test_a_batch_gives_what_each_request_gives_alone(tiny):
    remember_both(tiny)
    prompts = [np.concatenate([p for p, _ in INTERLEAVINGS[name]]) for name in ("end", "many", "middle", "odd offsets")]
    prompts.append(NEW[:50])
    sampling = SamplingParams(max_new_tokens=12)
    for method in ("full", "prefix", "naive", "sparsex"):
        reuse = ReuseConfig.fitting(method, boundary_layer=1)
        together = tiny.generate_batch(prompts, sampling, reuse=reuse, namespace="n", keep=False)
        for prompt, out in zip(prompts, together, strict=True):
            alone = tiny.generate(prompt, sampling, reuse=reuse, namespace="n", keep=False)
            assert (out.token_ids, out.finish_reason) == (alone.token_ids, alone.finish_reason)
            assert out.report.to_dict() | {"ttft_s": 0} == alone.report.to_dict() | {"ttft_s": 0}
            np.testing.assert_array_equal(out.report.active, alone.report.active)


@pytest.mark.slow
def test_a_batch_copies_more_tokens_than_a_plan_has_rows():
    engine = Engine.from_config(
        dataclasses.replace(TINY, max_position=512), chunk_rows=8, store_tokens=2048, page_size=16
    )
    documents = [np.arange(i, i + 400) % 97 for i in (1, 4)]
    for document in documents:
        engine.remember(document)
    prompts = [np.concatenate([[3, 5, 7], document, [9]]) for document in documents]
    assert engine.runner.shapes.max_rows < 800
    together = engine.generate_batch(prompts, SamplingParams(4), reuse=ReuseConfig("naive"), keep=False)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.report.reused_tokens == 400
        alone = engine.generate(prompt, SamplingParams(4), reuse=ReuseConfig("naive"), keep=False)
        assert found.token_ids == alone.token_ids


@pytest.mark.parametrize("method", ["naive", "sparsex"])
def test_approximate_kv_is_never_an_exact_prefix(tiny, method):
    remember_both(tiny)
    prompt = np.concatenate([NEW[:20], A, NEW[20:60]])
    reuse = ReuseConfig.fitting(method, boundary_layer=1, recompute_ratio=0.1, overflow_tokens=1)
    assert found_in_segments(tiny.prefill(prompt, reuse=reuse, namespace="n").report) == 70
    again = tiny.prefill(prompt, reuse=ReuseConfig(method="prefix"), namespace="n", keep=False)
    assert again.report.prefix_tokens == 20  # the fresh tokens before the first reused one are exact
    np.testing.assert_allclose(again.logits, engine_logits(tiny, prompt, reuse=FULL, keep=False), atol=1e-5)


def test_approximate_kv_can_be_a_donor(tiny):
    remember_both(tiny)
    tiny.prefill(np.concatenate([NEW[:20], A, NEW[20:60]]), reuse=ReuseConfig(method="naive"), namespace="n")
    again = np.concatenate([NEW[90:99], NEW[20:60]])
    report = tiny.prefill(again, reuse=ReuseConfig(method="naive"), namespace="n").report
    assert [(s.start, s.length, s.donor_start) for s in report.segments] == [(9, 40, 90)]


def test_kv_of_methods_that_recompute_everything_is_exact(tiny):
    remember_both(tiny)
    prompt = np.concatenate([NEW[:20], A, NEW[20:60]])
    tiny.prefill(prompt, reuse=ReuseConfig(recompute_ratio=1.0), namespace="n")
    again = tiny.prefill(prompt, reuse=ReuseConfig(method="prefix"), namespace="n")
    assert again.report.prefix_tokens == len(prompt) - 1


def test_a_generated_answer_is_found_in_a_later_prompt(tiny):
    out = tiny.generate(NEW[:30], SamplingParams(max_new_tokens=40, temperature=1.0), namespace="n")
    report = tiny.prefill([*NEW[60:75].tolist(), *out.token_ids, 5, 6], namespace="n").report
    assert [(s.start, s.length, s.donor_start) for s in report.segments] == [(15, 39, 30)]  # the last was no input


def test_the_next_turn_of_a_chat_is_an_exact_prefix(tiny):
    first = tiny.generate(NEW[:30], SamplingParams(max_new_tokens=10), namespace="n")
    prompt = [*NEW[:30].tolist(), *first.token_ids, *NEW[50:60].tolist()]
    turn = tiny.generate(prompt, SamplingParams(max_new_tokens=10), namespace="n")
    assert turn.report.prefix_tokens == 39
    fresh = tiny.generate(prompt, SamplingParams(max_new_tokens=10), reuse=FULL, namespace="n")
    assert turn.token_ids == fresh.token_ids


def test_namespaces_never_see_each_other(tiny):
    tiny.remember(A, namespace="one", frozen=True)
    prompt = np.concatenate([NEW[:9], A, NEW[9:19]])
    assert found_in_segments(tiny.prefill(prompt, namespace="two", keep=False).report) == 0
    assert tiny.prefill(A, namespace="two", keep=False).report.prefix_tokens == 0
    assert found_in_segments(tiny.prefill(prompt, namespace="one", keep=False).report) == 70


def test_a_forgotten_text_is_no_longer_found(tiny):
    handle = tiny.remember(A, namespace="n", frozen=True)
    assert [entry.handle for entry in tiny.entries("n")] == [handle]
    tiny.forget(handle)
    assert tiny.entries() == []
    assert tiny.prefill(np.concatenate([NEW[:9], A, NEW[9:19]]), namespace="n").report.fresh_tokens == 89


def test_nan_in_every_unused_slot_changes_nothing():
    engine, clean = tiny_engine(), tiny_engine()
    engine.runner.store = engine.runner.store + np.nan
    for one in (engine, clean):
        remember_both(one)
    prompt = np.concatenate([p for p, _ in INTERLEAVINGS["many"]])
    for method in ("full", "prefix", "naive", "sparsex"):
        outs = [
            one.generate(prompt, SamplingParams(max_new_tokens=20), reuse=ReuseConfig(method=method), namespace="n")
            for one in (engine, clean)
        ]
        assert outs[0].token_ids == outs[1].token_ids
