"""Every reuse method against an independent dense implementation, and what all methods have in common."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import found_in_segments, sharded_tiny, tiny_engine
from dense import Dense, engine_logits, stored_kv
from test_reuse import INTERLEAVINGS, NEW, A, remember_both

from sparsex_jax import InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.eval.oracle import prompt_kv, true_deviation
from sparsex_jax.model.ops import Ops
from sparsex_jax.reuse.methods import METHODS, Full, Method, Oracle, Phase

pytestmark = pytest.mark.usefixtures("every_signal")

PLAIN = {"overflow_tokens": 0, "tail_tokens": 0}
CONFIGS = {
    "epic": ReuseConfig("epic", head_tokens=5),
    "cacheblend": ReuseConfig("cacheblend", recompute_ratio=0.2),
    "prophetkv": ReuseConfig("prophetkv", recompute_ratio=0.2),
    "qcfuse": ReuseConfig("qcfuse", probe_layer=2, recompute_ratio=0.2),
    "focus": ReuseConfig("focus", recompute_ratio=0.2, pool_tokens=16, **PLAIN),
    "random": ReuseConfig("random", boundary_layer=1, recompute_ratio=0.2, **PLAIN),
    "sparsex": ReuseConfig(boundary_layer=2, recompute_ratio=0.2, **PLAIN),
    "everything": ReuseConfig(boundary_layer=1, second_boundary=3, head_tokens=3, pool_tokens=4, **PLAIN),
}
# The first three have one boundary and one signal: in a batch they run as the others do. `test_loop.py` has batches of
# the last.
IN_BATCHES_ELSEWHERE = ["epic", "random", "sparsex", "prophetkv", "qcfuse"]
PROMPTS = ["odd offsets", "many"]


@dataclasses.dataclass
class Case:
    """A prompt of `INTERLEAVINGS`, and the places of its tokens by kind."""

    name: str

    def __post_init__(self):
        self.pieces = INTERLEAVINGS[self.name]
        self.tokens = np.concatenate([tokens for tokens, _ in self.pieces])
        self.is_reused = np.concatenate([np.full(len(t), donor is not None) for t, donor in self.pieces])
        self.is_reused[-1] = False
        self.reused, self.fresh = np.flatnonzero(self.is_reused), np.flatnonzero(~self.is_reused)
        self.settled = self.fresh[self.fresh < self.reused.min()]  # nothing pasted stands before them
        ends = np.cumsum([len(tokens) for tokens, _ in self.pieces])
        self.segments = [
            np.arange(end - len(tokens), end) for (tokens, donor), end in zip(self.pieces, ends, strict=True) if donor
        ]

    def with_best(self, scores, count, forced=None):
        """The forced places and the best of the other reused ones."""
        forced = self.fresh if forced is None else forced
        others = np.setdiff1d(self.reused, forced)
        return np.union1d(forced, others[np.argsort(-scores[others], kind="stable")[:count]])

    def with_blocks(self, scores, length, count, forced=None):
        """The forced places and the best blocks of segments, whole, until so many others are chosen."""
        forced = self.fresh if forced is None else forced
        cut = [places[at : at + length] for places in self.segments for at in range(0, len(places), length)]
        blocks = [block for block in (np.setdiff1d(block, forced) for block in cut) if len(block)]
        chosen = []
        for block in sorted(blocks, key=lambda block: -scores[block].mean()):
            if len(chosen) < count:
                chosen += block.tolist()
        return np.union1d(forced, chosen).astype(int)

    def sinks(self, length):
        """Reused places that were among the first of their donor's prompt."""
        offsets = [donor[1] for _, donor in self.pieces if donor]
        return np.concatenate([s[: max(length - at, 0)] for s, at in zip(self.segments, offsets, strict=True)])


@pytest.fixture(params=PROMPTS)
def case(request):
    return Case(request.param)


@pytest.fixture
def dense(tiny):
    remember_both(tiny)
    return Dense(tiny.model, tiny.runner.params)


def run(engine, case, reuse):
    return engine.prefill(case.tokens, reuse=reuse, namespace="n", keep=False)


def assert_is(out, logits, active):
    np.testing.assert_array_equal(np.flatnonzero(out.report.active), active)
    assert out.report.active_tokens == len(active)
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)


# Each method ------------------------------------------------------------------------------------------------


def test_epic_computes_the_heads_of_segments(tiny, dense, case):
    heads = np.concatenate([places[:5] for places in case.segments])
    logits, _, [active] = dense.narrowed(case.pieces, [(0, lambda *_: np.union1d(case.fresh, heads))])
    assert_is(run(tiny, case, CONFIGS["epic"]), logits, active)


def test_cacheblend_follows_the_deviation_down_the_layers(tiny, dense, case):
    def choose(factor):
        def best(layer, hidden, rows, kv):
            scores = np.zeros(len(case.tokens))
            scores[rows] = dense.deviation(layer, hidden, rows, kv)
            scores[np.setdiff1d(case.reused, rows)] = -1  # gone already
            return case.with_best(scores, round(factor * 0.2 * len(case.reused)))

        return best

    logits, _, kept = dense.narrowed(case.pieces, [(1, choose(1.2)), (2, choose(1.1)), (3, choose(1.0))])
    out = run(tiny, case, CONFIGS["cacheblend"])
    assert_is(out, logits, kept[0])
    computed = len(case.tokens) + sum(map(len, kept))
    assert out.report.computed_fraction == pytest.approx(computed / (4 * len(case.tokens)))
    assert [len(k) for k in kept] == [len(case.fresh) + round(f * 0.2 * len(case.reused)) for f in (1.2, 1.1, 1.0)]


def test_prophetkv_probes_every_layer_and_leaves_nothing_behind(tiny, dense, case):
    def best(layer, hidden, rows, kv):
        mass = dense.masses(hidden[case.fresh], case.fresh, kv, case.fresh, range(4)).sum(0)
        return case.with_best(mass, round(0.2 * len(case.reused)))

    logits, kv, [active] = dense.narrowed(case.pieces, [(0, best)])
    active = np.setdiff1d(active, case.settled)
    out = run(tiny, case, CONFIGS["prophetkv"])
    assert_is(out, logits, active)
    assert out.report.computed_fraction == pytest.approx((len(case.fresh) + len(active)) / len(case.tokens))
    stored = _stored(tiny, case, CONFIGS["prophetkv"])
    np.testing.assert_allclose(stored, np.array(kv), atol=1e-4)  # of the probe, nothing is left


def test_qcfuse_chooses_by_one_layer_and_leaves_nothing_behind(tiny, dense, case):
    def best(layer, hidden, rows, kv):
        mass = dense.masses(hidden[case.fresh], case.fresh, kv, case.fresh, range(3))[2]
        return case.with_best(mass, round(0.2 * len(case.reused)))

    logits, kv, [active] = dense.narrowed(case.pieces, [(0, best)])
    out = run(tiny, case, CONFIGS["qcfuse"])
    assert_is(out, logits, active)
    assert out.report.computed_fraction == pytest.approx((3 / 4 * len(case.fresh) + len(active)) / len(case.tokens))
    np.testing.assert_allclose(_stored(tiny, case, CONFIGS["qcfuse"]), np.array(kv), atol=1e-4)


def test_qcfuse_refuses_a_layer_that_the_model_does_not_have(tiny):
    remember_both(tiny)
    with pytest.raises(InvalidRequestError, match="probe_layer=4 must be at most 3"):
        run(tiny, Case("many"), ReuseConfig("qcfuse", probe_layer=4))


def test_focus_recomputes_the_pieces_that_some_head_looks_at(tiny, dense, case):
    def best(layer, hidden, rows, kv):
        mass = dense.masses(hidden[case.fresh], case.fresh, kv, case.fresh, range(4), power=4).sum(0)
        return case.with_blocks(mass, 16, round(0.2 * len(case.reused)), np.union1d(case.fresh, case.sinks(4)))

    logits, _, [active] = dense.narrowed(case.pieces, [(0, best)])
    active = np.setdiff1d(active, case.settled)
    out = run(tiny, case, CONFIGS["focus"])
    assert_is(out, logits, active)
    assert out.report.computed_fraction == pytest.approx((len(case.fresh) + len(active)) / len(case.tokens))


def test_squares_are_of_the_middle_third_of_the_layers(tiny, dense, case):
    def best(layer, hidden, rows, kv):
        mass = dense.masses(hidden[case.fresh], case.fresh, kv, case.fresh, range(2), power=2)[1]
        return case.with_blocks(mass, 16, round(0.2 * len(case.reused)), np.union1d(case.fresh, case.sinks(4)))

    logits, _, [active] = dense.narrowed(case.pieces, [(0, best)])
    out = run(tiny, case, dataclasses.replace(CONFIGS["focus"], power=2))
    assert_is(out, logits, np.setdiff1d(active, case.settled))


def _stored(engine, case, reuse):
    with engine.prefilled(case.tokens, reuse=reuse, namespace="n") as sequence:
        page, offset = np.divmod(np.arange(len(case.tokens)), engine.config.page_size)
        slots = np.asarray(sequence.pages)[page] * engine.config.page_size + offset
        return np.stack(stored_kv(engine, slots), 1)


def test_random_tokens_are_as_many_and_the_same_each_time(tiny, dense, case):
    out = run(tiny, case, CONFIGS["random"])
    np.testing.assert_array_equal(out.report.active, run(tiny, case, CONFIGS["random"]).report.active)
    key = run(tiny, case, ReuseConfig(**CONFIGS["random"].to_dict() | {"method": "sparsex"})).report
    assert (out.report.active_tokens, out.report.computed_fraction) == (key.active_tokens, key.computed_fraction)
    assert (out.report.active != key.active).any()
    logits, _, _ = dense.narrowed(case.pieces, [(1, lambda *_: np.flatnonzero(out.report.active))])
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)


def test_the_oracle_knows_the_true_deviation(tiny, dense, case):
    true, pasted = np.array(dense.full(case.tokens)[1]), np.array(dense.pasted(case.pieces))
    np.testing.assert_allclose(prompt_kv(tiny, case.tokens, Full(), "n"), true, atol=1e-4)
    scale = (true**2).sum((3, 4)).mean(2)[:, :, None]
    expected = (((true - pasted) ** 2).sum((3, 4)) / scale).sum((0, 1))
    scores = true_deviation(tiny, case.tokens, "n")
    np.testing.assert_allclose(scores[case.reused], expected[case.reused], rtol=1e-3, atol=1e-5)
    reuse = Oracle(scores=scores, boundary_layer=0, recompute_ratio=0.3, **PLAIN)
    out = run(tiny, case, reuse)
    for without in (reuse, dataclasses.replace(reuse, scores=None)):
        with pytest.raises(InvalidRequestError, match=r"scores for a prompt of 50 tokens"):
            tiny.prefill(NEW[:50], reuse=without, namespace="n")
    assert "oracle" not in METHODS
    assert reuse == dataclasses.replace(reuse, scores=scores.tolist())
    active = case.with_best(scores, round(0.3 * len(case.reused)))
    logits, _, _ = dense.narrowed(case.pieces, [(0, lambda *_: active)])
    assert_is(out, logits, active)


# Options ----------------------------------------------------------------------------------------------------


def boundary_mass(dense, case, layer):
    """Key mass at a boundary before which everything was computed."""
    hidden, everyone = dense.embed[case.tokens], np.arange(len(case.tokens))
    return dense.masses(hidden, everyone, dense.full(case.tokens)[1], case.fresh, range(layer + 1))[-1]


def test_pooling_chooses_whole_blocks_of_segments(tiny, dense, case):
    reuse = ReuseConfig(boundary_layer=1, recompute_ratio=0.25, pool_tokens=8, **PLAIN)
    active = case.with_blocks(boundary_mass(dense, case, 1), 8, round(0.25 * len(case.reused)))
    np.testing.assert_array_equal(np.flatnonzero(run(tiny, case, reuse).report.active), active)


# What all have in common ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cacheblend", "everything", *(pytest.param(n, marks=pytest.mark.slow) for n in IN_BATCHES_ELSEWHERE)]
)
def test_a_batch_gives_what_each_request_gives_alone(tiny, name):
    remember_both(tiny)
    prompts = [*(Case(name).tokens for name in ("many", "end", "odd offsets")), NEW[:50]]
    sampling = SamplingParams(max_new_tokens=3)
    together = tiny.generate_batch(prompts, sampling, reuse=CONFIGS[name], namespace="n", keep=False)
    for prompt, out in zip(prompts, together, strict=True):
        alone = tiny.generate(prompt, sampling, reuse=CONFIGS[name], namespace="n", keep=False)
        assert out.token_ids == alone.token_ids
        assert out.report.to_dict() | {"ttft_s": 0} == alone.report.to_dict() | {"ttft_s": 0}
        np.testing.assert_array_equal(out.report.active, alone.report.active)


@pytest.mark.parametrize("name", CONFIGS)
def test_approximate_kv_is_never_an_exact_prefix(tiny, name):
    remember_both(tiny)
    prompt = np.concatenate([NEW[:20], A, NEW[20:60]])
    out = tiny.prefill(prompt, reuse=CONFIGS[name], namespace="n")
    assert found_in_segments(out.report) == 70
    assert out.report.active_tokens < len(prompt)
    again = tiny.prefill(prompt, reuse=ReuseConfig("prefix"), namespace="n", keep=False)
    assert again.report.prefix_tokens == 20
    np.testing.assert_allclose(again.logits, engine_logits(tiny, prompt, reuse=ReuseConfig("full")), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_in_unused_slots_changes_nothing(tiny, name):
    poisoned = tiny_engine()
    poisoned.runner.store = poisoned.runner.store + np.nan
    outs = []
    for engine in (tiny, poisoned):
        remember_both(engine)
        outs.append(run(engine, Case("many"), CONFIGS[name]))
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    np.testing.assert_array_equal(outs[0].report.active, outs[1].report.active)


class Undefined(Ops):
    """Products of padding rows are NaN, which the contract of `sparsex_kernels.linear` allows."""

    def linear(self, x, weights, layer, rows, **options):
        outs = super().linear(x, weights, layer, rows, **options)
        return tuple(self.only_wanted(out, rows) for out in outs)

    def gated_linear(self, x, gate, up, layer, rows, **options):
        return self.only_wanted(super().gated_linear(x, gate, up, layer, rows, **options), rows)

    def only_wanted(self, out, rows):
        return jnp.where(jnp.arange(len(out))[:, None] < rows.count, out, jnp.nan)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_what_padding_computes_reaches_nobody(tiny, name):
    remember_both(tiny)
    expected = run(tiny, Case("many"), CONFIGS[name])
    tiny.runner.decoder = dataclasses.replace(tiny.runner.decoder, ops=Undefined.on(tiny.mesh))
    found = run(tiny, Case("many"), CONFIGS[name])
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.report.active, expected.report.active)


@pytest.mark.parametrize(
    ("reuse", "token_layers"),
    [
        (CONFIGS["epic"], 4 * (30 + 5)),
        (CONFIGS["cacheblend"], 100 + (30 + 17) + (30 + 15) + (30 + 14)),
        (CONFIGS["prophetkv"], 4 * 30 + 4 * (20 + 14)),
        (CONFIGS["qcfuse"], 3 * 30 + 4 * (30 + 14)),
        (ReuseConfig("focus", recompute_ratio=0.01, pool_tokens=40, **PLAIN), 4 * 30 + 4 * (20 + 4 + 36)),
        (CONFIGS["random"], 100 + 3 * (30 + 14)),
        (CONFIGS["sparsex"], 2 * 100 + 2 * (30 + 14)),
        (ReuseConfig(boundary_layer=1, second_boundary=3, head_tokens=4, **PLAIN), 100 + 2 * (30 + 4 + 10) + 30),
    ],
)
def test_computed_fraction_by_hand(tiny, reuse, token_layers):
    """100 tokens, 70 of them reused, 4 layers."""
    remember_both(tiny)
    report = tiny.prefill(np.concatenate([NEW[:10], A, NEW[10:30]]), reuse=reuse, namespace="n").report
    assert (found_in_segments(report), report.fresh_tokens) == (70, 30)
    assert report.computed_fraction == pytest.approx(token_layers / 400)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_hit_every_method_is_a_plain_prefill(tiny, name):
    out = tiny.prefill(NEW[:50], reuse=CONFIGS[name], namespace="n", keep=False)
    assert (out.report.fresh_tokens, out.report.computed_fraction) == (50, 1.0)
    np.testing.assert_allclose(out.logits, engine_logits(tiny, NEW[:50], reuse=ReuseConfig("full")), atol=1e-5)


@pytest.mark.slow
def test_kv_deviation_sums_over_the_heads_of_all_devices(tiny, dense):
    case = Case("many")
    sharded = sharded_tiny(2)
    remember_both(sharded)
    outs = [run(engine, case, CONFIGS["cacheblend"]) for engine in (tiny, sharded)]
    np.testing.assert_array_equal(outs[0].report.active, outs[1].report.active)
    np.testing.assert_allclose(outs[0].logits, outs[1].logits, atol=1e-4)


# Errors -----------------------------------------------------------------------------------------------------


def test_an_unknown_signal_is_named(tiny):
    class Misspelt(Method, name="misspelt"):
        def schedule(self, prompt, num_layers):
            return [Phase(0, prompt.computed), Phase(1, prompt.fresh, "key_mas", 3)]

    remember_both(tiny)
    try:
        with pytest.raises(InvalidRequestError, match="signal='key_mas' is unknown; there are: key_mass, "):
            run(tiny, Case("many"), ReuseConfig("misspelt"))
    finally:
        del METHODS["misspelt"]
    assert run(tiny, Case("many"), ReuseConfig()).report.reused_tokens > 0  # nothing was lost


# Preambles --------------------------------------------------------------------------------------------------


def test_a_preamble_is_seen_and_dropped(tiny):
    preamble, text = NEW[:7], A[:50]
    handle = tiny.remember(text, namespace="n", frozen=True, preamble=preamble.tolist())
    assert tiny.stats()["tokens"] == 50
    prompt = np.concatenate([NEW[50:61], text, NEW[70:80]])
    with tiny.prefilled(prompt, reuse=ReuseConfig("naive"), namespace="n") as sequence:
        [segment] = sequence.plan.prompt.segments
        stored = stored_kv(tiny, segment.slots)
    assert (segment.start, segment.length, segment.donor_start) == (11, 50, 7)
    together = Dense(tiny.model, tiny.runner.params).full(np.concatenate([preamble, text]))[1]
    for ours, expected in zip(stored, zip(*together, strict=True), strict=True):
        np.testing.assert_allclose(ours, np.array(expected)[:, 7:], atol=1e-4)
    report = tiny.prefill(text, reuse=ReuseConfig("naive"), namespace="n", keep=False).report
    assert (report.prefix_tokens, report.reused_tokens) == (0, 49)
    tiny.forget(handle)
    assert (tiny.stats()["free"], tiny.stats()["active"]) == (tiny.stats()["pages"], 0)


def test_a_preamble_must_fit(tiny):
    with pytest.raises(InvalidRequestError, match=r"preamble has 1000 tokens and prompt 70: together 1070, .* 1024"):
        tiny.remember(A, preamble=[1] * 1000)
    assert tiny.stats()["active"] == 0
