"""Budgets that depend on what a signal sees, and the confidence of reports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sharded_tiny, tiny_engine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cost import PER_ROW
from test_methods import CONFIGS, Case
from test_reuse import NEW, A, remember_both

from sparsex_jax import InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.cli.options import parse_method
from sparsex_jax.device.prefill import covered_share, pool_scores, prefill, top_rows
from sparsex_jax.eval.flops import flops_fraction
from sparsex_jax.reuse.cost import prefill_seconds
from sparsex_jax.reuse.methods import METHODS
from sparsex_jax.reuse.plan import PADDING_REQUEST, Budget
from sparsex_jax.reuse.schedule import Phase

pytestmark = pytest.mark.usefixtures("every_signal")

CHOOSING = [name for name, method in METHODS.items() if hasattr(method(), "max_ratio")]
PLAIN = {"overflow_tokens": 0, "tail_tokens": 0}
ROWS, REQUESTS = 32, 3


# The chooser ------------------------------------------------------------------------------------------------


def expected_rows(scores, candidates, block, least, coverage, most):
    """Plainly, for one request: its best blocks, the earlier first among equals."""
    blocks = [np.flatnonzero(candidates & (block == number)) for number in np.unique(block[candidates])]
    means = [scores[rows].astype(np.float64).mean() for rows in blocks]
    held = [np.maximum(mean, 0) * len(rows) for mean, rows in zip(means, blocks, strict=True)]
    chosen, so_far = np.zeros(len(scores), bool), 0.0
    for number in sorted(range(len(blocks)), key=lambda number: -means[number]):
        assume(abs(so_far - coverage * sum(held)) > 1e-4 * sum(held) or not coverage * sum(held))
        short = so_far < coverage * sum(held) or (coverage and not sum(held))
        if chosen.sum() < least or (chosen.sum() < most and short):
            chosen[blocks[number]] = True
            so_far += held[number]
    return chosen


@st.composite
def choices(draw):
    """Rows of several requests in blocks, padding behind them, scores with ties, zeros and NaN, and budgets."""
    size = draw(st.integers(1, ROWS))
    request = np.full(ROWS, PADDING_REQUEST, np.int32)
    request[:size] = np.sort(draw(st.lists(st.integers(0, REQUESTS - 1), min_size=size, max_size=size)))
    block = np.cumsum(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))).astype(np.int32)
    value = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0, 100.0, -1.0, np.nan])
    scores = np.array(draw(st.lists(value, min_size=ROWS, max_size=ROWS)), np.float32)
    candidates = np.array(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))) & (np.arange(ROWS) < size)
    least = draw(st.lists(st.integers(0, ROWS), min_size=REQUESTS, max_size=REQUESTS))
    more = draw(st.lists(st.integers(0, ROWS), min_size=REQUESTS, max_size=REQUESTS))
    coverage = draw(st.lists(st.sampled_from([0.0, 0.3, 0.7, 0.95]), min_size=REQUESTS, max_size=REQUESTS))
    return request, block, scores, candidates, np.array(least), np.array(coverage), np.add(least, more)


@jax.jit
def choose(scores, candidates, request, block, budget):
    return top_rows(pool_scores(scores, candidates, request, block), candidates, request, block, budget)


@settings(max_examples=100, deadline=None)
@given(choices())
def test_rows_are_chosen_as_a_plain_loop_chooses_them(drawn):
    request, block, scores, candidates, least, coverage, most = drawn
    scores = np.nan_to_num(scores, nan=-1e6)  # the lowest
    budget = Budget(jnp.array(least), jnp.array(coverage, jnp.float32), jnp.array(most))
    rows = [jnp.asarray(each) for each in (candidates, request, block)]
    chosen = np.asarray(choose(jnp.asarray(scores), *rows, budget))
    expected = np.zeros(ROWS, bool)
    for number in range(REQUESTS):
        own = candidates & (request == number)
        choice = expected_rows(scores, own, block, least[number], coverage[number], most[number])
        assert choice.sum() <= most_of(own, block, least[number], coverage[number], most[number])
        expected |= choice
    np.testing.assert_array_equal(chosen, expected)


def most_of(candidates, block, least, coverage, most):
    """How many rows the host makes room for: those of a phase that forces none."""
    longest = max(np.bincount(block[candidates]), default=0)
    pooled = {"max_budget": int(most), "pool_tokens": max(1, int(longest))}
    return Phase(1, np.zeros(ROWS, bool), "key_mass", int(least), coverage=float(coverage), **pooled).most


covered = jax.jit(functools.partial(covered_share, num_requests=REQUESTS))


@settings(max_examples=100, deadline=None)
@given(choices(), st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
def test_a_covered_share_is_one_of_what_the_scores_add_up_to(drawn, kept):
    request, _, scores, reused, *_ = drawn
    kept, scores = np.array(kept), np.nan_to_num(scores, nan=np.finfo(np.float32).min)
    share = np.asarray(covered(*map(jnp.asarray, (scores, reused, kept, request))))
    for number in range(REQUESTS):
        own = np.where(reused & (request == number), np.maximum(scores, 0), 0)
        expected = own[kept].sum() / own.sum() if own.any() else np.nan
        np.testing.assert_allclose(share[number], expected, rtol=1e-5)


def test_the_lowest_scores_of_a_block_do_not_overflow():
    """A block of NaN scores is the last one, and not one with what is no candidate."""
    scores = jnp.array([np.finfo(np.float32).min] * 4 + [0, 0], jnp.float32)
    rows = jnp.array([True, True, True, True, False, True]), jnp.zeros(6, jnp.int32), jnp.array([0, 0, 0, 0, 1, 2])
    pooled = pool_scores(scores, *rows)
    assert np.isfinite(pooled).all()
    budget = Budget(jnp.array([2]), jnp.zeros(1), jnp.array([2]))
    np.testing.assert_array_equal(np.flatnonzero(top_rows(pooled, *rows, budget)), [0, 1, 2, 3, 5])


# Methods ----------------------------------------------------------------------------------------------------


def run(engine, name, case="many", **options):
    reuse = ReuseConfig.fitting(name, **PLAIN | options)
    return engine.prefill(Case(case).tokens, reuse=reuse, namespace="n", keep=False)


def same(a, b):
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.report.active, b.report.active)
    assert a.report.to_dict() | {"ttft_s": 0} == b.report.to_dict() | {"ttft_s": 0}


@pytest.mark.parametrize("name", CHOOSING)
def test_a_coverage_computes_from_the_least_to_everything(tiny, name):
    remember_both(tiny)
    programs = prefill._cache_size()
    least = run(tiny, name, recompute_ratio=0.2)
    same(run(tiny, name, recompute_ratio=0.2, coverage=1e-6), least)
    same(run(tiny, name, recompute_ratio=0.2, coverage=0.9, max_ratio=0.2), least)
    outs = [run(tiny, name, recompute_ratio=0.05, coverage=coverage) for coverage in (0.3, 0.6, 0.95)]
    work = [out.report.recomputed_tokens for out in outs]
    assert work[0] <= work[1] <= work[2]
    assert work[0] < work[2]
    assert all(0 < out.report.confidence <= 1 for out in outs)
    assert all(out.report.confidence >= 0.9 * c for out, c in zip(outs, (0.3, 0.6, 0.95), strict=True))
    everything = [run(tiny, name, coverage=1.0), run(tiny, name, recompute_ratio=1.0)]
    same(*everything)
    full = run(tiny, "full")
    for out in everything:
        np.testing.assert_allclose(out.logits, full.logits, atol=1e-4)
        assert (out.report.confidence, out.report.reused_tokens) == (1.0, 0)
    assert prefill._cache_size() <= programs + 2  # of the two buckets, whatever the budgets are


@pytest.mark.parametrize("name", ["prophetkv", "focus", "sparsex"])
def test_a_coverage_chooses_up_to_the_largest_budget(tiny, name):
    remember_both(tiny)
    options = {"recompute_ratio": 0.0, "pool_tokens": 1} | ({"power": 1} if name == "focus" else {})
    few = run(tiny, name, coverage=0.5, **options).report
    fixed = run(tiny, name, **options).report
    most = run(tiny, name, coverage=0.5, max_ratio=0.1, **options).report
    reused = few.recomputed_tokens + few.reused_tokens
    assert fixed.recomputed_tokens < most.recomputed_tokens < few.recomputed_tokens < 0.5 * reused
    assert most.recomputed_tokens - fixed.recomputed_tokens == round(0.1 * reused)
    assert fixed.confidence < most.confidence < few.confidence


def test_each_request_of_a_batch_has_its_own_budget(tiny):
    remember_both(tiny)
    prompts = [Case(name).tokens for name in ("many", "end", "odd offsets")] + [NEW[:50]]
    options = {"recompute_ratio": 0.05, "pool_tokens": 8} | PLAIN
    reuse = ReuseConfig("focus", coverage=0.7, power=2, **options)
    together = tiny.generate_batch(prompts, SamplingParams(max_new_tokens=2), reuse=reuse, namespace="n", keep=False)
    for prompt, out in zip(prompts, together, strict=True):
        alone = tiny.prefill(prompt, reuse=reuse, namespace="n", keep=False)
        np.testing.assert_array_equal(out.report.active, alone.report.active)
        assert out.report.confidence == pytest.approx(alone.report.confidence, rel=1e-5)
    assert together[-1].report.confidence == 1.0


def test_cacheblend_leaves_about_the_coverage_behind_its_last_boundary(tiny):
    remember_both(tiny)
    few, more = (run(tiny, "cacheblend", recompute_ratio=0.05, coverage=c).report for c in (0.4, 0.9))
    assert list(few.phase_tokens) == sorted(few.phase_tokens, reverse=True)
    assert len(set(few.phase_tokens)) == 4
    assert all(a < b for a, b in zip(few.phase_tokens[1:], more.phase_tokens[1:], strict=True))


@pytest.mark.parametrize("power", [1, 2, 4])
def test_a_power_of_the_attention_is_a_signal(tiny, power):
    remember_both(tiny)
    report = run(tiny, "focus", power=power, recompute_ratio=0.2, pool_tokens=1).report
    if power == 1:
        prophet = run(tiny, "prophetkv", recompute_ratio=0.2).report
        assert (report.active & prophet.active).sum() > 0.9 * prophet.active.sum()
    assert 0 < report.confidence < 1


# What is said of it -----------------------------------------------------------------------------------------


def test_confidence_is_none_where_no_signal_looked(tiny):
    remember_both(tiny)
    assert run(tiny, "naive").report.confidence is None
    assert run(tiny, "epic").report.confidence is None
    assert run(tiny, "full").report.confidence == 1.0
    assert tiny.prefill(NEW[:50], reuse=ReuseConfig("naive"), keep=False).report.confidence == 1.0
    dropped = run(tiny, "sparsex", recompute_ratio=1.0, second_boundary=3).report
    assert (dropped.confidence, dropped.reused_tokens) == (None, 0)  # left out by no signal, in the last layer


def test_confidence_is_the_share_of_the_scores(tiny):
    """Of `given` scores, which a test can read."""
    remember_both(tiny)
    out = run(tiny, "random", recompute_ratio=0.2, boundary_layer=1)
    case = Case("many")
    scores = np.random.default_rng(case.tokens).random(len(case.tokens), np.float32)
    expected = scores[case.is_reused & out.report.active].sum() / scores[case.is_reused].sum()
    assert out.report.confidence == pytest.approx(expected, rel=1e-5)


def test_operations_and_seconds_follow_the_budget(tiny):
    remember_both(tiny)
    for name in ("focus", "cacheblend", "prophetkv"):
        reuse = [ReuseConfig.fitting(name, recompute_ratio=0.1, coverage=c, **PLAIN) for c in (0.0, 0.9)]
        reuse = [dataclasses.replace(each, pool_tokens=4) if name == "focus" else each for each in reuse]
        outs = [tiny.prefill(Case("many").tokens, reuse=each, namespace="n", keep=False) for each in reuse]
        flops = [flops_fraction(tiny.model, each, out.report) for each, out in zip(reuse, outs, strict=True)]
        work = [out.report.computed_fraction for out in outs]
        assert work[0] < work[1]
        assert flops[0] < flops[1]
        assert flops[1] - flops[0] == pytest.approx(work[1] - work[0], rel=0.5)
        seconds = []
        for each in reuse:
            with tiny.prefilled(Case("many").tokens, reuse=each, namespace="n") as sequence:
                seconds.append(prefill_seconds(tiny.model, sequence.plan, PER_ROW))
        assert seconds[0] == seconds[1]  # as if the least were chosen


def test_options_of_a_coverage(tiny):
    made = parse_method("focus:coverage=0.9:max_ratio=0.5:power=2")
    assert (made.coverage, made.max_ratio, made.power) == (0.9, 0.5, 2)
    for options, message in [
        ({"coverage": 1.5}, r"coverage=1.5 must be a number from 0 to 1"),
        ({"coverage": None}, r"coverage=None must be a number from 0 to 1"),
        ({"max_ratio": -0.1}, r"max_ratio=-0.1 must be a number from 0 to 1"),
        ({"max_ratio": 0.1}, r"max_ratio=0.1 must be at least recompute_ratio=0.15"),
        ({"power": 3}, r"power=3 must be 1, 2 or 4"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            ReuseConfig("focus", **options)


def test_more_coverage_is_more_careful():
    def care(**options):
        return ReuseConfig("focus", **options)

    assert care().accepts(care(coverage=0.5), 6)
    assert not care(coverage=0.5).accepts(care(), 6)
    assert care(coverage=0.5, max_ratio=0.5).accepts(care(coverage=0.6), 6)
    assert not care(coverage=0.5).accepts(care(coverage=0.5, max_ratio=0.5), 6)
    assert care().accepts(care(max_ratio=0.5), 6)  # which says nothing without a coverage
    assert not care(coverage=0.5).accepts(care(coverage=0.5, power=2), 6)


@pytest.mark.slow
def test_a_coverage_on_two_devices():
    reuse = dataclasses.replace(CONFIGS["focus"], coverage=0.7, recompute_ratio=0.05)
    outs = []
    for engine in (tiny_engine(), sharded_tiny(2)):
        remember_both(engine)
        outs.append(engine.prefill(np.concatenate([NEW[:10], A, NEW[10:30]]), reuse=reuse, namespace="n"))
    np.testing.assert_array_equal(outs[0].report.active, outs[1].report.active)
    assert outs[0].report.confidence == pytest.approx(outs[1].report.confidence, rel=1e-4)
