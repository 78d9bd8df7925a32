"""Short segments keep a core that is not recomputed, what would not pay is not pasted, and five counts add up."""

import dataclasses

import numpy as np
import pytest
from conftest import found_in_segments, report_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import Epic, Focus, Naive, ReuseConfig, SparseX
from sparsex_jax.cache import Segment
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.report import KINDS

LAYERS = 6
TEXT = np.random.default_rng(7).integers(1, 97, 400).astype(np.int32)


def map_of(*pieces):
    """The map of a prompt by the lengths of its pieces: fresh and segments in turn, the first fresh."""
    segments, at = [], 0
    for number, length in enumerate(pieces):
        if number % 2:
            segments.append(Segment(at, length, 0, np.arange(length), exact=True))
        at += length
    fresh = PromptMap(np.zeros(at, np.int32), np.full(at, TokenKind.FRESH, np.uint8))
    kind = fresh.kind.copy()
    for segment in segments:
        kind[segment.start : segment.end] = TokenKind.REUSED
    kind[-1] = TokenKind.FRESH
    return dataclasses.replace(fresh, kind=kind, segments=tuple(segments))


def lengths(prompt):
    return [segment.length for segment in prompt.segments]


# Overflow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(16, 65, 6))
def test_a_short_segment_keeps_most_of_its_tokens(tiny, length):
    tiny.remember(TEXT[:length], namespace="n")
    prompt = np.concatenate([TEXT[100:120], TEXT[:length], TEXT[200:220]])
    report = tiny.prefill(prompt, reuse=ReuseConfig(), namespace="n", keep=False).report
    assert found_in_segments(report) == length
    assert report.reused_tokens > length / 2  # all but two eighths, and 15 % that the signal chooses
    core = report.kind[20 : 20 + length]
    assert (core == TokenKind.REUSED).all()


@pytest.mark.parametrize(("length", "each_side"), [(16, 2), (33, 4), (64, 8), (127, 15), (128, 16), (1000, 16)])
def test_overflow_follows_the_segment_up_to_its_limit(length, each_side):
    prompt = map_of(20, length, 20)
    forced = SparseX().forced(prompt) & prompt.reused
    expected = np.zeros(len(prompt), bool)
    expected[20 : 20 + each_side] = expected[20 + length - each_side : 20 + length] = True
    np.testing.assert_array_equal(forced, expected)
    np.testing.assert_array_equal(Focus().forced(prompt) & prompt.reused, expected | prompt.sinks(4))


def test_overflow_reaches_no_further_than_its_tokens():
    assert not map_of(20, 200, 20).overflow(0).any()
    assert map_of(20, 200, 20).overflow(3).sum() == 6


@settings(deadline=None)
@given(
    pieces=st.lists(st.integers(0, 60), min_size=2, max_size=9),
    width=st.integers(0, 70),
    dropped=st.sets(st.integers(0, 3)),
)
def test_overflow_is_what_is_near_a_fresh_token(pieces, width, dropped):
    """Also where segments adjoin, have a token, or were found and are not pasted."""
    prompt = map_of(1, *pieces)
    prompt = prompt.only([segment for at, segment in enumerate(prompt.segments) if at not in dropped])
    fresh = np.flatnonzero(prompt.fresh)
    expected = np.zeros(len(prompt), bool)
    for segment in prompt.segments:
        for token in range(segment.start, segment.end):
            reach = min(width, segment.length // 8)
            expected[token] = prompt.reused[token] and np.abs(fresh - token).min(initial=1000) <= reach
    np.testing.assert_array_equal(prompt.overflow(width), expected)


# What is pasted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "pieces", "kept"),
    [
        (SparseX(), (20, 16, 5, 40, 9), [16, 40]),
        (SparseX(), (20, 40, 5, 70), [40]),  # the tail of 64 tokens covers the last segment
        (SparseX(), (20, 40, 5, 128), [40, 128]),
        (Focus(), (20, 40, 5, 70), [40]),
        (SparseX(tail_tokens=0), (20, 40, 5, 70), [40, 70]),
        (SparseX(boundary_layer=LAYERS), (20, 300, 5), []),  # every layer computes every token
        (SparseX(boundary_layer=1, second_boundary=4), (20, 40, 5, 70), [40, 70]),  # spared from layer 4 on
        (Epic(head_tokens=20), (20, 24, 5, 80, 9), [80]),
        (Naive(), (20, 16, 5, 40), [16, 40]),
    ],
    ids=str,
)
def test_only_segments_that_spare_something_are_pasted(method, pieces, kept):
    prompt = map_of(*pieces)
    left, _ = method.lay_out(prompt, LAYERS)
    assert lengths(left) == kept
    gone = [segment for segment in prompt.segments if segment not in left.segments]
    assert all(left.fresh[segment.start : segment.end].all() for segment in gone)
    assert left.fresh.sum() == prompt.fresh.sum() + sum(prompt.reused[s.start : s.end].sum() for s in gone)


def test_a_segment_next_to_one_that_is_not_pasted_is_asked_again():
    prompt = map_of(20, 100, 0, 20, 0, 20, 4)  # the first is not next to fresh tokens behind it
    method = SparseX(head_tokens=16)
    left, _ = method.lay_out(prompt, LAYERS)
    assert lengths(left) == [100]
    forced = method.forced(left)
    assert forced[20 + 100 - 12 : 20 + 100].all()


def test_a_segment_that_is_not_pasted_is_not_copied(tiny):
    tiny.remember(TEXT[:60], namespace="n")
    tiny.remember(TEXT[60:90], namespace="n")
    prompt = np.concatenate([TEXT[200:220], TEXT[60:90], TEXT[220:225], TEXT[:60]])  # it ends in 60 stored tokens
    with tiny.prefilled(prompt, reuse=ReuseConfig(), namespace="n") as sequence:
        assert [(copy.start, copy.length) for copy in sequence.plan.copies] == [(20, 30)]
        report = sequence.report
    assert (found_in_segments(report), report.fresh_tokens) == (30, 85)
    assert [segment.length for segment in report.segments] == [30]


def test_what_spares_nothing_is_exact(tiny):
    """A prompt of which nothing is worth pasting is a plain prefill, and an exact prefix afterwards."""
    tiny.remember(TEXT[:60], namespace="n")
    prompt = np.concatenate([TEXT[200:220], TEXT[:60]])
    out = tiny.prefill(prompt, reuse=ReuseConfig(), namespace="n")
    assert (out.report.fresh_tokens, out.report.computed_fraction) == (80, 1.0)
    full = tiny.prefill(prompt, reuse=ReuseConfig("full"), namespace="n", keep=False)
    np.testing.assert_allclose(out.logits, full.logits, atol=1e-5)
    again = tiny.prefill(prompt, reuse=ReuseConfig("prefix"), namespace="n", keep=False).report
    assert again.prefix_tokens == 79


# The report -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TokenKind), st.booleans()), min_size=1, max_size=40))
def test_five_counts_add_up(tokens):
    kind, active = zip(*tokens, strict=True)
    report = report_of(kind, active)
    counts = report.tokens_by_kind()
    assert sum(counts.values()) == report.prompt_tokens == len(tokens)
    assert list(counts) == list(KINDS)
    assert counts["approximate_prefix"] == kind.count(TokenKind.APPROXIMATE)
    assert counts["recomputed"] == tokens.count((TokenKind.REUSED, True))
    assert counts["reused"] == tokens.count((TokenKind.REUSED, False))
